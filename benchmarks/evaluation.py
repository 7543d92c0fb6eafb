"""What the evaluation protocols cost: ``python benchmarks/evaluation.py``.

The field's scripts, written plainly with loops over thresholds, templates and batches of pairs,
against this project's functions: as many cores as each makes use of, which for loops in numpy is
one, on the same synthetic data, with the same results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from classifiers import resident
from common import medians, report
from numpy.typing import NDArray

from fastface_lightning.evaluation import (
    identification,
    tar_at_far,
    template_embeddings,
    template_scores,
    verification_accuracy,
    verification_tar,
)

Array = NDArray[Any]
FARS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
RANKS, FPIR = [1, 5], [0.01, 0.1]
FOLDS, FAR = 10, 1e-3


class Sizes(NamedTuple):
    """How much of everything; these are LFW's pairs and IJB-C's lists."""

    folds: int = 6_000
    images: int = 469_375
    templates: int = 23_124
    subjects: int = 3_531  # the first template of each is its entry in the gallery
    pairs: int = 15_658_489
    width: int = 512


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder = arguments.run
        return run(what, Path(folder))
    rows = table(Sizes(), arguments.repeats)
    sizes = Sizes()._asdict()
    report(
        "evaluation",
        "Evaluation protocols, the field's scripts (plain) and this project",
        rows,
        sizes=sizes,
    )
    return None


def table(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """A row for each protocol."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [folds(sizes, repeats)]
        write_inputs(sizes, folder)
        for protocol in ("templates", "search"):
            rows.append(apart(protocol, folder, repeats))
    return rows


def row(
    protocol: str, seconds: dict[str, float], gigabytes: dict[str, float] | None = None
) -> dict[str, Any]:
    held: dict[str, Any] = gigabytes or {"ours": "-", "plain": "-"}
    return {
        "protocol": protocol,
        "s": seconds["ours"],
        "s, plain": seconds["plain"],
        "times faster": seconds["plain"] / seconds["ours"],
        "GB": held["ours"],
        "GB, plain": held["plain"],
    }


# Pairs in ten folds


