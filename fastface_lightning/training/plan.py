"""What a training run will hold in memory and compute, found on tensors without data."""

from __future__ import annotations

import functools
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..backbones import normalise
from ..classifiers import MomentumClassifier, PartialClassifier, chunk_that_fits
from ..data import FaceDataModule
from ..data.augment import flip_some
from ..files import write_text
from ..optim import BLOCK, RowSparse
from ..report.figures import print_plan
from .build import build_classifier, build_optimizer, instantiate
from .devices import uses_cuda
from .environment import device_name, memory_of
from .module import check_sparse

log = logging.getLogger(__name__)
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Room for what no plan knows, such as gaps between allocations.
HEADROOM = 1.12
# What a CUDA context, cuDNN's workspaces and gaps between allocations take of a GPU, in bytes.
CUDA_RESERVE = 3 * 2**29
# 30 hours for the 4,772 PFLOP of the paper's r100 on WebFace12M, five epochs on one RTX 4090.
PAPER_FLOPS_PER_SECOND = 44.2e12


def plan_run(cfg: DictConfig, folder: Path) -> None:
    """Print what a run will hold and compute, with every classifier, and write ``plan.json``.

    ``cfg.plan`` is true for a plan of this device, or the memory of another GPU in GiB.

    Raises:
        ValueError: ``plan`` is no such number, or the run has no end, or several devices that do
            not train by DDP or whose number is not said.
    """
    if not isinstance(cfg.plan, (int, float)) or not 0 < cfg.plan < float("inf"):
        raise ValueError(f"plan must be true or a GPU's memory in GiB, got {cfg.plan}")
    ranks = _ranks(cfg)
    num_classes, num_images = _data_size(cfg)
    batches = _batches(cfg, num_images // ranks)
    device = torch.device("cuda" if uses_cuda(cfg) or cfg.plan is not True else "cpu")
    capacity = memory_of(device) if cfg.plan is True else int(cfg.plan * 2**30)
    reserve = CUDA_RESERVE if device.type == "cuda" else 0
    batch, size = cfg.data.batch_size, cfg.model.embedding_size
    make_optimizer = build_optimizer(cfg)
    name = HydraConfig.get().runtime.choices["classifier"]
    configs = _classifier_configs(cfg, name)
    parts = {}
    for other, config in configs.items():
        # Of centres that are split a rank has its share, and all images.
        split = ranks if config.get("shard") else 1
        rows, images = math.ceil(num_classes / split), batch * split
        if "chunk" in config and config.chunk is None:
            config.chunk = chunk_that_fits(images, size, device)
        if "compile" in config:
            config.compile = False  # what a compiler saves is unknown
        build = functools.partial(build_classifier, cfg, rows, config)
        try:
            part = plan_classifier(build, make_optimizer, images, size, rows)
            parts[other] = part._replace(images=part.images // split)
        except ValueError as error:  # too few identities, or too large a batch
            if other == name:
                raise
            log.info("classifier=%s cannot be planned: %s", other, error)
    # Where a tensor's numbers lie does not change what is held.
    off = {"channels_last": False, "compile": False, "pretrained": False}
    model = {**cfg.model, **{key: value for key, value in off.items() if key in cfg.model}}
    backbone = plan_backbone(
        lambda: instantiate(model), make_optimizer, parts[name].images, cfg.trainer.precision
    )
    average = backbone.weights if cfg.averaging else 0
    heads = {}
    for other, part in parts.items():
        network, head = combined(backbone, part)
        total = peak(network, head, cfg.trainer.accumulate_grad_batches) + reserve + average
        if ranks > 1:  # DDP keeps buckets, into which each new gradient is copied
            total += network.gradients + (0 if configs[other].get("shard") else head.gradients)
        fits = HEADROOM * total <= capacity
        chunk = configs[other].get("chunk")
        heads[other] = {**head._asdict(), "chunk": chunk, "peak": total, "fits": fits}
    flops = (backbone.flops + heads[name]["flops"]) * batches
    plan = {
        "model": cfg.model.name,
        "num_classes": num_classes,
        "batch_size": batch,
        "ranks": ranks,
        "precision": cfg.trainer.precision,
        "classifier": name,
        "backbone": backbone._asdict(),
        "average": average,
        "heads": heads,
        "device": device_name(device) if cfg.plan is True else "a GPU",
        "capacity": capacity,
        "reserve": reserve,
        "batches": batches,
        "flops": flops,
        "hours": flops / PAPER_FLOPS_PER_SECOND / 3600,
    }
    write_text(folder / "plan.json", json.dumps(plan, indent=2) + "\n")
    print_plan(plan)


def _ranks(cfg: DictConfig) -> int:
    """Processes of a run, each with a device."""
    strategy, devices, nodes = cfg.trainer.strategy, cfg.trainer.devices, cfg.trainer.num_nodes
    alone = strategy in ("auto", "single_device")
    name = strategy if isinstance(strategy, str) else strategy.get("_target_", "")
    if alone and str(devices) == "1" and nodes == 1:
        return 1
    if alone or not (name == "ddp" or name.endswith(".DDPStrategy")) or not _is_count(devices):
        raise ValueError(
            f"a plan is of one device, or with trainer=ddp of trainer.devices=N on each machine, "
            f"got trainer.strategy={name} and trainer.devices={devices}"
        )
    return int(devices) * nodes


def _is_count(devices: Any) -> bool:
    return str(devices).isdecimal() and int(devices) > 0


def _batches(cfg: DictConfig, num_images: int) -> int:
    """Batches of a rank in the whole run, by its epochs or its optimizer steps, whichever end
    first."""
    epochs, steps = cfg.trainer.max_epochs, cfg.trainer.max_steps
    by_epochs = math.inf if epochs in (None, -1) else num_images // cfg.data.batch_size * epochs
    by_steps = math.inf if steps < 0 else steps * cfg.trainer.accumulate_grad_batches
    if min(by_epochs, by_steps) == math.inf:
        raise ValueError(
            f"a plan needs trainer.max_epochs or trainer.max_steps, got {epochs} and {steps}"
        )
    return int(min(by_epochs, by_steps))


def _data_size(cfg: DictConfig) -> tuple[int, int]:
    """Identities and images: of the data where they are, else what the config says of them."""
    if "images_per_identity" in cfg.data:  # synthetic: made only when they are needed
        return cfg.data.num_identities, cfg.data.num_identities * cfg.data.images_per_identity
    if cfg.data.get("num_images") and not Path(cfg.data.root).exists():
        held_out = cfg.data.get("held_out", 0)
        share = 1.0 if isinstance(held_out, str) else 1 - held_out
        return round(share * cfg.data.num_identities), round(share * cfg.data.num_images)
    data: FaceDataModule = instantiate(cfg.data)
    data.setup("fit")
    return data.num_classes, len(data.train_set)


def _classifier_configs(cfg: DictConfig, name: str) -> dict[str, Any]:
    """The run's own classifier first, then the others that its optimizer can train."""
    configs: dict[str, Any] = {name: cfg.classifier}
    optimizer = build_optimizer(cfg)([nn.Parameter(torch.zeros(1))])
    if cfg.classifier.get("rate", 1) < 1:
        check_sparse(optimizer)
    if cfg.classifier.get("chunk"):
        configs[f"{name} classifier.chunk=null"] = OmegaConf.merge(cfg.classifier, {"chunk": None})
    sources = HydraConfig.get().runtime.config_sources
    conf = next(Path(source.path) for source in sources if source.provider == "main")
    for file in sorted((conf / "classifier").glob("*.yaml")):
        other = OmegaConf.load(file)
        other.scale = cfg.classifier.scale
        if isinstance(optimizer, RowSparse) or "rate" not in other:
            configs.setdefault(file.stem, other)
    return configs


class PartPlan(NamedTuple):
    """Bytes that one part of a run holds, and what it computes in a step."""

    weights: int  # parameters and buffers
    gradients: int  # of the parameters; of a sparse one its rows and their numbers
    states: int  # the optimizer's
    activations: int  # left by forward for backward; a classifier's backward follows at once
    work: int  # above all of these, at the part's own peak in forward and backward
    update: int  # above weights, gradients and states, at the peak of the optimizer's step
    flops: int  # floating-point operations of a step, of products and convolutions
    images: int  # that the trained network sees in a step
    encoded: int = 0  # that a momentum encoder sees in a step


# Updates in place that make nothing. They have no rule for fake tensors, and would be run on real
# zeros of all weights, gradients and momenta.
FUSED = ("aten::_fused_sgd_", "aten::_fused_adam_", "aten::_fused_adamw_")


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of all tensors made within the context that are alive: ``live`` now, and
    ``peak`` at most since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in FUSED:
            return None
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._drop, key, size)
        return made

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def plan_backbone(
    build: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    batch_size: int,
    precision: str,
) -> PartPlan:
    """One training step of a backbone on fake tensors: N images 112x112 RGB, at the trainer's
    ``precision``, ``32-true``, ``bf16-mixed`` or ``16-mixed``."""
    if precision not in AUTOCAST:
        raise ValueError(f"a plan's precision must be of {', '.join(AUTOCAST)}, got {precision}")
    dtype = AUTOCAST[precision]
    net = build().train()  # with data: some of timm's constructors look at numbers
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, MemoryMeter() as meter:
        _make_fake(net, mode)
        start = meter.live
        with FlopCounterMode(display=False) as counter:
            images = torch.empty(batch_size, 3, 112, 112, dtype=torch.uint8)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                x = net(normalise(flip_some(images)))
            activations = meter.live - start
            if x.requires_grad:  # not if all of it is frozen
                x.backward(torch.empty_like(x))
        del x, images
        work = meter.peak - start - activations
        return PartPlan(
            weights=_bytes(*net.parameters(), *net.buffers()),
            gradients=_gradient_bytes(net),
            activations=activations,
            work=work,
            flops=counter.get_total_flops(),
            images=batch_size,
            **_optimizer_bytes(make_optimizer, net, meter),
        )


def plan_classifier(
    build: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    batch_size: int,
    embedding_size: int,
    num_classes: int,
) -> PartPlan:
    """One training step of a classifier, by the arguments of :func:`plan_backbone`.

    Of a MomentumClassifier without its momentum encoder: :func:`combined` adds it.
    """
    with FakeTensorMode(), MemoryMeter() as meter:
        head: Any = build().train()
        if isinstance(head, MomentumClassifier):
            return _plan_momentum(head, meter, batch_size)
        embeddings = torch.ones(batch_size, embedding_size, requires_grad=True)
        labels = torch.arange(batch_size) % num_classes
        start = meter.live
        with FlopCounterMode(display=False) as counter:
            head(embeddings, labels).backward()
        gradients = _gradient_bytes(head)
        highest = meter.peak - start
        held = _optimizer_bytes(make_optimizer, head, meter)
        if isinstance(head, PartialClassifier) and head.rate < 1:
            # A fake sparse tensor has no rows. These are there once as the gradient, once more as
            # its sorted copy where batches add up, and two blocks of them are at work.
            row = embedding_size * head.weight.element_size()
            rows = max(math.floor(head.rate * num_classes), min(batch_size, num_classes))
            gradients = rows * (row + 8)
            held["update"] = gradients + 2 * min(rows, BLOCK) * row
        return PartPlan(
            weights=_bytes(*head.parameters(), *head.buffers()),
            gradients=gradients,
            activations=0,
            work=highest - gradients,
            flops=counter.get_total_flops(),
            images=batch_size,
            **held,
        )


class _Embeddings(nn.Module):
    """Stands for a network: an embedding for each image, and how many images there were."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.size, self.images = embedding_size, 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return torch.ones(len(images), self.size, requires_grad=torch.is_grad_enabled())


def _plan_momentum(head: MomentumClassifier, meter: MemoryMeter, batch_size: int) -> PartPlan:
    network = _Embeddings(head.embedding_size)
    head.follow(network)
    batch = head.sample_batch(batch_size)
    start = meter.peak = meter.live  # what building it took is over
    with FlopCounterMode(display=False) as counter:
        head.training_loss(network, batch).backward()
    encoder: Any = head.momentum_encoder
    weights, flops = _bytes(*head.buffers()), counter.get_total_flops()
    work = meter.peak - start
    return PartPlan(weights, 0, 0, 0, work, 0, flops, network.images, encoder.images)


def combined(backbone: PartPlan, classifier: PartPlan) -> tuple[PartPlan, PartPlan]:
    """The backbone for the images that the classifier needs in a step, and the classifier with its
    momentum encoder, whose forward is a third of a step. (That keeps nothing, and is over before
    the backbone's activations are there, which take more.)"""
    share = classifier.images / backbone.images
    sized = {key: int(share * getattr(backbone, key)) for key in ("activations", "work", "flops")}
    encoder = backbone.weights if classifier.encoded else 0
    forward = classifier.encoded * backbone.flops // backbone.images // 3
    return backbone._replace(**sized, images=classifier.images), classifier._replace(
        weights=classifier.weights + encoder, flops=classifier.flops + forward
    )


def peak(backbone: PartPlan, classifier: PartPlan, accumulate: int = 1) -> int:
    """Most bytes a run under Lightning holds at once.

    That is when the classifier works, with the backbone's gradients of the step before (Lightning
    drops them between forward and backward); when the backbone's backward turns activations into
    gradients; or when the optimizer steps. With ``accumulate`` batches whose gradients are added up
    those of both parts are there all the time, and the newest of the classifier a second time.
    """
    both = (backbone, classifier)
    held = sum(part.weights + part.states for part in both)
    gradients = sum(part.gradients for part in both)
    work = max(backbone.gradients + classifier.work, backbone.work)
    if accumulate > 1:
        work = gradients + max(part.work for part in both)
    step = backbone.activations + classifier.gradients + work
    return held + max(step, gradients + max(part.update for part in both))


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors without data in the place of a module's parameters and buffers."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(mode.from_tensor(p.data), p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = mode.from_tensor(buffer)


def _gradient_bytes(module: nn.Module) -> int:
    grads = (p.grad for p in module.parameters())
    return _bytes(*(grad for grad in grads if grad is not None and not grad.is_sparse))


def _optimizer_bytes(
    make_optimizer: MakeOptimizer, module: nn.Module, meter: MemoryMeter
) -> dict[str, int]:
    """``states`` and ``update`` of a module whose gradients are there."""
    optimizer = make_optimizer(module.parameters())
    optimizer.step()  # the first one makes the states
    meter.peak = meter.live
    optimizer.step()
    made = [t for state in optimizer.state.values() for t in state.values()]
    states = _bytes(*(t for t in made if isinstance(t, Tensor)))
    return {"states": states, "update": meter.peak - meter.live}
