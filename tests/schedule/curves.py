"""Synthetic training losses as margin-softmax runs have them: rise a little, fall, flatten."""

from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """A noisy loss and the smooth one beneath it, one value an optimizer step, float64."""

    losses: list[float]
    smooth: np.ndarray


def training_curve(
    steps: int,
    scale: float = 10.0,
    noise: float = 0.05,
    seed: int = 0,
    rise: float = 0.0,
    climb: float = 0.1,
    speed: float = 15.0,
) -> Curve:
    """``scale`` x (a rise by ``climb`` over the share ``rise`` of the run, then a hyperbolic fall).

    Args:
        steps: length of the run, optimizer steps.
        scale: loss at the first step.
        noise: standard deviation of a step's loss, as a share of it.
        seed: of the noise.
        rise: share of the run over which the loss rises before it falls, in [0, 1).
        climb: how far it rises, as a share of ``scale``.
        speed: how often the fall's half-life fits into a run.
    """
    x = np.arange(steps) / steps
    top = 1 + climb if rise else 1.0
    up = 1 + climb * x / rise if rise else np.ones(steps)
    fall = 0.05 + (top - 0.05) / (1 + speed * np.maximum(x - rise, 0))
    smooth = scale * np.where(x < rise, up, fall)
    bumps = np.random.default_rng(seed).standard_normal(steps)
    return Curve((smooth * (1 + noise * bumps)).tolist(), smooth)
