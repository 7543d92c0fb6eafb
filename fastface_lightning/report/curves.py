"""Figures of an evaluation: ROC curves, and how the scores of one person and of two lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .figures import readable

LOWEST_FAR = 1e-7


def thin_curve(far: ArrayLike) -> NDArray[np.int64]:
    """Indices of some 500 points or fewer of a ROC curve, spread over FAR and over its logarithm.

    Args:
        far: (n,) ascending, in [0, 1], n at least 1.
    """
    far = np.asarray(far)
    wanted = np.concatenate([np.geomspace(LOWEST_FAR, 1, 300), np.linspace(0, 1, 200)])
    indices = np.searchsorted(far, wanted, side="right") - 1  # highest TAR at that FAR or below
    return np.unique(np.concatenate([[0], indices, [len(far) - 1]]))


def plot_roc(axis: Any, curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Draw TAR over FAR, FAR on a logarithmic axis, into a matplotlib axis.

    Args:
        axis: of a matplotlib figure.
        curves: by the name of the set, FAR and TAR, (n,) each, ascending.
    """
    for name, (far, tar) in curves.items():
        far, tar = np.asarray(far), np.asarray(tar)
        positive = far > 0
        # Left of the first false acceptance a curve is its highest TAR without one.
        lowest = far[positive].min(initial=1.0)
        start = tar[~positive].max(initial=0.0)
        x = np.concatenate([[lowest / 3, lowest], far[positive]])
        y = np.concatenate([[start, start], tar[positive]])
        axis.step(x, y, where="post", label=legend_label(name))
    axis.set_xscale("log")
    axis.set_xlabel("false acceptance rate")
    axis.set_ylabel("true acceptance rate")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.2)
    axis.legend(loc="lower right", frameon=False)


def legend_label(name: str) -> str:
    """A set's name as a legend takes it: one that begins with _ would be left out."""
    return " " + readable(name, 40)


def plot_curves(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Draw :func:`plot_roc` into an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    plot_roc(figure.subplots(), curves)
    figure.savefig(path, dpi=130)


def plot_scores(
    path: str | Path,
    scores: Mapping[str, Sequence[NDArray[Any]]],
    thresholds: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Draw a histogram of each set's cosines, of one person and of two, into an image file.

    Args:
        path: image file to write.
        scores: by the name of the set, the cosines of pairs of one person and of two, (n,) each.
        thresholds: by the name of the set, least cosine accepted at each false accept rate; None
            where none is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(scores) + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(scores), 1, sharex=True))
    for axis, (name, (same, different)) in zip(axes, scores.items(), strict=True):
        few = len(same) + len(different) < 5000
        bins = np.linspace(-1, 1, 41 if few else 101)
        for people, values, color in (
            ("two people", different, "tab:orange"),
            ("one person", same, "tab:blue"),
        ):
            if len(values):
                shares = np.full(len(values), 1 / len(values))
                label = f"{people} ({len(values):,})"
                axis.hist(values, bins, weights=shares, color=color, alpha=0.6, label=label)
        for far, cosine in thresholds[name].items():
            if cosine is not None:
                axis.axvline(cosine, color="black", linewidth=0.8, linestyle=":")
                axis.annotate(
                    f"FAR {float(far):g}",
                    (cosine, 1),
                    (1, -3),
                    ("data", "axes fraction"),
                    "offset points",
                    rotation=90,
                    va="top",
                    fontsize=7,
                )
        axis.set_title(readable(name), loc="left", fontsize=10)
        axis.set_ylabel("share of pairs")
        axis.legend(loc="upper left", frameon=False)
        axis.grid(alpha=0.2)
    axes[-1].set_xlabel("cosine of the two embeddings")
    figure.savefig(path, dpi=130)