def folds(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Accuracy over 400 thresholds and TAR@FAR over 4,000, both in ten folds."""
    torch.manual_seed(0)
    shown = torch.randn(sizes.folds, sizes.width)
    same = torch.arange(sizes.folds) % 2 == 0
    other = torch.where(same[:, None], shown, torch.randn_like(shown))
    a, b = (torch.nn.functional.normalize(x + 1.6 * torch.randn_like(x)) for x in (shown, other))
    results: dict[str, Any] = {}

    def ours() -> None:
        accuracy, tar = verification_accuracy(a, b, same), verification_tar(a, b, same, FAR)
        results["ours"] = [accuracy.accuracy, accuracy.std, *tar]

    def plain() -> None:
        results["plain"] = plain_folds(a.numpy(), b.numpy(), same.numpy())

    taken = medians({"ours": ours, "plain": plain}, repeats)
    agree("folds", **results, within=1e-9)
    return row("10 folds: accuracy and TAR@FAR", taken)


def plain_folds(a: Array, b: Array, same: Array) -> list[float]:
    """Every fold, every threshold: count what it accepts, in training and in test."""
    distance = np.sum(np.square(a - b), 1)
    fold = np.array_split(np.arange(len(same)), FOLDS)
    thresholds, fine = np.arange(400) * 0.01, np.arange(4000) * 0.001
    accuracies, tars, fars = [], [], []
    for test in fold:
        train = np.setdiff1d(np.arange(len(same)), test)
        scores = [plain_accuracy(t, distance[train], same[train]) for t in thresholds]
        best = thresholds[int(np.argmax(scores))]
        accuracies.append(plain_accuracy(best, distance[test], same[test]))
        rates = [plain_rates(t, distance[train], same[train])[1] for t in fine]
        at = float(np.interp(FAR, rates, fine)) if max(rates) >= FAR else 0.0
        tar, far = plain_rates(at, distance[test], same[test])
        tars.append(tar)
        fars.append(far)
    means = [np.mean(accuracies), np.std(accuracies), np.mean(tars), np.std(tars), np.mean(fars)]
    return [float(value) for value in means]


def plain_accuracy(threshold: float, distance: Array, same: Array) -> float:
    accept = np.less(distance, threshold)
    accepted = np.sum(np.logical_and(accept, same))
    rejected = np.sum(np.logical_and(np.logical_not(accept), np.logical_not(same)))
    return float(accepted + rejected) / len(distance)


def plain_rates(threshold: float, distance: Array, same: Array) -> tuple[float, float]:
    accept = np.less(distance, threshold)
    true = np.sum(np.logical_and(accept, same))
    false = np.sum(np.logical_and(accept, np.logical_not(same)))
    return float(true / np.sum(same)), float(false / np.sum(np.logical_not(same)))


# Templates and search, each side in a process of its own


def write_inputs(sizes: Sizes, folder: Path) -> None:
    """Write synthetic lists and features like IJB-C's to files.

    Few templates have many images, an image is a still or one of some frames of a video, and images
    come in no order. Of the pairs, in ascending order, each probe meets its own subject's entry
    once, and so many others that the list has its length.
    """
    rng = np.random.default_rng(0)
    subject = np.concatenate(
        [
            np.arange(sizes.subjects),
            rng.integers(0, sizes.subjects, sizes.templates - sizes.subjects),
        ]
    )
    weight = rng.lognormal(sigma=1.2, size=sizes.templates)
    more = rng.choice(sizes.templates, sizes.images - sizes.templates, p=weight / weight.sum())
    templates = rng.permutation(np.concatenate([np.arange(sizes.templates), more]))
    medias = np.bincount(templates) // 4 + 1  # of each template
    media = np.cumsum(medias)[templates] - 1 - rng.integers(0, medias[templates])

    units = rng.standard_normal((sizes.subjects, sizes.width), np.float32)
    shift = rng.standard_normal((sizes.templates, sizes.width), np.float32)
    features = np.lib.format.open_memmap(
        folder / "features.npy", "w+", np.float32, (sizes.images, sizes.width)
    )
    for start in range(0, sizes.images, 2**14):
        of = templates[start : start + 2**14]
        noise = rng.standard_normal((len(of), sizes.width), np.float32)
        length = rng.uniform(0.5, 1.5, (len(of), 1)).astype(np.float32)
        features[start : start + len(of)] = length * (units[subject[of]] + 1.5 * shift[of] + noise)
    features.flush()

    probes = sizes.templates - sizes.subjects
    true_pairs = subject[sizes.subjects :] * probes + np.arange(probes)
    is_other = np.ones(sizes.subjects * probes, bool)
    is_other[true_pairs] = False
    others = rng.choice(np.flatnonzero(is_other), sizes.pairs - probes, replace=False)
    code = np.sort(np.concatenate([true_pairs, others]))
    pairs = np.stack([code // probes, code % probes + sizes.subjects], 1)
    for name, array in {
        "templates": templates,
        "media": media,
        "subject": subject,
        "pairs": pairs,
        "same": subject[pairs[:, 0]] == subject[pairs[:, 1]],
    }.items():
        np.save(folder / f"{name}.npy", array)
    embeddings = template_embeddings(*map(torch.from_numpy, (features, templates, media)))
    np.save(folder / "embeddings.npy", embeddings.numpy())


def apart(protocol: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Median seconds and peak memory of both sides, taking turns, in a process each time."""
    sides = ("ours", "plain")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    gigabytes: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for side in sides:
            command = [sys.executable, __file__, "--run", f"{protocol} {side}", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            took, held, results[side] = json.loads(done.stdout)
            seconds[side].append(took)
            gigabytes[side].append(held)
    agree(protocol, **results, within=1e-3)
    return row(
        TITLES[protocol],
        {side: median(values) for side, values in seconds.items()},
        {side: median(values) for side, values in gigabytes.items()},
    )


def run(what: str, folder: Path) -> None:
    """In a process of its own: read the inputs, then print seconds, peak memory and result."""
    names, side = SIDES[what]
    arrays = [np.load(folder / f"{name}.npy") for name in names]
    start = time.perf_counter()
    result = side(*arrays)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resident("VmHWM") / 1e9, result]))


