"""FullClassifier against the loss written as loops in float64, and against hostile input."""

import math

import numpy as np
import pytest
import torch
from cases import MARGINS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.margins import (
    AdaFace,
    ArcFace,
    CurricularFace,
    ElasticFace,
    Margin,
    Softmax,
)

# Those whose outcome for a sample depends on neither chance nor the rest of the batch.
FIXED = [m for m in MARGINS if not isinstance(m, AdaFace | CurricularFace | ElasticFace)]
margins = pytest.mark.parametrize("margin", FIXED, ids=repr)


def twin(x: np.ndarray, w: np.ndarray, labels: list[int], margin: Margin, scale: float) -> float:
    """The mean loss, one sample and one class at a time."""
    total = 0.0
    for row, label in zip(x, labels, strict=True):
        norm = math.sqrt(sum(v * v for v in row))
        cos = [row @ centre / (norm * math.sqrt(centre @ centre)) for centre in w]
        vector = [torch.tensor([v], dtype=torch.float64) for v in (cos[label], norm)]
        prime = margin(*vector, torch.tensor([label]))
        exponentials = []
        for j, value in enumerate(cos):
            negative = torch.tensor([[value]], dtype=torch.float64)
            changed = margin.negatives(negative, vector[0], prime).item()
            exponentials.append(math.exp(scale * (prime.item() if j == label else changed)))
        total -= math.log(exponentials[label] / sum(exponentials))
        total += margin.penalty(vector[1]).item()
    return total / len(labels)


def random_case(
    margin: Margin,
    n: int = 6,
    num_classes: int = 9,
    size: int = 4,
    scale: float = 16.0,
    seed: int = 0,
) -> tuple[FullClassifier, Tensor, Tensor]:
    """A float64 classifier with a batch: embeddings of norm about 10, labels with repetitions."""
    torch.manual_seed(seed)
    classifier = FullClassifier(num_classes, size, margin, scale).double()
    embeddings = 5 * torch.randn(n, size, dtype=torch.float64)
    return classifier, embeddings, torch.randint(num_classes, (n,))


@margins
@settings(deadline=None, max_examples=8)
@given(
    n=st.integers(1, 8),
    num_classes=st.integers(1, 12),
    size=st.integers(1, 6),
    scale=st.floats(1, 64),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loops(
    margin: Margin, n: int, num_classes: int, size: int, scale: float, seed: int
) -> None:
    classifier, x, labels = random_case(margin, n, num_classes, size, scale, seed)
    expected = twin(x.numpy(), classifier.weight.detach().numpy(), labels.tolist(), margin, scale)
    assert classifier(x, labels).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "margin", [m for m in FIXED if not getattr(m, "straight_through", False)], ids=repr
)
def test_gradients(margin: Margin) -> None:
    """Exact for embeddings and centres, through margin, hooks and the in-place replacement."""
    classifier, x, labels = random_case(margin)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(classifier, {"weight": weight}, (x, labels))

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), classifier.weight))


def test_straight_through_gradient_is_insightface_s() -> None:
    """As though the margin were a constant added to the target logit under no_grad."""
    classifier, x, labels = random_case(ArcFace(0.5, straight_through=True))
    x.requires_grad_()
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(classifier.weight).T
    with torch.no_grad():
        target = torch.arange(len(x)), labels
        shift = torch.zeros_like(cos)
        shift[target] = torch.cos(torch.acos(cos[target]) + 0.5) - cos[target]
    expected = torch.nn.functional.cross_entropy(16 * (cos + shift), labels)
    inputs = (x, classifier.weight)
    torch.testing.assert_close(
        torch.autograd.grad(classifier(x, labels), inputs), torch.autograd.grad(expected, inputs)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    """Under autocast, the loss of half-precision embeddings is their float32 loss, to the bit."""
    torch.manual_seed(0)
    classifier = FullClassifier(50, 16)
    x, labels = torch.randn(8, 16).to(dtype), torch.randint(50, (8,))
    expected = classifier(x.float(), labels)
    with torch.autocast("cpu", dtype=dtype):
        loss = classifier(x, labels)
        loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert classifier.weight.grad is not None and classifier.weight.grad.dtype == torch.float32
    assert classifier.bfloat16()(x, labels).dtype == torch.float32  # half-precision centres too


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_zero_embeddings_and_those_on_or_opposite_a_centre_give_no_nan(margin: Margin) -> None:
    """float32 cosines of 1 and -1 are where the exact ArcFace gradient would be infinite."""
    torch.manual_seed(0)
    classifier = FullClassifier(20, 512, margin)
    w = classifier.weight.detach()
    x = torch.cat([w, -w, torch.zeros_like(w)]).requires_grad_()
    loss = classifier(x, torch.arange(20).repeat(3))
    loss.backward()
    assert loss.isfinite()
    for tensor in (x, classifier.weight):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert x.grad is not None and x.grad[40:].norm(dim=1).max() < 2 * classifier.scale


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", 0), ("scale", math.nan), ("margin", 0.4)]
)
def test_refuses_bad_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .* got {value}"):
        FullClassifier(**{"num_classes": 3, name: value})


@pytest.mark.parametrize(
    ("embeddings", "labels", "fault"),
    [
        (torch.ones(2, 4), torch.tensor([0, 5]), "got 5"),
        (torch.ones(2, 4), torch.tensor([-1, 0]), "got -1"),
        (torch.ones(2, 4), torch.tensor([0]), "labels must be"),
        (torch.ones(2, 4), torch.zeros(2), "labels must be"),
        (torch.ones(2, 3), torch.tensor([0, 1]), "embeddings must be"),
        (torch.ones(0, 4), torch.tensor([]).long(), "embeddings must be"),
    ],
)
def test_refuses_bad_batches(embeddings: Tensor, labels: Tensor, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        FullClassifier(5, 4)(embeddings, labels)


def test_interclass_filter_sets_alike_negatives_to_zero() -> None:
    """Their exp(0) stays in the denominator, they get no gradient, and the own class is kept."""
    classifier = FullClassifier(4, 2, Softmax(), scale=3.0, interclass_filter=0.4).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 2.0], [-3.0, 0.0]]))
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    loss = classifier(x, torch.tensor([0]))
    loss.backward()
    exponentials = [math.exp(3 * cos) for cos in (1, 0, 0, -1)]  # 0.8 was above 0.4
    assert loss.item() == pytest.approx(-math.log(exponentials[0] / sum(exponentials)))
    assert classifier.weight.grad is not None
    assert (classifier.weight.grad[1] == 0).all() and classifier.weight.grad[2].any()
