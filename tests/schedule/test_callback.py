"""FastFaceCallback in real fits whose loss is a script: steps, rates, refusals, resume, waits."""

import csv
import math
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scripted import (
    LR,
    Endless,
    LearningRates,
    Scripted,
    StopAt,
    Tape,
    batches,
    by_hand,
    one_sgd,
    quiet_trainer,
    stairs,
)
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from watching import Killed, RaiseAt

from fastface_lightning import MHLR, FastFace, FastFaceCallback, replay

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]
STEPS = 200
FASTFACE = FastFace(ema_window=4, haar_window=4, threshold=0.02, patience=8, arm_after=0)
WINDOWED = MHLR(haar_window=6, threshold=0.03, patience=8, arm_after=0, restart_after=3)
LOSSES = [stairs(step) for step in range(STEPS)]


def fit(
    root: Path,
    *callbacks: Callback,
    module: Scripted | None = None,
    loader: DataLoader[Tensor] | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    """One quiet fit on 10 batches an epoch; on the stairs unless another module is given."""
    trainer = quiet_trainer(root, callbacks, **settings)
    loader = batches(10) if loader is None else loader
    trainer.fit(module or Scripted(), loader, ckpt_path=ckpt_path)
    return trainer


def losses_seen(callback: FastFaceCallback) -> list[float]:
    """Every loss that a callback with a Tape was given."""
    assert callback.state is not None
    return list(callback.state.memory)


# The length of the run ---------------------------------------------------------------------------


def test_works_without_an_argument(tmp_path: Path) -> None:
    """It finds length, base rate and loss; on a flat loss the rate falls, as a replay says."""
    callback = FastFaceCallback()
    trainer = fit(tmp_path, callback, module=Scripted(lambda *_: 4.0), max_epochs=40)
    assert callback.changes == replay([4.0] * 400, FastFace(), total_steps=400, lr=LR)
    assert callback.changes
    assert trainer.optimizers[0].param_groups[0]["lr"] == callback.changes[-1].lr


@pytest.mark.parametrize(
    ("settings", "scheduling", "steps"),
    [
        ({"max_steps": 12, "max_epochs": -1}, None, 12),
        ({"max_epochs": 3, "max_steps": 25}, None, 25),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, None, 9),
        ({"max_epochs": 3}, {0: 4, 2: 1}, 3 + 3 + 10),
        ({"max_epochs": 3, "max_steps": 8}, {0: 4, 2: 1}, 8),
    ],
)
def test_total_steps_are_those_the_trainer_takes(
    tmp_path: Path, settings: dict[str, int], scheduling: dict[int, int] | None, steps: int
) -> None:
    """Known beforehand, from every way to say them, and equal to the steps then really taken."""
    callback = FastFaceCallback(Tape())
    accumulation = [GradientAccumulationScheduler(scheduling)] if scheduling else []
    trainer = fit(tmp_path, callback, *accumulation, **settings)
    assert callback.state_dict()["bound"]["total_steps"] == steps
    assert trainer.global_step == callback.state.step == steps


@pytest.mark.parametrize("scheduling", [None, {0: 4, 2: 1}])
@pytest.mark.parametrize("endless", ["epochs", "data"])
def test_run_without_an_end_needs_total_steps(
    tmp_path: Path, endless: str, scheduling: dict[int, int] | None
) -> None:
    settings = {"max_epochs": -1 if endless == "epochs" else 1}
    loader: Any = batches(10) if endless == "epochs" else DataLoader(Endless())
    accumulation = [GradientAccumulationScheduler(scheduling)] if scheduling else []
    with pytest.raises(MisconfigurationException, match="total_steps"):
        fit(tmp_path, FastFaceCallback(), *accumulation, loader=loader, **settings)
    callback = FastFaceCallback(Tape(), total_steps=1000)
    fit(tmp_path, callback, *accumulation, StopAt(3), loader=loader, **settings)
    assert callback.state_dict()["bound"]["total_steps"] == 1000
    assert callback.state.step == 3


# One schedule step an optimizer step -------------------------------------------------------------


