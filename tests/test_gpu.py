"""On a GPU every part of a training step does what it does on the CPU: ``pytest -m gpu``.

Each test runs on the CPU as well, so that what fails on a GPU is the GPU's.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import MARGINS
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from programs import SMALL, Run
from ranks import on_ranks
from scripted import LR, LearningRates, Scripted, Tape, batches, by_hand, quiet_trainer, stairs
from torch import Tensor, nn
from torch.optim import Optimizer

from fastface_lightning import FastFace, FastFaceCallback, replay
from fastface_lightning.backbones import build_backbone
from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    Classifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
    PartialClassifier,
)
from fastface_lightning.classifiers.chunked import _product, _rounded
from fastface_lightning.data import EpochSampler, FaceLoader, SyntheticFaces
from fastface_lightning.margins import ArcFace, Margin
from fastface_lightning.optim import SGD, AdamW

CLASSES, SIZE, IMAGES = 40, 16, 24
KINDS: dict[str, Callable[..., Classifier]] = {
    "full": FullClassifier,
    "chunked": functools.partial(ChunkedClassifier, chunk=16),
    "partial": functools.partial(PartialClassifier, chunk=16, rate=0.5),
    "pool": functools.partial(DynamicClassPool, pool_size=20),
    "attention": functools.partial(AttentionClassifier, queue_size=20),
}
HALVES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference of two tensors by that of the one expected."""
    difference = found.detach().cpu().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


# Classifiers -------------------------------------------------------------------------------------


def loss_of(head: Classifier, x: Tensor) -> Tensor:
    """The training loss of embeddings (IMAGES, SIZE), the network's for every image of a step."""
    if isinstance(head, MomentumClassifier):  # its labels lie on the host
        labels = {name: labels for name, (_, labels) in head.sample_batch(8).items()}
        parts = x.split([len(part) for part in labels.values()])
        given = zip(parts, labels.values(), strict=True)
        return head.training_loss(nn.Identity(), dict(zip(labels, given, strict=True)))
    generator = torch.Generator().manual_seed(2)
    return head(x, torch.randint(CLASSES, (IMAGES,), generator=generator).to(x.device))


@pytest.fixture
def same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ElasticFace and PartialClassifier sample is sampled on the CPU: devices differ."""
    sample = PartialClassifier.sample

    def randn_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)

    def sample_on_cpu(head: PartialClassifier, labels: Tensor) -> Tensor:
        torch.manual_seed(4)
        return sample(head, labels.cpu()).to(labels.device)

    monkeypatch.setattr(torch, "randn_like", randn_like)
    monkeypatch.setattr(PartialClassifier, "sample", sample_on_cpu)


def assert_like_its_twin(
    head: Classifier, device: torch.device, precision: str, loss_error: float, error: float
) -> None:
    """Loss, gradients and buffers against the same classifier in float64 on the CPU.

    Args:
        loss_error: largest difference of the losses.
        error: largest norm of a gradient's difference by that of the gradient, without what the
            embeddings' own dtype rounds away of theirs.
    """
    dtype = HALVES[precision] or torch.float32
    torch.manual_seed(1)
    x = (5 * torch.randn(IMAGES, SIZE)).to(device, dtype).requires_grad_()
    twin, twin_x = copy.deepcopy(head).double(), x.detach().cpu().double().requires_grad_()
    head.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(head, x)
    expected = loss_of(twin, twin_x)
    assert loss.dtype == torch.float32 and loss.device.type == device.type
    for value in (loss, expected):
        value.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=0, atol=loss_error)
    assert x.grad is not None and twin_x.grad is not None
    assert relative(x.grad, twin_x.grad) < error + torch.finfo(dtype).eps
    for p, q in zip(head.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert p.grad.is_sparse == q.grad.is_sparse == (type(head) is PartialClassifier)
        assert relative(p.grad.to_dense(), q.grad.to_dense()) < error
    for (name, buffer), other in zip(head.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(
            buffer.cpu().double(), other.double(), rtol=1e-5, atol=1e-5 + error, msg=name
        )
    if isinstance(head, DynamicClassPool):
        assert torch.equal(head.get_extra_state(), twin.get_extra_state())


@pytest.mark.usefixtures("same_random_numbers")
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier(kind: str, margin: Margin, precision: str, device: torch.device) -> None:
    """It computes in float32 whatever autocast says, so a cosine errs by 1e-7, a logit by 64 times
    that, and the gradient by as much of itself."""
    torch.manual_seed(0)
    head = KINDS[kind](CLASSES, SIZE, copy.deepcopy(margin), 64.0)
    assert_like_its_twin(head, device, precision, loss_error=1e-3, error=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("precision", HALVES)
def test_a_compiled_classifier(precision: str) -> None:
    torch.manual_seed(0)
    head = ChunkedClassifier(CLASSES, SIZE, ArcFace(), 64.0, chunk=16, compile=True)
    assert_like_its_twin(head, torch.device("cuda"), precision, loss_error=1e-3, error=1e-4)


@pytest.mark.usefixtures("same_random_numbers")
@pytest.mark.parametrize("kind", [*KINDS, "bfloat16 products"])
def test_products_of_rounded_factors(kind: str, device: torch.device) -> None:
    """bfloat16 rounds a factor by 2^-9 of it, TF32 by 2^-11. The gradient errs by about as much of
    itself, 0.003 in bfloat16 on the CPU."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    settings = {} if kind in KINDS else {"products": "bfloat16"}
    head = KINDS.get(kind, KINDS["chunked"])(CLASSES, SIZE, ArcFace(), 16.0, **settings)
    assert_like_its_twin(head, device, "32-true", loss_error=0.01, error=0.02)


