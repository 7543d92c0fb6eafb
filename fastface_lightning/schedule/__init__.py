"""Loss in, learning rate out: plateau schedules that know nothing of faces."""

from .autowu import AutoWU
from .base import Change, Schedule
from .fastface import FastFace
from .mhlr import MHLR
from .plateau import PlateauSchedule, PlateauState
from .replay import read_losses, replay, states

__all__ = [
    "MHLR",
    "AutoWU",
    "Change",
    "FastFace",
    "PlateauSchedule",
    "PlateauState",
    "Schedule",
    "read_losses",
    "replay",
    "states",
]
