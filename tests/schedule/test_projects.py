"""FastFaceCallback and FastFaceLR in projects as people write them: optimizers, rates, lengths."""

from __future__ import annotations

import copy
import csv
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scripted import (
    LR,
    Endless,
    LearningRates,
    Scripted,
    StopAt,
    Tape,
    batches,
    one_sgd,
    quiet_trainer,
    stairs,
)
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, StepLR
from torch.utils.data import DataLoader

from fastface_lightning import MHLR, FastFace, FastFaceCallback, FastFaceLR, replay

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
HALVES = Tape(halve_after=(4, 9))
FLAT = FastFace(variant="paper", ema_window=2, haar_window=2, threshold=99.0, patience=4)
"""Every loss is flat: it decays after 6, 11, 16 ... losses."""


def fit(
    root: Path, *callbacks: Callback, module: Any = None, loader: Any = None, **settings: Any
) -> Trainer:
    """A quiet fit on 10 batches an epoch, of 2 epochs unless said otherwise."""
    ckpt_path = settings.pop("ckpt_path", None)
    settings = {"max_epochs": 2} | settings
    trainer = quiet_trainer(root, callbacks, **settings)
    loaders = loader if isinstance(loader, tuple) else (batches(10) if loader is None else loader,)
    trainer.fit(module or Scripted(), *loaders, ckpt_path=ckpt_path)
    return trainer


def told(act: Callable[[], Any]) -> list[str]:
    """What an action warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if w.category is UserWarning]


def steps(*scales_and_counts: tuple[float, int]) -> list[float]:
    """The learning rate of each optimizer step: scales of LR, each for so many steps."""
    return [LR * scale for scale, count in scales_and_counts for _ in range(count)]


# Rates that others set ---------------------------------------------------------------------------


class WarmsUp(Scripted):
    """Lightning's documented warm-up, over eight steps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        if self.trainer.global_step < 8:
            for group in optimizer.param_groups:
                group["lr"] = LR * (self.trainer.global_step + 1) / 8


@pytest.mark.parametrize("read_every", [1, 4, 32])
def test_a_warm_up_in_optimizer_step_stands(tmp_path: Path, read_every: int) -> None:
    callback = FastFaceCallback(Tape(halve_after=(11,)), read_every=read_every)
    rates = LearningRates()
    messages = told(lambda: fit(tmp_path, callback, rates, module=WarmsUp()))
    warm = [LR, *(LR * step / 8 for step in range(1, 9))]
    decays_at = {1: 12, 4: 12, 32: 20}[read_every]
    full = steps((1, decays_at - 9), (0.5, 20 - decays_at))
    assert list(rates.first_group.values()) == [*warm, *full]
    assert messages == []


class Sets(Callback):
    """Sets the first group's rate, before the batch of each step given."""

    def __init__(self, lrs: dict[int, float]) -> None:
        self.lrs = lrs

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.lrs:
            trainer.optimizers[0].param_groups[0]["lr"] = self.lrs[trainer.global_step]


@pytest.mark.parametrize("read_every", [1, 5])
def test_a_rate_set_by_hand_stands_and_is_what_a_decay_multiplies(
    tmp_path: Path, read_every: int
) -> None:
    rates = LearningRates()
    callback = FastFaceCallback(HALVES, read_every=read_every)
    messages = told(lambda: fit(tmp_path, Sets({2: LR / 4, 7: LR}), callback, rates))
    assert list(rates.first_group.values()) == steps(
        (1, 2), (1 / 4, 3), (1 / 8, 2), (1, 3), (0.5, 10)
    )
    assert len(messages) == 1 and "0.015625" in messages[0] and "0.125" in messages[0]


def test_a_frozen_group_stays_frozen_and_slower_layers_keep_their_ratio(tmp_path: Path) -> None:
    def layers(module: LightningModule) -> Optimizer:
        rates = [(module.first, 0.0), (module.second, LR / 8)]
        return SGD([{"params": [p], "lr": lr} for p, lr in rates], lr=LR)

    callback, rates = FastFaceCallback(HALVES), LearningRates()
    fit(tmp_path, callback, rates, module=Scripted(optimizers=layers))
    assert list(rates.at.values())[::9] == [[0.0, LR / 8], [0.0, LR / 16], [0.0, LR / 32]]
    assert callback.get_last_lr() == [0.0, LR / 32]
    assert [made.lr for made in callback.changes] == [LR / 16, LR / 32]  # of one that moves


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.head)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.head, optimizer, lr=LR / 4)


