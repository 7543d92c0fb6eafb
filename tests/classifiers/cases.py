"""Margins that use every hook, random batches and a small network, for all classifiers' tests."""

import copy

import torch
from torch import Tensor, nn

from fastface_lightning.classifiers import Classifier
from fastface_lightning.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    Softmax,
)

SIZE, PIXELS = 16, 12  # of the small network's embeddings and images
Batch = dict[str, tuple[Tensor, Tensor]]


class HardNegatives(Margin):
    """A margin that uses every hook: hard negatives are raised, and the norm costs and counts."""

    def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        return cos_y - 0.1 - 0.01 * norm - 0.001 * label

    def negatives(self, cos: Tensor, cos_y: Tensor, cos_y_prime: Tensor) -> Tensor:
        hard = cos > cos_y_prime[:, None]
        return torch.where(hard, cos * (0.5 + cos_y[:, None] + cos_y_prime[:, None] + cos), cos)

    def penalty(self, norm: Tensor) -> Tensor:
        return norm / 10 + 1 / (1 + norm)


MARGINS = [
    Softmax(),
    CosFace(),
    ArcFace(),
    ArcFace(straight_through=True),
    Combined(0.9, 0.4, 0.15),
    Combined(1.35, 0.0, 0.0),
    AdaFace(),
    MagFace(l_a=2.0, u_a=12.0),
    CurricularFace(),
    ElasticFace(),
    ElasticFace(0.35, kind="cos"),
    HardNegatives(),
]


def batch(n: int, num_classes: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 embeddings (n, size) of norm about 5 sqrt(size), and labels with repetitions."""
    torch.manual_seed(seed)
    return 5 * torch.randn(n, size, dtype=torch.float64), torch.randint(num_classes, (n,))


def counterpart(kind: type[Classifier], reference: Classifier, **settings: object) -> Classifier:
    """A classifier of another kind with the margin, scale, filter and centres of ``reference``."""
    other = kind(
        reference.num_classes,
        reference.embedding_size,
        copy.deepcopy(reference.margin),
        reference.scale,
        reference.interclass_filter,
        **settings,
    )
    other.to(reference.weight.dtype).load_state_dict(reference.state_dict())
    return other


def outcome(classifier: Classifier, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients of embeddings and centres, from one state of torch's generator."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    classifier.weight.grad = None
    loss = classifier(x, labels)
    loss.backward()
    assert x.grad is not None and classifier.weight.grad is not None
    return loss.detach(), x.grad, classifier.weight.grad


def network() -> nn.Sequential:
    """Images (N, PIXELS) float64 to embeddings (N, SIZE), with a batch norm."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(PIXELS, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, SIZE)
    ).double()


def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """The slow twin of ``update_momentum_encoder``, parameters alone."""
    with torch.no_grad():
        for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
            p.copy_(momentum * p + (1 - momentum) * q)


def assert_same_training(loss: Tensor, expected: Tensor, probe: nn.Module) -> None:
    """Both losses and their gradients agree; the gradients of ``loss`` stay."""
    probe.zero_grad()
    expected.backward()
    wanted = [p.grad.clone() for p in probe.parameters() if p.grad is not None]
    probe.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for p, grad in zip(probe.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-10)


def descend(probe: nn.Module, lr: float = 0.01) -> None:
    with torch.no_grad():
        for p in probe.parameters():
            p -= lr * p.grad