@pytest.mark.parametrize("into", [False, True])
def test_a_product_of_bfloat16_is_summed_in_float32(into: bool, device: torch.device) -> None:
    """Of factors as the classifier has them: a transposed one, and a slice to write to."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512), torch.randn(48, 512)
    expected = a.bfloat16().double() @ b.bfloat16().double().T
    out = torch.empty(100, 48, device=device)[20:84] if into else None
    factors = (_rounded(factor.to(device), True) for factor in (a, b.T))
    product = _product(*factors, out)
    assert product.dtype == torch.float32 and (out is None or product is out)
    torch.testing.assert_close(product.cpu().double(), expected, rtol=1e-5, atol=1e-4)


def test_a_sample_of_classes(device: torch.device) -> None:
    """By the generator of the device, with every class of the batch, ascending."""
    head = PartialClassifier(1000, 4, rate=0.1).to(device)
    labels = torch.randint(1000, (20,), device=device)
    torch.manual_seed(0)
    first, second = head.sample(labels), head.sample(labels)
    torch.manual_seed(0)
    assert torch.equal(head.sample(labels), first) and not torch.equal(first, second)
    assert len(first) == 100 and (first.diff() > 0).all()
    assert torch.isin(labels, first).all()


# Optimizers --------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "sgd": functools.partial(SGD, momentum=0.9, weight_decay=0.05),
    "nesterov": functools.partial(SGD, momentum=0.9, nesterov=True),
    "adamw": functools.partial(AdamW, weight_decay=0.05),
}


@pytest.mark.parametrize("rate", ["a float", "a tensor"])
@pytest.mark.parametrize("rows", [None, 3, 30], ids=["dense", "sparse", "repeated rows"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer(name: str, rows: int | None, rate: str, device: torch.device) -> None:
    """Six steps under a loss scaler, of which it leaves out the one that overflows."""
    torch.manual_seed(0)
    q = nn.Parameter(torch.randn(20, 4, dtype=torch.float64))
    p = nn.Parameter(q.detach().to(device, torch.float32))
    lr = torch.tensor(0.1, device=device) if rate == "a tensor" else 0.1
    ours, twins = OPTIMIZERS[name]([p], lr=lr), OPTIMIZERS[name]([q], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))  # makes its scale
    for step in range(6):
        values = torch.randn(20 if rows is None else rows, 4)
        index = torch.randint(20, (1, len(values))) if rows == 30 else torch.randperm(20)[None]
        index = index[:, : len(values)]
        if step == 3:
            values.fill_(torch.inf)
        q.grad = torch.sparse_coo_tensor(index, values.double(), q.shape, check_invariants=False)
        q.grad = q.grad.to_dense() if rows is None else q.grad
        p.grad = (scaler.get_scale() * q.grad).to(device, torch.float32)
        scaler.step(ours)
        scaler.update()
        if step != 3:
            twins.step()
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() == 512.0


# The callback ------------------------------------------------------------------------------------

STEPS = 200
SCHEDULE = FastFace(ema_window=4, haar_window=4, threshold=0.02, patience=8, arm_after=0)
LOSSES = [stairs(step) for step in range(STEPS)]


def fit(root: Path, device: torch.device, module: Scripted, *callbacks: Any, **more: Any) -> None:
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    trainer = quiet_trainer(root, callbacks, accelerator=accelerator, max_epochs=20, **more)
    trainer.fit(module, batches(10))


@pytest.mark.parametrize("rate", ["a float", "a tensor", "a tensor on the host"])
def test_the_callback_reads_losses_in_blocks(
    rate: str, tmp_path: Path, device: torch.device
) -> None:
    """Of 32 by itself on a GPU; it decides as a replay does, and the rate follows a block later."""

    def optimizer(module: LightningModule) -> Optimizer:
        tensor = torch.tensor(LR, device="cpu" if "host" in rate else module.device)
        return SGD(module.parameters(), lr=LR if rate == "a float" else tensor)

    callback = FastFaceCallback(SCHEDULE, read_every=32 if device.type == "cpu" else None)
    rates = LearningRates()
    fit(tmp_path, device, Scripted(optimizers=optimizer), callback, rates)
    assert callback.changes == replay(LOSSES, SCHEDULE, total_steps=STEPS, lr=LR)
    assert len(callback.changes) >= 6
    expected = by_hand(LOSSES, SCHEDULE.bind(STEPS), 32)
    assert rates.first_group == {step: expected[step] for step in range(STEPS)}


class Overflowing(Scripted):
    """Its gradient is infinite in some optimizer steps, its loss never."""

    steps = (2, 3, 40)

    def on_after_backward(self) -> None:
        if self.trainer.global_step in self.steps:
            assert self.first.grad is not None
            self.first.grad.fill_(torch.inf)


@pytest.mark.parametrize("kind", ["ours", "torch's", "torch's fused"])
def test_a_step_that_the_scaler_skips_counts_for_nothing(
    kind: str, tmp_path: Path, device: torch.device
) -> None:
    made = SGD if kind == "ours" else functools.partial(torch.optim.SGD, fused="fused" in kind)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=1000)
    precision = MixedPrecision("16-mixed", device.type, scaler)
    module = Overflowing(optimizers=lambda module: made(module.parameters(), lr=LR))
    callback = FastFaceCallback(Tape(), read_every=32)
    fit(tmp_path, device, module, callback, plugins=[precision])
    seen = [stairs(step) for step in range(STEPS) if step not in Overflowing.steps]
    assert callback.state is not None and list(callback.state.memory) == seen
    assert scaler.get_scale() == 1.0
    assert module.first.isfinite().all()


# Networks and data -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [{}, {"channels_last": True}, {"grad_checkpointing": True}, {"compile": True}],
    ids=str,
)
def test_a_network(option: dict[str, bool], device: torch.device) -> None:
    """A training step in float32 against float64. Rounding moves the gradients of a fresh network
    with batch norms by some thousandths of themselves."""
    if option.get("compile") and device.type == "cpu":
        pytest.skip("tests/backbones/test_switches.py has it")
    torch.manual_seed(0)
    model = build_backbone("iresnet_tiny", SIZE, **option)
    twin = build_backbone("iresnet_tiny", SIZE).double()
    twin.load_state_dict(model.state_dict())
    images = torch.rand(16, 3, 112, 112) * 2 - 1
    towards = torch.randn(16, SIZE)
    model.to(device)
    for network, x, y in ((model, images.to(device), towards.to(device)),
                          (twin, images.double(), towards.double())):  # fmt: skip
        (network(x) * y).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is not None and q.grad.norm() > 1e-6:  # a bias before a batch norm has none
            assert p.grad is not None and relative(p.grad, q.grad) < 0.02, name
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(
            buffer.cpu().double(), other.double(), rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader(num_workers: int, device: torch.device) -> None:
    """Its images are pinned where there is a GPU, in the decoder's order of memory, and arrive."""
    faces = SyntheticFaces(4, 4)
    loader = FaceLoader(faces, 8, EpochSampler(faces, 0, 1, 0), num_workers)
    count = 0
    for (images, labels), start in zip(loader, (0, 8), strict=True):
        assert images.is_pinned() == labels.is_pinned() == torch.cuda.is_available()
        assert images.permute(0, 2, 3, 1).is_contiguous()
        arrived = images.to(device, non_blocking=True)
        places = list(EpochSampler(faces, 0, 1, 0))[start : start + 8]
        for image, label, place in zip(arrived, labels, places, strict=True):
            expected, identity = faces[place]
            assert torch.equal(image.cpu(), expected) and label == identity
            count += 1
    assert count == 16


