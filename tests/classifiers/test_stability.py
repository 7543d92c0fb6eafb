"""No NaN: 200 steps at s = 64 on batches made to break a margin softmax."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases import MARGINS
from torch import Tensor, nn

from fastface_lightning.classifiers import (
    ChunkedClassifier,
    Classifier,
    FullClassifier,
    PartialClassifier,
)
from fastface_lightning.margins import Margin
from fastface_lightning.optim import SGD

CLASSES, SIZE, BATCH = 200, 32, 16
KINDS: dict[str, Callable[[Margin], Classifier]] = {
    "full": lambda margin: FullClassifier(CLASSES, SIZE, margin),
    "chunked": lambda margin: ChunkedClassifier(CLASSES, SIZE, margin, chunk=64),
    "chunked bfloat16": lambda margin: ChunkedClassifier(
        CLASSES, SIZE, margin, chunk=64, products="bfloat16"
    ),
    "partial": lambda margin: PartialClassifier(CLASSES, SIZE, margin, rate=0.2),
}


def batches(step: int) -> tuple[Tensor, Tensor, float | None]:
    """Images, labels, and the norm that the embeddings are forced to, if any."""
    images, labels = torch.rand(BATCH, 48) * 2 - 1, torch.randint(CLASSES, (BATCH,))
    case = step % 8
    if case == 1:
        images = torch.zeros_like(images)
    if case == 2:
        images = images[:1].expand(BATCH, -1)
    if case == 3:
        labels = labels[:1].expand(BATCH).contiguous()
    if case == 4:  # one image under as many names as there are
        images, labels = images[:1].expand(BATCH, -1), torch.arange(BATCH)
    return images, labels, {5: 0.0, 6: 1e4, 7: 1e-20}.get(case)


def train(classifier: Classifier, mode: str, steps: int = 200) -> None:
    backbone = nn.Sequential(
        nn.Linear(48, 64), nn.BatchNorm1d(64), nn.PReLU(), nn.Linear(64, SIZE), nn.BatchNorm1d(SIZE)
    )
    optimizer = SGD(
        [*backbone.parameters(), *classifier.parameters()], 0.1, momentum=0.9, weight_decay=5e-4
    )
    for step in range(steps):
        images, labels, norm = batches(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16 autocast"):
            x = backbone(images)
            if norm is not None:
                x = norm * torch.nn.functional.normalize(x)
            if mode == "fp16 rounding":
                x = x.half().float()
            loss = classifier(x, labels)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite(), step
        for p in (*backbone.parameters(), *classifier.parameters()):
            grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            assert grad.isfinite().all(), step
        nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimizer.step()
    for tensor in (*backbone.state_dict().values(), *classifier.state_dict().values()):
        assert tensor.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16 autocast", "fp16 rounding"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_stays_finite(margin: Margin, kind: str, mode: str) -> None:
    torch.manual_seed(0)
    train(KINDS[kind](copy.deepcopy(margin)), mode)