def test_a_group_that_finetuning_adds_keeps_its_rate(tmp_path: Path) -> None:
    class Two(Scripted):
        def __init__(self) -> None:
            super().__init__(optimizers=lambda module: SGD([module.first], lr=LR))
            self.head = nn.Linear(1, 1)

        def scripted_loss(self) -> Tensor:
            return 0 * (self.first.sum() + self.head.weight.sum()) + 1.0

    callback = FastFaceCallback(Tape(halve_after=(4, 14)))
    trainer = fit(tmp_path, callback, Unfreezes(), module=Two())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [LR / 4, LR / 8]


def by_module(module: LightningModule) -> None:
    module.trainer.strategy.setup_optimizers(module.trainer)


def by_hand(module: LightningModule) -> None:
    module.trainer.optimizers = [SGD(module.parameters(), lr=LR)]


@pytest.mark.parametrize("rebuild", [by_module, by_hand])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_optimizers_built_anew_in_the_run_are_followed(
    tmp_path: Path, rebuild: Callable[[LightningModule], None], hook: str
) -> None:
    class Rebuilt(Scripted):
        pass

    def rebuilds(self: Rebuilt, *_: Any) -> None:
        if self.trainer.global_step == 10:
            rebuild(self)

    setattr(Rebuilt, hook, rebuilds)
    callback, rates = FastFaceCallback(Tape(halve_after=(4, 14))), LearningRates()
    messages = told(lambda: fit(tmp_path, callback, rates, module=Rebuilt()))
    assert callback.state.step == 20 and callback.changes[-1].step == 14 and messages == []
    fresh = rates.first_group[11]  # it starts from its own rate
    assert fresh == LR and rates.first_group[19] == LR / 2


class Steps(Callback):
    """Steps a scheduler of its own after every batch."""

    def __init__(self, scheduler: Callable[[Optimizer], Any]) -> None:
        self.make = scheduler

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.scheduler = self.make(trainer.optimizers[0])

    def on_train_batch_end(self, *_: Any) -> None:
        self.scheduler.step()


def test_a_scheduler_stepped_by_hand_multiplies_too(tmp_path: Path) -> None:
    callback = FastFaceCallback(HALVES)
    by_hand = Steps(lambda optimizer: ExponentialLR(optimizer, 0.5))
    trainer = fit(tmp_path, by_hand, callback, max_epochs=1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR / 2**12


def test_one_that_overwrites_the_rate_is_warned_of_once_with_both_numbers(tmp_path: Path) -> None:
    callback = FastFaceCallback(HALVES)
    by_hand = Steps(lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))
    messages = told(lambda: fit(tmp_path, by_hand, callback))
    assert len(messages) == 1 and "0.0625" in messages[0] and "0.125" in messages[0]


class Finds(Scripted):
    """Has a learning rate and a batch size that Lightning's finders set."""

    def __init__(self) -> None:
        super().__init__(
            lambda step, micro: 4.0, lambda module: SGD(module.parameters(), lr=module.lr)
        )
        self.lr, self.batch_size = LR, 1

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.zeros(60, 1), batch_size=self.batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False])
def test_what_the_learning_rate_finder_finds_is_scaled_once(tmp_path: Path, first: bool) -> None:
    finder = LearningRateFinder(num_training_steps=8, min_lr=0.01, max_lr=0.02)
    finder.lr_find_suggestion = lambda self: 0.5  # type: ignore[attr-defined]
    callback, rates = FastFaceCallback(Tape(warmup_steps=4)), LearningRates()
    module = Finds()
    order = [finder, callback] if first else [callback, finder]
    trainer = quiet_trainer(tmp_path, [*order, rates], max_epochs=1)
    trainer.fit(module)
    assert list(rates.first_group.values())[:6] == pytest.approx(
        [module.lr * share for share in (1 / 4, 2 / 4, 3 / 4, 1, 1, 1)]
    )
    assert callback.state.step == 60


def test_the_run_has_the_length_that_the_batch_size_finder_leaves(tmp_path: Path) -> None:
    callback = FastFaceCallback(Tape())
    finder = BatchSizeFinder(mode="power", init_val=2, max_trials=1, steps_per_trial=1)
    trainer = quiet_trainer(tmp_path, [callback, finder], max_epochs=1)
    trainer.fit(Finds())
    assert callback.state_dict()["total_steps"] == trainer.global_step == callback.state.step < 60


