"""Loss in, learning rate out: plateau schedules that know nothing of faces."""

from .fastface import FastFace
from .mhlr import MHLR
from .plateau import PlateauSchedule, PlateauState
from .replay import Change, read_losses, replay, states

__all__ = [
    "MHLR",
    "Change",
    "FastFace",
    "PlateauSchedule",
    "PlateauState",
    "read_losses",
    "replay",
    "states",
]