def our_templates(*arrays: Array) -> list[float]:
    features, templates, media, pairs, same = map(torch.from_numpy, arrays)
    embeddings = template_embeddings(features, templates, media)
    return tar_at_far(template_scores(embeddings, pairs), same, FARS)


def plain_templates(
    features: Array, templates: Array, media: Array, pairs: Array, same: Array
) -> list[float]:
    """Every template, every media, batches of 100,000 pairs, and every point of the ROC."""
    embeddings = np.zeros((len(np.unique(templates)), features.shape[1]), np.float32)
    for t in np.unique(templates):
        images = np.where(templates == t)[0]
        faces, source = features[images], media[images]
        medias = [np.mean(faces[source == m], 0) for m in np.unique(source)]
        embeddings[t] = np.sum(medias, 0)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), 100_000):
        batch = pairs[start : start + 100_000]
        scores[start : start + 100_000] = np.sum(
            embeddings[batch[:, 0]] * embeddings[batch[:, 1]], -1
        )
    from sklearn.metrics import roc_curve  # here, so that it takes no memory of the other side

    # All points: scikit-learn's default drops some, and with them the nearest.
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    far, tar = np.flipud(far), np.flipud(tar)  # the largest TAR of equal FARs comes first
    return [float(tar[np.argmin(np.abs(far - wanted))]) for wanted in FARS]


def our_search(embeddings: Array, subject: Array) -> list[float]:
    probes, ids, gallery, gallery_ids = map(torch.from_numpy, searched(embeddings, subject))
    result = identification(probes, ids, gallery, gallery_ids, RANKS, FPIR)
    assert result.tpir is not None
    return result.rank + result.tpir


def plain_search(embeddings: Array, subject: Array) -> list[float]:
    """All scores in one matrix, all of it sorted."""
    probes, ids, gallery, gallery_ids = searched(embeddings, subject)
    scores = probes @ gallery.T
    order = np.argsort(-scores, 1)
    hit = gallery_ids[order] == ids[:, None]
    mated = np.isin(ids, gallery_ids)
    best = np.take_along_axis(scores, order[:, :1], 1)[:, 0]
    strangers = np.sort(best[~mated])[::-1]
    rates = [float(hit[mated, :rank].any(1).mean()) for rank in RANKS]
    for rate in FPIR:
        threshold = strangers[int(rate * len(strangers))]
        rates.append(float((hit[mated, 0] & (best[mated] > threshold)).mean()))
    return rates


def searched(embeddings: Array, subject: Array) -> tuple[Array, Array, Array, Array]:
    """Probes and gallery, without a tenth of the gallery, so that some probes are strangers."""
    count = int(subject.max()) + 1
    enrolled = np.arange(count) % 10 > 0
    gallery, gallery_ids = embeddings[:count][enrolled], subject[:count][enrolled]
    return embeddings[count:], subject[count:], gallery, gallery_ids


LISTS = ("features", "templates", "media", "pairs", "same")
SIDES: dict[str, tuple[tuple[str, ...], Callable[..., list[float]]]] = {
    "templates ours": (LISTS, our_templates),
    "templates plain": (LISTS, plain_templates),
    "search ours": (("embeddings", "subject"), our_search),
    "search plain": (("embeddings", "subject"), plain_search),
}
TITLES = {
    "templates": "templates 1:1: embeddings, scores and 6 TAR@FAR",
    "search": "templates 1:N: ranks and TPIR@FPIR",
}


def agree(what: str, ours: list[float], plain: list[float], within: float) -> None:
    """Refuse a comparison of two different things."""
    if not np.allclose(ours, plain, rtol=0, atol=within):
        raise RuntimeError(f"{what}: the sides must agree within {within}, got {ours} and {plain}")


if __name__ == "__main__":
    main()
