"""ChunkedClassifier is FullClassifier to the last digits, and holds less."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from cases import MARGINS, HardNegatives, batch, counterpart, outcome
from devices import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastface_lightning.classifiers import (
    ChunkedClassifier,
    FullClassifier,
    PartialClassifier,
    chunk_that_fits,
)
from fastface_lightning.margins import ArcFace, CosFace, CurricularFace, Margin, Softmax
from fastface_lightning.training.plan import MemoryMeter

margins = pytest.mark.parametrize("margin", MARGINS, ids=repr)


def assert_same(full: FullClassifier, x: Tensor, labels: Tensor, chunk: int) -> None:
    other = counterpart(ChunkedClassifier, full, chunk=chunk)
    expected, got = outcome(full, x, labels), outcome(other, x, labels)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.state_dict(), full.state_dict())  # statistics moved alike


@margins
@settings(deadline=None, max_examples=8)
@given(
    n=st.integers(1, 9),
    num_classes=st.integers(1, 23),
    size=st.integers(2, 7),  # with 1 every cosine is 1 or -1, where margins have their edges
    chunk=st.integers(1, 30),
    scale=st.floats(1, 64),
    interclass_filter=st.none() | st.floats(-1, 1),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_equal_the_full_classifiers(
    margin: Margin,
    n: int,
    num_classes: int,
    size: int,
    chunk: int,
    scale: float,
    interclass_filter: float | None,
    seed: int,
) -> None:
    x, labels = batch(n, num_classes, size, seed)
    own = copy.deepcopy(margin)
    full = FullClassifier(num_classes, size, own, scale, interclass_filter).double()
    assert_same(full, x, labels, chunk)


@margins
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_batch_that_lives_in_one_chunk(margin: Margin, chunk: int) -> None:
    """One identity many times, all other chunks without a label; a zero centre and embedding."""
    x, _ = batch(12, 101, 5)
    full = FullClassifier(101, 5, copy.deepcopy(margin)).double()
    with torch.no_grad():
        full.weight[33] = 0
        x[3] = 0
    assert_same(full, x, torch.full((12,), 50), chunk)
    assert_same(full, x, torch.full((12,), 33), chunk)
    assert_same(full, x, torch.tensor([0] * 6 + [100] * 6), chunk)


def test_float32_is_as_close_to_float64_as_the_full_classifier_is() -> None:
    x, labels = batch(16, 500, 64)
    exact = FullClassifier(500, 64, ArcFace()).double()
    want = outcome(exact, x, labels)
    full = counterpart(FullClassifier, exact).float()
    far = [(a - b).abs().max() for a, b in zip(outcome(full, x, labels), want, strict=True)]
    other = counterpart(ChunkedClassifier, exact, chunk=64).float()
    for got, value, error in zip(outcome(other, x, labels), want, far, strict=True):
        assert (got - value).abs().max() < 3 * error + 1e-6 * value.abs().max()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("margin", [ArcFace(), CurricularFace()], ids=repr)
def test_compiled_it_computes_the_same(margin: Margin) -> None:
    """Chunks of six centres and of one, a zero and a very short centre; also once copied, and in a
    thread of its own, as a GPU's backward is. Nothing is compiled where negatives change."""
    full = FullClassifier(25, 5, margin).double()
    with torch.no_grad():
        full.weight[3], full.weight[20] = 0, 1e-200
    x, labels = batch(9, 25, 5)
    expected = outcome(copy.deepcopy(full), x, labels)
    torch._dynamo.reset()
    counters.clear()
    compiled = counterpart(PartialClassifier, full, chunk=6, rate=1, compile=True)
    for head in (compiled, pickle.loads(pickle.dumps(compiled))):
        got: list[Tensor] = []
        thread = threading.Thread(target=lambda: got.extend(outcome(head, x, labels)))  # noqa: B023
        thread.start()
        thread.join()
        torch.testing.assert_close(tuple(got), expected, rtol=1e-10, atol=1e-10)
    functions = counters["frames"]["ok"]
    assert functions == 0 if isinstance(margin, CurricularFace) else functions >= 3