# Whole runs --------------------------------------------------------------------------------------

RUNS = {
    "by default": [],
    "float16 and its scaler": ["trainer.precision=16-mixed"],
    "float32": ["trainer.precision=32-true", "model.channels_last=false"],
    "recomputed": ["model.grad_checkpointing=true", "schedule=fastface", "averaging=none"],
    "partial": ["classifier=partial", "classifier.rate=0.5", "classifier.products=bfloat16"],
    "partial, adamw": ["classifier=partial", "classifier.rate=0.5", "optimizer=adamw"],
    "accumulated": [
        "classifier=partial",
        "classifier.rate=0.5",
        "trainer.accumulate_grad_batches=2",
    ],
    "pool": ["classifier=dynamic_pool", "averaging=ema"],
    "attention": ["classifier=attfc", "classifier.queue_size=0.5", "margin=elasticface"],
    "augmented": ["augment.crop=0.5", "augment.low_resolution=0.5", "augment.rand_augment=2"],
    "compiled": ["model.compile=true", "classifier=chunked"],
}


@pytest.mark.program
@pytest.mark.parametrize("case", RUNS)
def test_a_run(case: str, run: Run, device: torch.device) -> None:
    """train.py, its ``auto`` settings being the device's, ends finite and verified."""
    if device.type == "cpu" and case != "partial, adamw":
        pytest.skip("tests/training has it")
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    small = [*SMALL, "data.num_identities=16", "trainer.max_epochs=2"]
    ended = run(*small, f"trainer.accelerator={accelerator}", *RUNS[case])
    assert ended.code == 0, ended.err
    results = json.loads((ended.folder / "results.json").read_text())
    assert 0 < results["final_loss"] < 100 and results["peak_memory_bytes"] > 1e6
    assert 0 <= results["verification"]["synthetic"]["accuracy"] <= 1


# Two GPUs ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices")
@pytest.mark.parametrize("kind", ["pool", "attention"])
def test_two_gpus_write_the_same(kind: str, tmp_path: Path) -> None:
    """Features and labels of both ranks, gathered by NCCL."""

    def check(rank: int) -> None:
        torch.cuda.set_device(rank)
        torch.manual_seed(rank)
        device = torch.device("cuda", rank)
        head = KINDS[kind](CLASSES, SIZE).to(device)
        if kind == "pool":
            head = DynamicClassPool(CLASSES, SIZE, pool_size=CLASSES).to(device)
        for _ in range(3):
            x = torch.randn(IMAGES, SIZE, device=device, requires_grad=True)
            loss_of(head, x).backward()
            assert x.grad is not None and x.grad.isfinite().all()
        queue: Any = head.queue
        both = [torch.empty_like(queue) for _ in range(2)]
        dist.all_gather(both, queue)
        assert torch.equal(*both)

    on_ranks(check, tmp_path, backend="nccl")