class Wraps(Optimizer):
    """An optimizer around another that leaves out Optimizer's own __init__: no hook is called."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize(
    "make",
    [
        lambda module: Wraps(SGD(module.parameters(), lr=LR)),
        lambda module: LBFGS(module.parameters(), lr=LR, max_iter=1),
        lambda module: torch.optim.AdamW(module.parameters(), lr=LR, fused=True),
    ],
    ids=["wrapper", "LBFGS", "fused"],
)
def test_optimizers_of_other_kinds_count(tmp_path: Path, make: Any) -> None:
    callback, rates = FastFaceCallback(HALVES), LearningRates()
    fit(tmp_path, callback, rates, module=Scripted(optimizers=make), max_epochs=1)
    assert callback.state.step == 10
    assert list(rates.first_group.values()) == steps((1, 5), (0.5, 5))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipped_and_in_bfloat16(tmp_path: Path, precision: str) -> None:
    callback, rates = FastFaceCallback(HALVES), LearningRates()
    fit(tmp_path, callback, rates, precision=precision, gradient_clip_val=1.0)
    assert list(rates.first_group.values()) == steps((1, 5), (0.5, 5), (0.25, 10))


# Where the loss comes from -----------------------------------------------------------------------


class Logs(Scripted):
    """Logs its loss, and a value to validate by; what it returns says nothing."""

    def __init__(self, script: Any = stairs, **how: Any) -> None:
        super().__init__(script)
        self.how, self.validated = how, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.scripted_loss()
        if self.how:
            self.log("train/loss", loss, **self.how)
        return 0 * loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", 10.0 + self.validated)

    def on_validation_epoch_end(self) -> None:
        self.validated += not self.trainer.sanity_checking


@pytest.mark.parametrize(
    "how",
    [{"on_step": True}, {"on_step": True, "on_epoch": True}, {"on_step": True, "prog_bar": True}],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_monitor_reads_what_training_step_logs(
    tmp_path: Path, how: dict[str, bool], accumulate: int
) -> None:
    """In every micro-batch, undivided, as the loss that it returns."""
    by_name, plain = FastFaceCallback(Tape(), monitor="train/loss"), FastFaceCallback(Tape())
    fit(tmp_path, by_name, module=Logs(**how), accumulate_grad_batches=accumulate)
    fit(tmp_path, plain, accumulate_grad_batches=accumulate)
    assert by_name.state == plain.state and len(plain.state.memory) in (20, 6)


def test_a_monitor_that_is_logged_otherwise_or_not_at_all_is_refused(tmp_path: Path) -> None:
    for how, monitor in [({"on_step": False, "on_epoch": True}, "train/loss"), ({}, "tain/loss")]:
        with pytest.raises(MisconfigurationException, match=monitor):
            fit(tmp_path, FastFaceCallback(monitor=monitor), module=Logs(**how))


@pytest.mark.parametrize(
    ("settings", "validations"),
    [
        ({"max_epochs": 6}, 6),
        ({"max_epochs": 6, "check_val_every_n_epoch": 2}, 3),
        ({"max_epochs": 3, "val_check_interval": 5}, 6),
        ({"max_steps": 40, "val_check_interval": 4, "check_val_every_n_epoch": None}, 10),
        ({"max_steps": 40, "val_check_interval": 4, "endless": True}, 10),
    ],
)
def test_of_a_validation_value_each_validation_is_a_step(
    tmp_path: Path, settings: dict[str, Any], validations: int
) -> None:
    """The sanity check's is none; what the schedule decides holds from the next training step."""
    callback = FastFaceCallback(Tape(halve_after=(1,)), monitor="val/loss", read_every=32)
    rates = LearningRates()
    settings = {"num_sanity_val_steps": 2, "max_epochs": -1} | settings
    train = DataLoader(Endless()) if settings.pop("endless", False) else batches(10)
    loaders = (train, batches(2))
    messages = told(
        lambda: fit(tmp_path, callback, rates, module=Logs(), loader=loaders, **settings)
    )
    assert list(callback.state.memory) == [10.0 + k for k in range(validations)]
    assert callback.state_dict()["total_steps"] == validations and messages == []
    every = 60 // validations if "max_steps" not in settings else 4
    every = 5 if settings.get("val_check_interval") == 5 else every
    assert next(step for step, lr in rates.first_group.items() if lr == LR / 2) == 2 * every