def test_bfloat16_products_round_the_factors_and_nothing_else() -> None:
    """The twin: centres and embeddings rounded to bfloat16, all the rest in float64."""
    torch.manual_seed(0)
    classifier = ChunkedClassifier(300, 64, Softmax(), chunk=37, products="bfloat16")
    x, labels = torch.randn(16, 64), torch.randint(300, (16,))
    unit = torch.nn.functional.normalize(x)
    norm = classifier.weight.detach().double().norm(dim=1)
    cos = unit.bfloat16().double() @ classifier.weight.detach().bfloat16().double().T / norm
    own = (unit.double() * classifier.weight[labels].double()).sum(1) / norm[labels]
    cos[torch.arange(16), labels] = own.detach()  # the margin sees an exact cosine
    expected = torch.nn.functional.cross_entropy(64 * cos, labels)
    assert classifier(x, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert classifier(x, labels).item() != pytest.approx(
        counterpart(FullClassifier, classifier)(x, labels).item(), rel=1e-6
    )


def test_bfloat16_gradients_point_the_same_way() -> None:
    x, labels = batch(16, 300, 64)
    exact = FullClassifier(300, 64, CurricularFace()).double()
    coarse = counterpart(ChunkedClassifier, exact, chunk=37, products="bfloat16").float()
    got, want = outcome(coarse, x, labels), outcome(exact, x, labels)
    off = [(a.double() - b).norm() / b.norm() for a, b in zip(got, want, strict=True)]
    assert off[0] < 1e-3
    for error in off[1:]:
        assert 1e-5 < error < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    """Forward and backward, inside of autocast or not, to the bit."""
    torch.manual_seed(0)
    classifier = ChunkedClassifier(50, 16, chunk=8)
    x, labels = torch.randn(8, 16).to(dtype), torch.randint(50, (8,))
    expected = outcome(classifier, x.float(), labels)
    with torch.autocast("cpu", dtype=dtype):
        loss, grad, grad_weight = outcome(classifier, x, labels)
    assert loss.dtype == grad_weight.dtype == torch.float32
    assert torch.equal(loss, expected[0]) and torch.equal(grad_weight, expected[2])
    assert torch.equal(grad, expected[1].to(dtype))


def test_half_precision_centres_get_half_precision_gradients() -> None:
    torch.manual_seed(0)
    classifier = ChunkedClassifier(50, 16, chunk=8).bfloat16()
    x, labels = torch.randn(8, 16), torch.arange(8)
    loss, grad, grad_weight = outcome(classifier, x, labels)
    assert (loss.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16)
    expected = outcome(counterpart(FullClassifier, classifier), x, labels)
    torch.testing.assert_close((loss, grad), expected[:2])
    torch.testing.assert_close(grad_weight, expected[2])  # to a rounding of bfloat16


def test_backward_again() -> None:
    classifier = ChunkedClassifier(9, 4, chunk=2)
    x, labels = batch(5, 9, 4)
    loss = classifier(x, labels)
    first = torch.autograd.grad(loss, classifier.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, classifier.weight)[0])


def test_backward_uses_the_statistics_of_its_own_forward() -> None:
    """Another batch may come between: CurricularFace's t has moved on by then."""
    x, labels = batch(8, 9, 4)
    full = FullClassifier(9, 4, CurricularFace(0.1, alpha=0.9)).double()
    other = counterpart(ChunkedClassifier, full, chunk=2)
    for classifier in (full, other):
        loss = classifier(x, labels)
        with torch.no_grad():
            classifier(-x, labels)
        loss.backward()
    torch.testing.assert_close(other.weight.grad, full.weight.grad, rtol=1e-10, atol=1e-10)


