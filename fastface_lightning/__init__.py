"""Train face recognition on one GPU in a quarter of the usual time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inference.embedder import load_embedder
    from .schedule.autowu import AutoWU
    from .schedule.callback import FastFaceCallback
    from .schedule.fastface import FastFace
    from .schedule.lr_scheduler import FastFaceLR
    from .schedule.mhlr import MHLR
    from .schedule.replay import replay
    from .training.averaging import WeightAverage
else:  # a type checker that saw this __getattr__ would take any name for one of ours

    def __getattr__(name: str) -> object:
        """Load a public name at its first use: the schedules need neither torch nor timm."""
        from importlib import import_module

        if name not in _MODULE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
        globals()[name] = value
        return value


__all__ = [
    "MHLR",
    "AutoWU",
    "FastFace",
    "FastFaceCallback",
    "FastFaceLR",
    "WeightAverage",
    "load_embedder",
    "replay",
]
__version__ = "0.1.0"

_MODULE = {
    "FastFaceCallback": "schedule.callback",
    "FastFaceLR": "schedule.lr_scheduler",
    "FastFace": "schedule.fastface",
    "AutoWU": "schedule.autowu",
    "MHLR": "schedule.mhlr",
    "WeightAverage": "training.averaging",
    "load_embedder": "inference.embedder",
    "replay": "schedule.replay",
}


def __dir__() -> list[str]:
    return sorted(__all__)