def test_a_validated_schedule_resumes(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> FastFaceCallback:
        callback = FastFaceCallback(FLAT, monitor="val/loss")
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(tmp_path, callback, saved, module=Logs(), loader=(batches(3), batches(1)),
            max_epochs=epochs, ckpt_path=ckpt_path)  # fmt: skip
        return callback

    whole = run(14)
    resumed = run(14, tmp_path / "epoch=7.ckpt")
    assert resumed.changes == whole.changes and len(whole.changes) == 2
    assert resumed.get_last_lr() == whole.get_last_lr()


class GAN(LightningModule):
    """Two optimizers; the generator's turn comes every fifth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.generator = nn.Linear(1, 1), nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, float]:
        losses = {}
        for optimizer, name, every in zip(self.optimizers(), ("c", "g"), (1, 5), strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                losses[name] = float(self.trainer.current_epoch)
        return losses

    def configure_optimizers(self) -> list[Optimizer]:
        return [SGD(net.parameters(), lr=LR) for net in (self.critic, self.generator)]


def test_a_schedule_for_each_optimizer(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Trainer, list[FastFaceCallback]]:
        schedules = [Tape(halve_after=(3, 11)), Tape(halve_after=(1, 2, 5))]
        callbacks = [
            FastFaceCallback(schedule, 40, key, optimizers=[index])
            for index, (schedule, key) in enumerate(zip(schedules, "cg", strict=True))
        ]
        logger = CSVLogger(tmp_path / str(epochs), "", "")
        return fit(tmp_path, *callbacks, module=GAN(), max_epochs=epochs, ckpt_path=ckpt_path,
                   logger=logger, log_every_n_steps=1), callbacks  # fmt: skip

    trainer, whole = run(4)
    assert [callback.state.step for callback in whole] == [40, 8]
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [LR / 4, LR / 8]
    with (tmp_path / "4" / "metrics.csv").open() as file:
        names = next(csv.reader(file))
    assert {"fastface-0/lr_scale", "fastface-1/lr_scale", "lr-SGD", "lr-SGD-1"} <= set(names)

    half, _ = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer, resumed = run(4, tmp_path / "half.ckpt")
    assert [r.changes for r in resumed] == [w.changes for w in whole]
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [LR / 4, LR / 8]


@pytest.mark.parametrize(
    ("others", "named"), [({"optimizers": [0]}, "leave one"), ({"optimizers": [2]}, r"\(2,\)")]
)
def test_no_optimizer_has_two_schedules_and_each_exists(
    tmp_path: Path, others: dict[str, Any], named: str
) -> None:
    one, other = (FastFaceCallback(loss_key="c", **s) for s in ({}, others))
    with pytest.raises(MisconfigurationException, match=named):
        fit(tmp_path, one, other, module=GAN())


# The run's length --------------------------------------------------------------------------------


class Manual(LightningModule):
    """Steps each of its optimizers once in so many batches."""

    def __init__(self, every: int = 1, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.number = every, optimizers
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, float]:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
        return {"total": 1.0}

    def configure_optimizers(self) -> list[Optimizer]:
        return [SGD([self.weight], lr=LR) for _ in range(self.number)]


def test_several_optimizers_under_max_steps_are_bound_to_the_batches(tmp_path: Path) -> None:
    callback = FastFaceCallback(Tape(), loss_key="total")
    messages = told(
        lambda: fit(tmp_path, callback, module=Manual(optimizers=2), max_steps=40, max_epochs=-1)
    )
    assert callback.state_dict()["total_steps"] == callback.state.step == 20 and messages == []


class Grows(LightningModule):
    """Its data doubles in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return batches(5 * 2**self.trainer.current_epoch)

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("module", "settings", "numbers"),
    [
        (Manual(every=4), {"max_epochs": 5}, ("50", "10")),
        (Grows(), {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}, ("20", "30")),
        (Scripted(), {"max_epochs": 500, "max_time": timedelta(seconds=0.5)}, ("5000", "")),
    ],
    ids=["own accumulation", "growing data", "max_time"],
)
def test_a_length_that_only_the_run_shows_is_warned_of_once(
    tmp_path: Path, module: Any, settings: dict[str, Any], numbers: tuple[str, str]
) -> None:
    key = "total" if isinstance(module, Manual) else None
    callback = FastFaceCallback(Tape(), loss_key=key)
    loader = () if isinstance(module, Grows) else None
    messages = told(lambda: fit(tmp_path, callback, module=module, loader=loader, **settings))
    said = [text for text in messages if "total_steps=" in text]
    made_for, gives = numbers
    assert len(said) == 1 and f" {made_for} steps" in said[0]
    assert f"it {gives or callback.state.step}:" in said[0]
    right = FastFaceCallback(Tape(), total_steps=callback.state.step, loss_key=key)
    if key:
        assert told(lambda: fit(tmp_path, right, module=module, **settings)) == []


def test_total_steps_long_past_is_warned_of_when_it_is(tmp_path: Path) -> None:
    settings = {"max_epochs": -1, "max_steps": -1}
    (message,) = told(
        lambda: fit(tmp_path, FastFaceCallback(Tape(), total_steps=5), StopAt(30), **settings)
    )
    assert "5 steps" in message