def test_either_side_may_be_frozen() -> None:
    x, labels = batch(5, 9, 4)
    classifier = ChunkedClassifier(9, 4, ArcFace(), chunk=2).double()
    _, grad, grad_weight = outcome(classifier, x, labels)
    classifier.weight.grad = None
    classifier(x, labels).backward()  # embeddings without a gradient
    torch.testing.assert_close(classifier.weight.grad, grad_weight)
    classifier.weight.requires_grad_(False)
    x.requires_grad_()
    classifier(x, labels).backward()
    torch.testing.assert_close(x.grad, grad)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made within the context, those of one shape left out."""

    def __init__(self, but: torch.Size) -> None:
        super().__init__()
        self.but, self.elements = but, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.shape != self.but:
                self.elements = max(self.elements, leaf.numel())
        return made


@pytest.mark.parametrize("margin", [CosFace(), CurricularFace(), HardNegatives()], ids=repr)
def test_never_a_batch_by_classes_tensor(margin: Margin) -> None:
    """Nor, beside the centres, a second one of their size: their gradient is the only one."""
    n, num_classes, size = 32, 4000, 64
    x, labels = batch(n, num_classes, size)
    held = {}
    for kind, options in ((FullClassifier, {}), (ChunkedClassifier, {"chunk": 100})):
        classifier = kind(num_classes, size, copy.deepcopy(margin), **options)
        with Largest(but=classifier.weight.shape) as largest, MemoryMeter() as meter:
            outcome(classifier, x.float(), labels)
        held[kind] = largest.elements, meter.peak / classifier.weight.nbytes
    elements, peak = held[ChunkedClassifier]
    assert elements <= max(100 * size, 100 * n, num_classes) and peak < 2.25
    elements, peak = held[FullClassifier]  # which this test would catch
    assert elements >= n * num_classes and peak > 4


@pytest.mark.parametrize(
    ("free", "cache", "chunk"),
    [
        *((2**34, 72 * 2**20, 12288), (2**34, 6 * 2**20, 16384)),
        *((2**28, 72 * 2**20, 2**25 // 6144), (0, 72 * 2**20, 256)),
    ],
)
def test_chunks_follow_a_gpus_cache_and_its_free_memory(
    free: int, cache: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that holds enough classes of 6 KiB, and an eighth of what is free, half of which
    torch's own cache holds here."""
    properties = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free // 2, 2**36))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: free // 2 + 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    assert chunk_that_fits(128, 512, torch.device("cuda")) == chunk


def test_the_chunk_is_chosen_once() -> None:
    """Another chunk would add up in another order: what is free must not change a run."""
    classifier = ChunkedClassifier(5, 4)
    classifier(torch.ones(2, 4), torch.tensor([0, 1]))
    assert classifier.chunk == 2048
    classifier.chunk = 300  # as though a GPU had had less memory then
    classifier(torch.ones(2, 4), torch.tensor([0, 1]))
    assert classifier.chunk == 300


def test_a_very_short_centre_has_a_finite_gradient() -> None:
    classifier = ChunkedClassifier(5, 4, chunk=2)
    with torch.no_grad():
        classifier.weight[1] *= 1e-19
    _, _, grad = outcome(classifier, torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert grad.isfinite().all()


def test_refuses_a_margin_whose_negatives_are_learned() -> None:
    """Their gradient would be lost; a margin that learns at the target alone is served."""

    class Learned(CosFace):
        def __init__(self) -> None:
            super().__init__()
            self.b = torch.nn.Parameter(torch.ones(()))

        def forward(self, cos_y: Tensor, norm: Tensor, label: Tensor) -> Tensor:
            return self.b * cos_y

    class LearnedNegatives(Learned):
        def negatives(self, cos: Tensor, cos_y: Tensor, cos_y_prime: Tensor) -> Tensor:
            return self.b * cos

    with pytest.raises(ValueError, match="negatives are learned needs FullClassifier"):
        ChunkedClassifier(5, 4, LearnedNegatives())
    full = FullClassifier(5, 4, Learned()).double()
    other = counterpart(ChunkedClassifier, full, chunk=2)
    x, labels = batch(3, 5, 4)
    outcome(full, x, labels), outcome(other, x, labels)
    torch.testing.assert_close(other.margin.b.grad, full.margin.b.grad)


@pytest.mark.parametrize(
    ("name", "value"), [("chunk", 0), ("chunk", -5), ("products", "float16"), ("compile", "no")]
)
def test_refuses_bad_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .* got {value!r}"):
        ChunkedClassifier(3, **{name: value})


@pytest.mark.parametrize(
    ("told", "expected"), [(None, "tf32"), ("highest", "ieee"), ("high", "tf32")]
)
def test_products_follow_a_gpus_tensor_cores(told: str | None, expected: str) -> None:
    """In the class layer alone, and unless torch was told how to; of tensors without data."""
    matmul = torch.backends.cuda.matmul
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.append(matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        if told is not None:
            torch.set_float32_matmul_precision(told)
        left = matmul.fp32_precision
        with FakeTensorMode(), torch.device("cuda"), Watch():
            head = ChunkedClassifier(50, 8, chunk=20)
            head(torch.empty(6, 8), torch.zeros(6, dtype=torch.int64))
        assert seen == [expected] * 3 and matmul.fp32_precision == left
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