def test_accumulated_loss_is_the_mean_of_its_micro_batches(tmp_path: Path) -> None:
    """Undivided again; the last step of an epoch, with 2 micro-batches, is divided by 2."""
    callback = FastFaceCallback(Tape())
    fit(tmp_path, callback, GradientAccumulationScheduler({0: 4, 1: 2}), max_epochs=2)
    micros = enumerate([4, 4, 2, 2, 2, 2, 2, 2])
    assert losses_seen(callback) == [sum(stairs(s, k) for k in range(n)) / n for s, n in micros]


def test_skipped_micro_batches_do_not_count(tmp_path: Path) -> None:
    """training_step may return None: first, last, or in all micro-batches of an optimizer step."""
    script = {
        0: [None, 1.0, 2.0, 6.0],
        1: [1.0, 3.0, None, None],
        2: [None, None, None, None],
        3: [5.0, None, 7.0, 9.0],
    }
    callback = FastFaceCallback(Tape())
    module = Scripted(lambda step, micro: script[step][micro])
    trainer = fit(tmp_path, callback, module=module, max_steps=4, accumulate_grad_batches=4,
                  loader=batches(16))  # fmt: skip
    assert losses_seen(callback) == [3.0, 2.0, 7.0]
    assert trainer.global_step == 4


def test_loss_key_names_another_loss(tmp_path: Path) -> None:
    """Under automatic optimization it is not divided by the accumulation, so not multiplied."""

    class TwoLosses(Scripted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.scripted_loss(), "distillation": float(batch_idx)}

    callback = FastFaceCallback(Tape(), loss_key="distillation")
    fit(tmp_path, callback, module=TwoLosses(), max_epochs=1, accumulate_grad_batches=4)
    assert losses_seen(callback) == [1.5, 5.5, 8.5]


# The learning rates ------------------------------------------------------------------------------