def test_a_second_fit_goes_on_for_what_is_left(tmp_path: Path) -> None:
    """After Ctrl-C, or with more epochs: the trainer's counter begins above 0."""
    callback = FastFaceCallback(HALVES)
    trainer = quiet_trainer(tmp_path, [callback, StopAt(7, KeyboardInterrupt)], max_epochs=3)
    module = Scripted()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, batches(10))
    (message,) = told(lambda: trainer.fit(module, batches(10)))
    assert "step 7" in message
    assert callback.state_dict()["total_steps"] == callback.state.step == 30
    trainer.fit_loop.max_epochs = 5
    (message,) = told(lambda: trainer.fit(module, batches(10)))
    assert callback.state_dict()["total_steps"] == callback.state.step == 20


@pytest.mark.parametrize(
    ("settings", "loader", "length"),
    [
        ({"max_steps": 12, "max_epochs": -1}, DataLoader(Endless()), 12),
        ({"limit_train_batches": 0.5}, None, 10),
        ({"overfit_batches": 3}, None, 6),
        ({"limit_train_batches": 7, "accumulate_grad_batches": 2}, None, 8),
    ],
)
def test_the_length_follows_the_trainers_settings(
    tmp_path: Path, settings: dict[str, Any], loader: Any, length: int
) -> None:
    callback = FastFaceCallback(Tape())
    messages = told(lambda: fit(tmp_path, callback, loader=loader, **settings))
    assert callback.state_dict()["total_steps"] == callback.state.step == length
    assert not [text for text in messages if "schedule" in text]


def test_early_stopping_leaves_a_word_on_the_length(tmp_path: Path) -> None:
    stops = EarlyStopping("val/loss", patience=2)
    callback = FastFaceCallback(Tape())
    messages = told(lambda: fit(
        tmp_path, callback, stops, module=Logs(), loader=(batches(10), batches(2)), max_epochs=50
    ))  # fmt: skip
    (said,) = [text for text in messages if "schedule" in text]
    assert "500 steps" in said and "30" in said


# Loggers, evaluation, copies ---------------------------------------------------------------------


def test_loggers_get_the_settings(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(tmp_path, FastFaceCallback(FLAT), logger=loggers)
    text = (Path(loggers[0].log_dir) / "hparams.yaml").read_text()
    assert "ema_window: 2" in text and "total_steps: 20" in text and "FastFace" in text
    assert loggers[1].hparams["fastface"]["patience"] == 4


def test_nothing_is_logged_twice_or_where_it_is_not_wanted(tmp_path: Path) -> None:
    for beside, logs, keys in [
        ([LearningRateMonitor("step")], True, ["fastface/lr_scale", "lr-SGD"]),
        ([], False, []),
    ]:
        logger = CSVLogger(tmp_path / str(logs))
        callback = FastFaceCallback(FLAT, log=logs)
        messages = told(
            lambda c=callback, b=beside, w=logger: fit(
                tmp_path, c, *b, logger=w, log_every_n_steps=5
            )
        )
        file = Path(logger.log_dir) / "metrics.csv"
        names = next(csv.reader(file.open())) if file.is_file() else []
        assert messages == [] and set(keys) <= set(names) and bool(names) == logs
        if beside:  # the monitor's are the rates that a step was taken with
            rows = list(csv.DictReader(file.open()))
            by_step = {row["step"]: row["lr-SGD"] for row in rows if row["lr-SGD"]}
            assert float(by_step["4"]) == LR and len(by_step) == 4


@pytest.mark.parametrize("other", [FastFaceCallback(MHLR()), FastFaceCallback(FastFace(alpha=0.5))])
def test_only_fit_minds_a_checkpoint_of_another_schedule(
    tmp_path: Path, other: FastFaceCallback
) -> None:
    module = Logs()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.predict_step = lambda batch: batch  # type: ignore[method-assign]
    fit(tmp_path, other, module=module, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    callback = FastFaceCallback(HALVES)
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=9)
    for act in (trainer.validate, trainer.test, trainer.predict):
        act(module, batches(2), ckpt_path=tmp_path / "a.ckpt")
    fit(tmp_path, callback, fast_dev_run=2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="weights alone"):
        trainer.fit(module, batches(10), ckpt_path=tmp_path / "a.ckpt")
    trainer = fit(tmp_path, callback, module=module)
    state, changes = callback.state_dict(), list(callback.changes)
    trainer.test(module, batches(2), ckpt_path=tmp_path / "a.ckpt")
    assert callback.state_dict() == state and callback.changes == changes != []


def test_a_state_dict_is_a_copy_and_asks_no_other_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(Callback):
        seen: dict[str, Any] | None = None

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                monkeypatch.setattr(trainer.strategy, "reduce", None)
                self.seen = callback.state_dict()
                self.was = copy.deepcopy(self.seen)

    callback = FastFaceCallback(MHLR(variant="paper", haar_window=2), read_every=4)
    looks = Looks()
    fit(tmp_path, callback, looks)
    assert looks.seen == looks.was and looks.seen["losses"] == 4
    assert callback.state_dict()["losses"] == 20


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_callback_can_be_copied(tmp_path: Path, clone: Any) -> None:
    callback = clone(FastFaceCallback(HALVES, min_lr=LR / 2))
    fit(tmp_path, callback)
    assert callback.get_last_lr() == [LR / 2] and repr(callback) == repr(clone(callback))


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"schedule": "mhlr"}, "schedule.*'mhlr'"),
        ({"schedule": MHLR}, r"schedule.*MHLR\(\)"),
        ({"total_steps": 100.0}, "total_steps.*100.0"),
        ({"read_every": 0}, "read_every.*0"),
        ({"min_lr": -1.0}, "min_lr.*-1"),
        ({"min_lr": "1e-4"}, "min_lr.*1e-4"),
        ({"optimizers": [1.0]}, "optimizers.*1.0"),
        ({"loss_key": "a", "monitor": "b"}, "loss_key.*monitor"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FastFaceCallback(**arguments)


def test_losses_and_optimizers_that_cannot_serve_are_named(tmp_path: Path) -> None:
    class PerSample(Scripted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.scripted_loss(), "each": torch.ones(3)}

    with pytest.raises(MisconfigurationException, match=r"each.*\(3,\)"):
        fit(tmp_path, FastFaceCallback(loss_key="each"), module=PerSample())
    rateless = Scripted(optimizers=lambda module: SGD(module.parameters(), lr=LR))
    rateless.configure_optimizers = lambda: without_lr(rateless)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="SGD"):
        fit(tmp_path, FastFaceCallback(), module=rateless)
    callback = FastFaceCallback()
    (message,) = [m for m in told(lambda: fit(tmp_path, callback, limit_train_batches=0))
                  if "FastFace" in m]  # fmt: skip
    assert "limit_train_batches" in message and callback.state is None


def without_lr(module: LightningModule) -> Optimizer:
    optimizer = SGD(module.parameters(), lr=LR)
    del optimizer.param_groups[0]["lr"]
    return optimizer


# pytorch_lightning -------------------------------------------------------------------------------


def test_pytorch_lightnings_trainer_and_callbacks(tmp_path: Path) -> None:
    """The package under its other name: other classes of the same names."""
    twin = pytest.importorskip("pytorch_lightning")
    names = {"training_step", "configure_optimizers", "scripted_loss"}
    body = {name: getattr(Scripted, name) for name in names}

    def init(self: Any, optimizers: Any = one_sgd) -> None:
        twin.LightningModule.__init__(self)
        self.script, self.optimizers_of, self.at = stairs, optimizers, (-1, -1)
        self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    module = type("Twin", (twin.LightningModule,), {**body, "__init__": init})

    def run(*callbacks: Any, **settings: Any) -> Any:
        quiet = dict.fromkeys(
            ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
        )
        settings = {"accelerator": "cpu", "max_epochs": 6, **quiet} | settings
        trainer = twin.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **settings)
        trainer.fit(module(), batches(10), ckpt_path=settings.get("ckpt_path"))
        return trainer

    callback = FastFaceCallback(FLAT)
    trainer = run(callback)
    assert callback.changes == replay([stairs(step) for step in range(60)], FLAT, 60, LR) != []
    assert trainer.optimizers[0].param_groups[0]["lr"] == callback.changes[-1].lr
    accumulates = twin.callbacks.GradientAccumulationScheduler({0: 4, 2: 1})
    run(callback := FastFaceCallback(Tape()), accumulates, max_epochs=3)
    assert callback.state_dict()["total_steps"] == callback.state.step == 3 + 3 + 10
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging"):
        run(FastFaceCallback(), twin.callbacks.StochasticWeightAveraging(swa_lrs=0.1))
    logger = twin.loggers.CSVLogger(tmp_path)
    run(FastFaceCallback(), twin.callbacks.LearningRateMonitor("step"), logger=logger)


# FastFaceLR --------------------------------------------------------------------------------------


class Schedules(Logs):
    """Returns FastFaceLR from configure_optimizers."""

    def __init__(self, **config: Any) -> None:
        super().__init__(on_step=True)
        self.config = config

    def configure_optimizers(self) -> Any:
        optimizer = SGD([{"params": [self.first]}, {"params": [self.second], "lr": LR / 2}], lr=LR)
        total_steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": FastFaceLR(optimizer, total_steps, FLAT), **self.config},
        }


ON_LOSS = {"interval": "step", "monitor": "train/loss", "reduce_on_plateau": True}