def test_every_group_keeps_its_own_base_rate(tmp_path: Path) -> None:
    """A tensor is filled in place: a capturable optimizer's graph reads the one it has."""
    rate = torch.tensor(10 * LR)

    def groups(module: LightningModule) -> Optimizer:
        return SGD([{"params": [module.first]}, {"params": [module.second], "lr": rate}], lr=LR)

    rates = LearningRates()
    module = Scripted(optimizers=groups)
    fit(tmp_path, FastFaceCallback(Tape(halve_after=(1, 3))), rates, module=module, max_steps=6)
    scales = [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert list(rates.at.values()) == [[LR * scale, 10 * LR * scale] for scale in scales]
    assert rate == 10 * LR / 4


def test_warm_up_grows_linearly_from_the_very_first_step(tmp_path: Path) -> None:
    rates = LearningRates()
    fit(tmp_path, FastFaceCallback(Tape(warmup_steps=4)), rates, max_steps=6)
    assert list(rates.first_group.values()) == [LR / 4, LR / 2, LR * 3 / 4, LR, LR, LR]


@pytest.mark.parametrize(
    ("schedule", "read_every"), [(FASTFACE, 1), (FASTFACE, 32), (WINDOWED, 8)], ids=repr
)
def test_blocks_change_no_decision_and_delay_by_less_than_a_block(
    tmp_path: Path, schedule: FastFace | MHLR, read_every: int
) -> None:
    callback, rates = FastFaceCallback(schedule, read_every=read_every), LearningRates()
    fit(tmp_path, callback, rates, max_epochs=20)
    assert callback.changes == replay(LOSSES, schedule, total_steps=STEPS, lr=LR)
    assert len(callback.changes) >= 6
    bound = schedule.bind(STEPS)
    expected = by_hand(LOSSES, bound, read_every)
    assert rates.first_group == {step: expected[step] for step in range(STEPS)}
    at_once = by_hand(LOSSES, bound)
    for step, rate in rates.first_group.items():
        assert rate in [at_once[max(0, step - late)] for late in range(read_every)]


@pytest.mark.parametrize("stopped", [False, True], ids=["planned end", "stopped"])
def test_what_the_last_block_decides_is_applied_at_the_planned_end_alone(
    tmp_path: Path, stopped: bool
) -> None:
    """A run that was stopped may go on, and must then decay at the step it would have."""
    settings = {"max_steps": 50 if stopped else 10, "max_epochs": -1}
    callback = FastFaceCallback(Tape(halve_after=(5,)), read_every=32)
    trainer = fit(tmp_path, callback, *([StopAt(10)] if stopped else []), **settings)
    assert [made.step for made in callback.changes] == [5] and callback.state.scale == 0.5
    assert callback.get_last_lr() == [LR if stopped else LR / 2]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, rates = FastFaceCallback(callback.schedule, read_every=32), LearningRates()
    fit(tmp_path, resumed, rates, ckpt_path=tmp_path / "a.ckpt", max_steps=50, max_epochs=-1)
    assert rates.first_group == {
        step: LR / 2 if step >= 32 or not stopped else LR for step in range(10, 50)
    }


def test_no_decay_goes_below_min_lr_and_none_counts_where_all_stand_there(tmp_path: Path) -> None:
    """A group that is frozen, or slower already, keeps its rate; a restart still raises it."""

    def groups(module: LightningModule) -> Optimizer:
        slow = torch.nn.Parameter(torch.ones(1))
        rates = [(module.first, LR), (module.second, torch.tensor(0.01)), (slow, 0.0)]
        return SGD([{"params": [p], "lr": lr} for p, lr in rates], lr=LR)

    callback = FastFaceCallback(Tape(halve_after=(1, 3, 5, 7)), min_lr=LR / 4 - 0.01)
    rates = LearningRates()
    fit(tmp_path, callback, rates, module=Scripted(optimizers=groups), max_steps=10)
    lowest = LR / 4 - 0.01
    steps = [LR] * 2 + [LR / 2] * 2 + [LR / 4] * 2 + [lowest] * 4
    assert [lr[0] for lr in rates.at.values()] == pytest.approx(steps)
    assert {(round(lr[1], 6), lr[2]) for lr in rates.at.values()} == {(0.01, 0.0)}
    assert [made.lr for made in callback.changes] == pytest.approx([LR / 2, LR / 4, lowest])
    assert callback.changes[-1].factor == pytest.approx(lowest / (LR / 4))

    plateau = FastFaceCallback(FastFace(threshold=99.0, patience=1, max_decays=9), min_lr=LR / 4)
    fit(tmp_path, plateau, max_steps=60)
    assert len(plateau.changes) == plateau.state.decays == 2 and plateau.state.scale == 0.25


# Refusals ----------------------------------------------------------------------------------------


def scheduled(module: LightningModule) -> Any:
    optimizer = SGD(module.parameters(), lr=LR)
    return [optimizer], [MultiStepLR(optimizer, [3])]


@pytest.mark.parametrize(
    ("optimizers", "others", "named"),
    [
        (scheduled, [], "MultiStepLR"),
        (one_sgd, [StochasticWeightAveraging(swa_lrs=0.01)], "StochasticWeightAveraging"),
        (lambda module: None, [], "optimizer"),
    ],
    ids=["scheduler", "averaging", "no optimizer"],
)
def test_what_it_cannot_serve_is_refused_by_name(
    tmp_path: Path, optimizers: Any, others: list[Callback], named: str
) -> None:
    with pytest.raises(MisconfigurationException, match=named):
        fit(tmp_path, FastFaceCallback(), *others, module=Scripted(optimizers=optimizers),
            max_epochs=2)  # fmt: skip


# Manual optimization -----------------------------------------------------------------------------


class Manual(Scripted):
    """Steps each of its optimizers ``every`` so many batches; its loss is the batch's number."""

    def __init__(self, every: tuple[int, ...] = (1,)) -> None:
        super().__init__(optimizers=self.one_each)
        self.automatic_optimization = False
        self.every = every

    def one_each(self, module: LightningModule) -> list[Optimizer]:
        parameters = [self.first, self.second]
        return [SGD([parameters[k]], lr=LR * 4**k) for k in range(len(self.every))]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.first.sum() * 0 + self.second.sum() * 0 + float(batch_idx)
        self.manual_backward(loss)
        stepped: Any = self.optimizers()
        stepped = stepped if isinstance(stepped, list) else [stepped]
        for optimizer, every in zip(stepped, self.every, strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
        return {"total": loss}


@pytest.mark.parametrize("every", [(1, 1), (5,)], ids=["two optimizers", "accumulating"])
def test_manual_optimization_takes_the_loss_named(tmp_path: Path, every: tuple[int, ...]) -> None:
    """Undivided; one schedule step a batch, though global_step moves by the optimizers' number."""
    callback = FastFaceCallback(Tape(halve_after=(1,)), loss_key="total")
    trainer = fit(tmp_path, callback, module=Manual(every), max_epochs=1)
    assert losses_seen(callback) == ([2.0, 7.0] if every == (5,) else [float(k) for k in range(10)])
    rates = [o.param_groups[0]["lr"] for o in trainer.optimizers]
    assert rates == [LR / 2 * 4**k for k in range(len(every))]


@pytest.mark.parametrize("every", [(1, 2), (3,)])
def test_uneven_manual_steps_are_read_in_blocks_and_logged(
    tmp_path: Path, every: tuple[int, ...]
) -> None:
    """global_step may jump over a block's end or a multiple of log_every_n_steps."""
    schedule, loader = Tape(halve_after=tuple(range(60))), batches(60)  # counts by halving
    callback = FastFaceCallback(schedule, loss_key="total")
    logger = CSVLogger(tmp_path)
    fit(tmp_path, callback, module=Manual(every), max_epochs=1, loader=loader, logger=logger,
        log_every_n_steps=10)  # fmt: skip
    logged = {batch: 0.5 ** (batch // min(every)) for batch in range(10, 61, 10)}
    assert metrics(logger)["fastface/lr_scale"] == {
        batch - 1: scale for batch, scale in logged.items()
    }

    late, rates = FastFaceCallback(schedule, loss_key="total", read_every=8), LearningRates()
    fit(tmp_path, late, rates, module=Manual(every), max_epochs=1, loader=loader)
    assert late.state == callback.state
    for taken, rate in enumerate(rates.first_group.values()):
        assert 0 <= taken - math.log2(LR / rate) < 8


@pytest.mark.parametrize(("loss_key", "got"), [(None, "None"), ("loss", "total")])
def test_manual_optimization_needs_the_key_of_a_loss(
    tmp_path: Path, loss_key: str | None, got: str
) -> None:
    with pytest.raises(MisconfigurationException, match=f"loss_key.*, got {got}$"):
        fit(tmp_path, FastFaceCallback(loss_key=loss_key), module=Manual(), max_epochs=1)


# Mixed precision ---------------------------------------------------------------------------------

OVERFLOWS = (2, 3, 7)


class Overflowing(Scripted):
    """Its gradients are infinite in some optimizer steps, its loss never."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step in OVERFLOWS:
            self.first.grad.fill_(math.inf)


def test_step_skipped_by_the_scaler_does_not_count(tmp_path: Path) -> None:
    """Lightning counts it, the GradScaler did not take it: the schedule neither."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    callback = FastFaceCallback(Tape(), read_every=4)
    trainer = fit(tmp_path, callback, module=Overflowing(), max_epochs=1,
                  plugins=[MixedPrecision("16-mixed", "cpu", scaler)])  # fmt: skip
    assert trainer.global_step == 10
    assert scaler.get_scale() == 8.0 / 2 ** len(OVERFLOWS)
    assert losses_seen(callback) == [stairs(k) for k in range(10) if k not in OVERFLOWS]


class FusedLike(SGD):
    """step() is always called and finds out on the device, as fused optimizers do."""

    taken = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.found_inf = torch.tensor(float(self.taken in OVERFLOWS))
        self.taken += 1
        return closure() if closure else None


def test_step_a_fused_optimizer_skips_does_not_count(tmp_path: Path) -> None:
    """Its found_inf comes to the host together with the losses."""
    callback = FastFaceCallback(Tape(), read_every=4)
    reads = HostReads(callback)
    module = Scripted(optimizers=lambda module: FusedLike(module.parameters(), lr=LR))
    fit(tmp_path, callback, module=module, max_epochs=1)
    assert losses_seen(callback) == [stairs(k) for k in range(10) if k not in OVERFLOWS]
    assert reads.count == 2  # the last steps are read after them


class JoinsLater(Callback):
    """Adds a parameter group in the middle of the run, as fine-tuning callbacks do."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 4:
            joined = torch.nn.Parameter(torch.ones(1))
            trainer.optimizers[0].add_param_group({"params": [joined], "lr": 0.5})


def test_a_group_that_joins_the_run_keeps_its_rate_and_follows_from_there(tmp_path: Path) -> None:
    callback = FastFaceCallback(FASTFACE)
    trainer = fit(tmp_path, callback, JoinsLater(), max_steps=60)
    assert [made.step for made in callback.changes] == [34, 43]  # one before epoch 4, one after
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [LR / 4, 0.25]


# What is not training ----------------------------------------------------------------------------


class Evaluated(Scripted):
    """Has every other step too."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("metric", float(batch_idx))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch


def test_whatever_is_not_training_leaves_the_schedule_alone(tmp_path: Path) -> None:
    callback, rates = FastFaceCallback(Tape(halve_after=(4,))), LearningRates()
    trainer = quiet_trainer(
        tmp_path, [callback, rates], max_epochs=2, num_sanity_val_steps=2, val_check_interval=2
    )
    module = Evaluated()
    trainer.fit(module, batches(10), batches(3))
    assert losses_seen(callback) == LOSSES[:20]
    assert list(rates.first_group.values()) == [LR] * 5 + [LR / 2] * 15
    optimizer, state = trainer.optimizers[0], callback.state_dict()
    trainer.validate(module, batches(3), verbose=False)
    trainer.test(module, batches(3), verbose=False)
    trainer.predict(module, batches(3))
    assert callback.state_dict() == state
    assert optimizer.param_groups[0]["lr"] == LR / 2


def test_fast_dev_run_leaves_state_and_rate_alone(tmp_path: Path) -> None:
    """Also one that starts from a checkpoint."""
    callback, rates = FastFaceCallback(Tape(warmup_steps=9)), LearningRates()
    fit(tmp_path, callback, rates, fast_dev_run=4)
    assert callback.state is None and callback.state_dict() == {}
    assert list(rates.first_group.values()) == [LR] * 4

    fit(tmp_path, callback, max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    fit(tmp_path, callback, fast_dev_run=4, ckpt_path=tmp_path / "two.ckpt")
    assert callback.state is None


# Waiting for the device --------------------------------------------------------------------------

READS = {"item", "tolist", "cpu", "numpy", "__array__", "__float__", "__int__", "__bool__",
         "__index__", "__contains__", "is_nonzero", "equal", "nonzero"}  # fmt: skip


class HostReads(TorchFunctionMode):
    """Counts, in a callback's work during the steps, what would wait for an accelerator."""

    def __init__(self, callback: FastFaceCallback) -> None:
        super().__init__()
        self.count = 0
        for name in ("on_train_batch_end", "_on_optimizer_step"):
            setattr(callback, name, self.watch(getattr(callback, name)))

    def watch(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return hook(*args, **kwargs)

        return watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def _two_tensor_groups(module: LightningModule) -> Optimizer:
    groups = [{"params": [module.first]}, {"params": [module.second], "lr": torch.tensor(1.0)}]
    return SGD(groups, lr=torch.tensor(LR))


@pytest.mark.parametrize(
    ("read_every", "allowed", "log_every_n_steps", "accumulate"),
    [(32, 10, 10, 1), (32, 10, 50, 2), (1, 320, 10, 1)],
)
def test_losses_are_brought_to_the_host_once_a_block(
    tmp_path: Path, read_every: int, allowed: int, log_every_n_steps: int, accumulate: int
) -> None:
    """320 steps, two groups with tensor rates, a logger: one read a block, none for logging."""
    callback = FastFaceCallback(WINDOWED, read_every=read_every)
    reads = HostReads(callback)
    trainer = fit(tmp_path, callback, module=Scripted(optimizers=_two_tensor_groups), max_epochs=1,
        loader=batches(320 * accumulate), accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path), log_every_n_steps=log_every_n_steps)  # fmt: skip
    assert reads.count == allowed
    assert callback.state.step == 320
    columns = metrics(trainer.logger)  # type: ignore[arg-type]
    assert {name for name in columns if name.startswith("lr")} == {"lr-SGD/pg1", "lr-SGD/pg2"}
    assert columns["lr-SGD/pg2"] == pytest.approx(
        {s: v / LR for s, v in columns["lr-SGD/pg1"].items()}
    )


def test_the_progress_bar_is_given_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves a float to the device, and the bar reads it back at every step."""
    given: list[Any] = []
    module = Scripted()
    log_dict = module.log_dict
    monkeypatch.setattr(
        module, "log_dict", lambda d, **kw: (given.extend(d.values()), log_dict(d, **kw))
    )
    fit(tmp_path, FastFaceCallback(), module=module, max_steps=20, log_every_n_steps=5)
    assert len(given) >= 4 * 4
    assert all(isinstance(v, Tensor) and v.device.type == "cpu" for v in given)


# Checkpoints and resume --------------------------------------------------------------------------


class SaveEvery(ModelCheckpoint):
    """Keeps the checkpoint of every so many steps."""

    def __init__(self, steps: int, root: Path) -> None:
        super().__init__(root, "{step}", every_n_train_steps=steps, save_top_k=-1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning forgets it on resume, and would save the same step again after its first
        # micro-batch: a checkpoint without the gradient gathered so far.
        self._last_global_step_saved = trainer.global_step


def last_checkpoint(root: Path) -> Path | None:
    """The one with the most steps."""
    return max(root.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]), default=None)


@pytest.mark.parametrize(
    ("schedule", "accumulate", "read_every"),
    [
        (FASTFACE, 1, 8),
        (WINDOWED, 1, 1),
        pytest.param(WINDOWED, 4, 8, marks=pytest.mark.slow),
    ],
    ids=["FastFace", "MHLR", "MHLR accumulating"],
)
def test_killed_and_resumed_run_has_the_rates_of_the_uninterrupted(
    tmp_path: Path, schedule: FastFace | MHLR, accumulate: int, read_every: int
) -> None:
    """Killed at random steps, mid-epoch too, and resumed from a checkpoint some steps older.

    The uninterrupted run saves nothing: saving changes no rate either.
    """
    settings = {"max_steps": STEPS, "accumulate_grad_batches": accumulate}
    loader = batches(30 * accumulate - accumulate // 2)
    whole, whole_rates = FastFaceCallback(schedule, read_every=read_every), LearningRates()
    fit(tmp_path, whole, whole_rates, loader=loader, **settings)
    assert len(whole.changes) >= 6

    kills = sorted(random.Random(read_every + accumulate).sample(range(8, STEPS), 4))
    for kill in [*kills, STEPS]:
        resumed, rates = FastFaceCallback(schedule, read_every=read_every), LearningRates()
        start = last_checkpoint(tmp_path)
        with pytest.raises(Killed) if kill < STEPS else nullcontext():
            fit(tmp_path, resumed, rates, RaiseAt(kill), SaveEvery(7, tmp_path), loader=loader,
                ckpt_path=start, **settings)  # fmt: skip
        first = int(start.stem[5:]) if start else 0
        last = min(kill, STEPS - 1)
        assert rates.at == {step: whole_rates.at[step] for step in range(first, last + 1)}
    assert resumed.state_dict() == whole.state_dict()


def test_checkpoint_at_an_exception_holds_the_losses_not_read_yet(tmp_path: Path) -> None:
    whole = FastFaceCallback(FASTFACE, read_every=32)
    fit(tmp_path, whole, max_steps=STEPS)
    resumed = FastFaceCallback(FASTFACE, read_every=32)
    with pytest.raises(Killed):
        fit(
            tmp_path, resumed, RaiseAt(75), OnExceptionCheckpoint(tmp_path, "died"), max_steps=STEPS
        )
    fit(tmp_path, resumed, max_steps=STEPS, ckpt_path=tmp_path / "died.ckpt")
    assert resumed.state_dict() == whole.state_dict()


def test_longer_resume_keeps_the_windows_it_was_bound_to(tmp_path: Path) -> None:
    """Otherwise its responses would change their meaning in the middle of the run."""
    callback = FastFaceCallback(FASTFACE)
    fit(tmp_path, callback, max_epochs=6).save_checkpoint(tmp_path / "a.ckpt")
    longer = FastFaceCallback(FASTFACE)
    with pytest.warns(UserWarning, match=r"\b60 steps.*\b200\b"):
        fit(tmp_path, longer, max_epochs=20, ckpt_path=tmp_path / "a.ckpt")
    assert longer.state_dict()["bound"] == callback.state_dict()["bound"]
    assert longer.changes == replay(LOSSES, FASTFACE.bind(60), total_steps=200, lr=LR)
    assert longer.state_dict()["total_steps"] == 60


def test_a_run_that_has_ended_keeps_its_changes_when_it_is_resumed(tmp_path: Path) -> None:
    callback, again = FastFaceCallback(FASTFACE), FastFaceCallback(FASTFACE)
    fit(tmp_path, callback, max_steps=60).save_checkpoint(tmp_path / "a.ckpt")
    trainer = fit(tmp_path, again, max_steps=60, ckpt_path=tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert again.changes == callback.changes != []
    assert again.state_dict() == callback.state_dict()


def test_a_resumed_fit_takes_up_new_settings_that_the_state_allows(tmp_path: Path) -> None:
    fit(tmp_path, FastFaceCallback(FASTFACE), max_steps=60).save_checkpoint(tmp_path / "a.ckpt")
    patient = FastFaceCallback(replace(FASTFACE, patience=10_000, factor=0.1))
    with pytest.warns(UserWarning, match="patience 10000, was 8; factor 0.1, was 0.5"):
        fit(tmp_path, patient, max_epochs=20, ckpt_path=tmp_path / "a.ckpt")
    assert patient.state.step == 200 and patient.changes[-1].step < 60
    for other in (replace(FASTFACE, ema_window=5), MHLR()):
        with pytest.raises(ValueError, match="weights alone"):
            fit(tmp_path, FastFaceCallback(other), max_epochs=9, ckpt_path=tmp_path / "a.ckpt")


def test_checkpoint_of_another_scheduler_is_refused(tmp_path: Path) -> None:
    trainer = fit(tmp_path, module=Scripted(optimizers=scheduled), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="scheduler"):
        fit(tmp_path, FastFaceCallback(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")


def test_checkpoint_without_state_warns_and_starts_anew_for_what_is_left(tmp_path: Path) -> None:
    """From the rates of the checkpoint, with its warm-up; also when resumed once more."""

    def faster(module: LightningModule) -> Optimizer:
        return SGD(module.parameters(), lr=8 * LR)

    trainer = fit(tmp_path, module=Scripted(optimizers=faster), max_steps=60)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    schedule = FastFace(warmup_steps=2)
    callback, rates = FastFaceCallback(schedule), LearningRates()
    with pytest.warns(UserWarning, match="anew at step 60, for what is left"):
        trainer = fit(tmp_path, callback, rates, max_steps=90, ckpt_path=tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert vars(schedule.bind(30)) == callback.state_dict()["bound"]
    assert list(rates.first_group.values())[:4] == [4 * LR, 8 * LR, 8 * LR, 8 * LR]
    assert callback.state.step == 30
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the schedule is made for")
        fit(tmp_path, FastFaceCallback(schedule), max_steps=90, ckpt_path=tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match=r"\b30 steps.*\b35\b"):
        fit(tmp_path, FastFaceCallback(schedule), max_steps=95, ckpt_path=tmp_path / "b.ckpt")


# Logs --------------------------------------------------------------------------------------------


def metrics(logger: CSVLogger) -> dict[str, dict[int, float]]:
    """Each column of metrics.csv: its values by their steps."""
    columns: dict[str, dict[int, float]] = {}
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    columns.setdefault(name, {})[step] = float(value)
    return columns


def test_metrics_tell_scale_response_threshold_flat_steps_and_rate(tmp_path: Path) -> None:
    """As they stand at each step that is logged: the rate is the next step's."""
    logger = CSVLogger(tmp_path)
    callback = FastFaceCallback(WINDOWED)
    fit(tmp_path, callback, max_epochs=20, logger=logger, log_every_n_steps=5)
    columns, bound = metrics(logger), WINDOWED.bind(STEPS)
    state = bound.init()
    for step, loss in enumerate(LOSSES):
        state = bound.update(state, loss)
        if step % 5 != 4:
            assert step not in columns["fastface/lr_scale"]
            continue
        assert columns["fastface/lr_scale"][step] == state.scale
        assert columns["fastface/plateau_steps"][step] == state.plateau_steps
        assert columns["fastface/threshold"][step] == pytest.approx(0.03)
        assert columns["lr-SGD"][step] == LR * state.scale
        if step < 12:  # undefined as yet
            assert step not in columns["fastface/response"]
        else:
            assert columns["fastface/response"][step] == pytest.approx(state.response)


def test_progress_bar_shows_rate_and_progress_to_the_next_decay(tmp_path: Path) -> None:
    callback = FastFaceCallback(FastFace(variant="paper", ema_window=1, threshold=1.0, patience=9))
    trainer = fit(tmp_path, callback, max_steps=6, log_every_n_steps=1)
    assert callback.state.plateau_steps == 5  # the first loss has no drop
    assert trainer.progress_bar_metrics == {"fastface/lr": LR, "fastface/plateau": 0.5}


def test_nan_is_left_out_and_warned_of_once_with_its_step(tmp_path: Path) -> None:
    script = {3: math.nan, 4: math.inf, 8: -math.inf}
    callback = FastFaceCallback(Tape(), read_every=4)
    module = Scripted(lambda step, micro: script.get(step, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callback, module=module, max_epochs=1)
    said = [str(w.message) for w in caught if "the loss is" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("step 3: the loss is nan; ")
    assert losses_seen(callback) == [1.0] * 7
    assert callback.state.nonfinite == 3


def test_too_many_nan_in_a_row_stop_the_training(tmp_path: Path) -> None:
    """Under a scaler too, which skips such steps: it is the loss that is at fault."""
    callback = FastFaceCallback(Tape(max_nonfinite=3), read_every=4)
    module = Scripted(lambda step, micro: math.nan if step >= 2 else 1.0)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(ValueError, match="max_nonfinite=3"):
        fit(tmp_path, callback, module=module, max_epochs=1, plugins=[precision])


# A schedule of one's own --------------------------------------------------------------------------


class Count(NamedTuple):
    step: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class HalveEvery:
    """All that the callback asks of a schedule, and nothing more."""

    steps: int | None = None

    def bind(self, total_steps: int) -> "HalveEvery":
        return replace(self, steps=self.steps or total_steps // 5)

    def init(self) -> Count:
        return Count()

    def update(self, state: Count, loss: float) -> Count:
        assert self.steps is not None
        return Count(state.step + 1, 0.5 ** ((state.step + 1) // self.steps))


def test_a_schedule_of_ones_own_is_saved_and_resumed(tmp_path: Path) -> None:
    callback, resumed = FastFaceCallback(HalveEvery(4)), FastFaceCallback(HalveEvery(4))
    fit(tmp_path, callback, max_steps=10).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, resumed, max_steps=20, ckpt_path=tmp_path / "a.ckpt")
    assert [made.step for made in resumed.changes] == [3, 7, 11, 15, 19]
    assert resumed.changes == replay(LOSSES[:20], HalveEvery(), 20, LR)


@dataclass(frozen=True)
class Scales(HalveEvery):
    """Whatever scales it is given."""

    scales: tuple[float, ...] = ()

    def update(self, state: Count, loss: float) -> Count:
        return Count(state.step + 1, self.scales[state.step])


@pytest.mark.parametrize("scales", [(0.5, math.nan), (0.5, -1.0), (0.0, 0.5), (1.0, math.inf)])
def test_a_scale_that_no_rate_can_follow_is_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scale"):
        replay([1.0, 1.0], Scales(scales=scales), 2, LR)
    assert replay([1.0, 1.0], Scales(scales=(0.5, 0.0)), 2, LR)[-1].lr == 0


# Reuse -------------------------------------------------------------------------------------------


def test_second_fit_of_the_same_callback_starts_anew(tmp_path: Path) -> None:
    callback = FastFaceCallback(FASTFACE)
    fit(tmp_path, callback, max_steps=60)
    first = callback.state_dict()
    assert callback.changes
    module, rates = Scripted(lambda step, micro: 8 - step / 10), LearningRates()
    fit(tmp_path, callback, rates, module=module, max_steps=60)
    assert callback.changes == [] and set(rates.first_group.values()) == {LR}
    fit(tmp_path, callback, max_steps=60)
    assert callback.state_dict() == first