def test_fastface_lr_in_configure_optimizers(tmp_path: Path) -> None:
    rates = LearningRates()
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=13, save_top_k=-1)
    fit(tmp_path, rates, saved, module=Schedules(**ON_LOSS))
    changes = replay([stairs(step) for step in range(20)], FLAT, 20, LR)
    expected = [LR / 2 ** sum(made.step < step for made in changes) for step in range(20)]
    assert list(rates.at.values()) == [[lr, lr / 2] for lr in expected] and len(changes) == 3
    again = LearningRates()
    fit(tmp_path, again, module=Schedules(**ON_LOSS), ckpt_path=tmp_path / "step=13.ckpt")
    # Lightning saves before it steps such a scheduler: the loss of the last step is not seen.
    assert again.at == {step: rates.at[max(13, step - 1)] for step in range(13, 20)}


@pytest.mark.parametrize("config", [{}, {"interval": "step"}])
def test_fastface_lr_without_its_loss_says_how(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)reduce_on_plateau.*FastFaceCallback"):
        fit(tmp_path, module=Schedules(**config))


def test_fastface_lr_and_groups_floors_hands_and_other_states() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=LR)
    scheduler = FastFaceLR(optimizer, 100, FLAT, min_lr=LR / 4)
    warm = FastFaceLR(SGD([nn.Parameter(torch.ones(1))], lr=LR), 100, FastFace(warmup_steps=4))
    assert warm.get_last_lr() == [LR / 4]

    def losses(number: int) -> None:
        for _ in range(number):
            optimizer.step()
            scheduler.step(1.0)

    losses(6)
    assert scheduler.get_last_lr() == [LR / 2]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": LR / 8})
    losses(5)
    assert scheduler.get_last_lr() == [LR / 4, LR / 8]  # at the floor, and below it
    losses(20)
    assert scheduler.get_last_lr() == [LR / 4, LR / 8] and scheduler.state.decays == 2
    assert "step 31" in repr(scheduler) and "0.25" in repr(scheduler)
    optimizer.param_groups[0]["lr"] = LR
    assert len(told(lambda: losses(10))) == 1 and scheduler.get_last_lr()[0] == LR / 4
    with pytest.raises(ValueError, match="another scheduler"):
        scheduler.load_state_dict(StepLR(optimizer, 3).state_dict())
    for total_steps in (0, 1.5):
        with pytest.raises(ValueError, match="total_steps"):
            FastFaceLR(optimizer, total_steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scalar.*\(2,\)"):
        scheduler.step(torch.ones(2))


def test_fastface_lr_in_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = nn.Linear(1, 1)
    model, optimizer = fabric.setup(model, SGD(model.parameters(), lr=LR))
    scheduler = FastFaceLR(optimizer, 12, FLAT)
    for _ in range(12):
        loss = model(torch.ones(1)).sum() ** 2
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == LR / 4


def test_the_command_line_builds_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: fastface_lightning.FastFaceCallback\n      init_args:\n"
        "        schedule:\n          class_path: fastface_lightning.MHLR\n"
        "          init_args: {haar_window: 4, patience: 0.1}\n        min_lr: 0.01\n"
    )
    cli = LightningCLI(Grows, run=False, args=["--config", str(config)],
                       save_config_callback=None)  # fmt: skip
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, FastFaceCallback))
    assert callback.schedule == MHLR(haar_window=4, patience=0.1) and "min_lr=0.01" in repr(
        callback
    )


# Rarer cases -------------------------------------------------------------------------------------


def test_restarts_do_not_climb_from_a_floor(tmp_path: Path) -> None:
    """A decay that the floor takes back is none of the plateaus in a row that end in a restart."""
    schedule = MHLR(variant="paper", haar_window=2, threshold=99.0, patience=2)
    callback, rates = FastFaceCallback(schedule, min_lr=LR / 2), LearningRates()
    fit(tmp_path, callback, rates, max_epochs=6)
    assert set(rates.first_group.values()) == {LR, LR / 2}


class Timer(Callback):
    """A user's own, of a name that Lightning has too."""


def test_callbacks_of_other_packages_are_not_lightnings(tmp_path: Path) -> None:
    fit(tmp_path, FastFaceCallback(HALVES), Timer())


def test_a_monitor_may_be_logged_now_and_then(tmp_path: Path) -> None:
    class Sometimes(Scripted):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx % 3 == 2:
                self.log("train/loss", float(self.trainer.global_step), on_step=True)
            return self.scripted_loss()

    callback = FastFaceCallback(Tape(), monitor="train/loss")
    fit(tmp_path, callback, module=Sometimes())
    assert list(callback.state.memory) == [2.0, 5.0, 8.0, 12.0, 15.0, 18.0]


def test_a_floor_above_every_rate_is_warned_of(tmp_path: Path) -> None:
    (message,) = told(lambda: fit(tmp_path, FastFaceCallback(FLAT, min_lr=1.0)))
    assert "min_lr" in message


def test_a_tensor_rate_that_groups_share_is_multiplied_once(tmp_path: Path) -> None:
    def shared(module: LightningModule) -> Optimizer:
        parameters = [{"params": [module.first]}, {"params": [module.second]}]
        return SGD(parameters, lr=torch.tensor(LR))

    callback = FastFaceCallback(HALVES)
    messages = told(lambda: fit(tmp_path, callback, module=Scripted(optimizers=shared)))
    assert callback.get_last_lr() == [LR / 4, LR / 4] and messages == []


@pytest.mark.parametrize("read_every", [1, 4])
def test_optimizers_stepped_behind_lightnings_back_count(tmp_path: Path, read_every: int) -> None:
    class Raw(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, float]:
            self.trainer.optimizers[0].step()
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return {"total": 1.0}

    module = Raw()
    module.rates = []
    fit(tmp_path, FastFaceCallback(HALVES, loss_key="total", read_every=read_every), module=module)
    at = {1: (5, 5, 10), 4: (8, 4, 8)}[read_every]
    assert module.rates == steps(*zip((1, 0.5, 0.25), at, strict=True))


@dataclass(frozen=True, slots=True)
class Slotted:
    """A schedule with slots, and no base."""

    steps: int = 5

    def bind(self, total_steps: int) -> Slotted:
        return self

    def init(self) -> Seen:
        return Seen()

    def update(self, state: Seen, loss: float) -> Seen:
        return Seen(state.step + 1, 0.5 ** ((state.step + 1) // self.steps))


class Seen(NamedTuple):
    step: int = 0
    scale: float = 1.0


def test_a_schedule_with_slots_is_saved_with_its_settings(tmp_path: Path) -> None:
    fit(tmp_path, FastFaceCallback(Slotted())).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, FastFaceCallback(Slotted()), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="steps=5"):
        fit(tmp_path, FastFaceCallback(Slotted(3)), max_epochs=3, ckpt_path=tmp_path / "a.ckpt")


def test_a_validation_that_comes_late_or_logs_nothing(tmp_path: Path) -> None:
    """The first in the second epoch; then one that leaves the value out is no step."""

    class Rarely(Logs):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.validated % 2 == 0:
                self.log("val/loss", 10.0 + self.validated)

    loaders, settings = (batches(10), batches(1)), {"check_val_every_n_epoch": None}
    callback = FastFaceCallback(Tape(), monitor="val/loss")
    fit(tmp_path, callback, module=Rarely(), loader=loaders, val_check_interval=15,
        max_epochs=6, **settings)  # fmt: skip
    assert list(callback.state.memory) == [10.0, 12.0]
    callback = FastFaceCallback(FastFace(warmup_steps=3), monitor="val/loss")
    with pytest.raises(MisconfigurationException, match="warm-up"):
        fit(tmp_path, callback, module=Logs(), loader=loaders)


@pytest.mark.parametrize("step", [16, 18, 19, 20])
def test_a_run_that_goes_on_is_not_said_to_have_another_length(tmp_path: Path, step: int) -> None:
    loader, settings = batches(61), {"accumulate_grad_batches": 3, "max_epochs": 3}
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, FastFaceCallback(Tape()), saved, loader=loader, **settings)
    ckpt_path, callback = tmp_path / f"step={step}.ckpt", FastFaceCallback(Tape())
    run = told(lambda: fit(tmp_path, callback, loader=loader, ckpt_path=ckpt_path, **settings))
    assert not [text for text in run if "schedule" in text] and callback.state.step == 63


def test_a_schedule_that_starts_in_the_middle_of_an_epoch_has_what_is_left(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    fit(tmp_path, saved)
    callback = FastFaceCallback(Tape())
    fit(tmp_path, callback, ckpt_path=tmp_path / "step=7.ckpt")
    assert callback.state_dict()["total_steps"] == callback.state.step == 13


def test_a_group_frozen_by_hand_may_be_unfrozen_without_a_word(tmp_path: Path) -> None:
    callback = FastFaceCallback(HALVES)
    assert told(lambda: fit(tmp_path, Sets({2: 0.0, 14: LR}), callback)) == []
    assert callback.get_last_lr() == [LR]


def test_fastface_lr_leaves_torchs_base_rates_alone() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=LR)
    scheduler = FastFaceLR(optimizer, 100, FastFace(warmup_steps=10))
    assert optimizer.param_groups[0]["initial_lr"] == LR == scheduler.base_lrs[0]
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == LR / 10
