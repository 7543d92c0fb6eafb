"""The schedules as a Lightning callback: ``Trainer(callbacks=[FastFaceCallback()])``."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .base import Change, Progress, Schedule, check_schedule, values_of
from .fastface import FastFace
from .length import Pace, callbacks_of, has_ended, steps_left
from .plateau import check_count
from .rates import Rates, lr_names
from .step_loss import logged_loss, returned_loss, scalar, was_validated


class FastFaceCallback(Callback):
    """Watches the training loss and multiplies the learning rates when it goes flat.

    Needs no argument: the run's length comes from the trainer, the loss from ``training_step``. The
    schedule takes one step for every optimizer step that really happened, with the mean loss of its
    micro-batches and ranks. A decision multiplies every rate as it then stands; nothing else is
    ever written, so a warm-up, a frozen group or a scheduler stepped by hand has its way.

    Losses stay on their device and are read in blocks, so that training never waits for them; the
    rate follows a decision when its block is read, at the same steps in an interrupted run.

    Logged, every ``log_every_n_steps``: ``fastface/lr_scale``, ``response``, ``threshold``,
    ``plateau_steps``, the rates, and in the progress bar ``lr`` and ``plateau``; see
    docs/schedules.md.

    Args:
        schedule: ``FastFace(...)``, ``MHLR(...)``, ``AutoWU(...)`` or another
            :class:`~fastface_lightning.schedule.Schedule`; None for ``FastFace()``.
        total_steps: steps that the schedule will take; None to find out from the trainer.
        loss_key: key of the loss in what ``training_step`` returns; None for ``"loss"``, and
            needed under manual optimization.
        read_every: optimizer steps between two readings of the losses; None for 1 on CPU and 32
            on accelerators. Every loss is read where a block moves the scale by more than 5 %.
        monitor: instead of ``loss_key``, the name under which ``training_step`` logs the loss; or
            ``validation_step`` a value to be lowered: each validation then is one step.
        min_lr: no decay takes a rate below it, >= 0; a rate that is lower already stays. Once
            every rate stands there no decay counts.
        optimizers: indices, as ``configure_optimizers`` returns them, of the optimizers to drive;
            None for all.
        log: whether to log at all.

    Attributes:
        changes: decays and restarts so far, those before a resume included; ``step`` counts the
            losses that the schedule was given, from 0.
        state: the schedule's state at the last reading.

    Raises:
        MisconfigurationException: in ``fit``, when the run has no end, something else schedules
            the learning rate, or the loss cannot be found.
        ValueError: an argument out of its range, or, in ``fit``, a checkpoint of another schedule.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from fastface_lightning import MHLR, FastFaceCallback
        >>> trainer = Trainer(callbacks=[FastFaceCallback(MHLR())], logger=False)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        loss_key: str | None = None,
        read_every: int | None = None,
        *,
        monitor: str | None = None,
        min_lr: float = 0.0,
        optimizers: Sequence[int] | None = None,
        log: bool = True,
    ) -> None:
        self.schedule = FastFace() if schedule is None else schedule
        check_schedule(self.schedule)
        for name, steps in (("read_every", read_every), ("total_steps", total_steps)):
            if steps is not None:
                check_count(name, steps, 1, " step")
        if optimizers is not None and (isinstance(optimizers, int) or not optimizers):
            raise ValueError(f"optimizers must be a list of indices, got {optimizers}")
        for index in optimizers or ():
            check_count("optimizers", index, 0)
        if loss_key is not None and monitor is not None:
            raise ValueError(f"give loss_key or monitor, got {loss_key!r} and {monitor!r}")
        self.total_steps, self.read_every = total_steps, read_every
        self.loss_key, self.monitor = loss_key, monitor
        self._rates = Rates(self._groups, min_lr)
        self.optimizers = None if optimizers is None else tuple(optimizers)
        self.logs = log  # Lightning itself sets a callback's `log`
        self._prefix = "-".join(map(str, ("fastface", *(self.optimizers or ()))))
        self._hook: Any = None
        self._reset()

    def _reset(self) -> None:
        self.changes: list[Change] = []
        self._trainer: Trainer | None = None
        self._progress: Progress | None = None
        self._saved: dict[str, Any] = {}  # a checkpoint's state, which only fit takes up
        self._rates = Rates(self._groups, self._rates.min_lr)
        self._micro: list[Tensor] = []  # losses of the micro-batches since the last optimizer step
        # Loss, and whether its step was skipped: known here, or only on the device.
        self._unread: list[tuple[Tensor, bool | Tensor]] = []
        self._global_step = self._position = 0
        self._stepped = self._moves = False  # whether a block moves the scale, as last applied
        self._found_inf: Tensor | None = None
        self._validations = self._validated = False  # whether its steps are; whether one has ended
        self._last_logged: Tensor | None = None
        self._pace = Pace(0)
        self._collective = True

    @property
    def state(self) -> Any:
        return self._progress.state if self._progress else None

    @property
    def state_key(self) -> str:
        # One for each choice of optimizers, so that a trainer may have several callbacks.
        return "FastFaceCallback" + ("" if self.optimizers is None else str([*self.optimizers]))

    def __repr__(self) -> str:
        names = ("total_steps", "loss_key", "read_every", "monitor", "min_lr", "optimizers", "log")
        values = {**vars(self), "min_lr": self._rates.min_lr or None}
        values["log"] = None if self.logs else False
        given = [f"{name}={values[name]!r}" for name in names if values[name] is not None]
        return f"FastFaceCallback({', '.join([repr(self.schedule), *given])})"

    def get_last_lr(self) -> list[float]:
        """The learning rates of the groups it drives, as they stand; waits for tensors."""
        return [float(group["lr"]) for group in self._groups()]

    def _drives(self, trainer: Trainer) -> list[Optimizer]:
        """Its optimizers, as they are now: a run may make new ones."""
        if self.optimizers is None:
            return list(trainer.optimizers)
        if max(self.optimizers, default=0) >= len(trainer.optimizers):
            raise MisconfigurationException(
                f"optimizers must be indices below {len(trainer.optimizers)}, the number that "
                f"configure_optimizers returns, got {self.optimizers}"
            )
        return [trainer.optimizers[index] for index in self.optimizers]

    def _groups(self) -> list[dict[str, Any]]:
        drives = self._drives(self._trainer) if self._trainer else []
        return [group for driven in drives for group in driven.param_groups]

    # Start -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        drives = self._drives(trainer)
        schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
        rivals: list[Any] = [s for s in schedulers if getattr(s, "optimizer", None) in drives]
        rivals += callbacks_of(trainer, "StochasticWeightAveraging")
        others = [c for c in callbacks_of(trainer, "FastFaceCallback") if c is not self]
        rivals += [c for c in others if set(drives) & set(c._drives(trainer))]
        if rivals:
            names = ", ".join(type(rival).__name__ for rival in rivals)
            raise MisconfigurationException(
                f"only one schedule may set the learning rate, got FastFaceCallback and {names}: "
                f"leave one of them out"
            )
        lrs = [group.get("lr") for optimizer in drives for group in optimizer.param_groups]
        if not lrs or any(lr is None for lr in lrs):
            names = ", ".join(type(optimizer).__name__ for optimizer in drives)
            raise MisconfigurationException(
                f"FastFaceCallback needs an optimizer whose groups all have a learning rate, got "
                f"{names or 'none'} from configure_optimizers"
            )
        if not (pl_module.automatic_optimization or self.loss_key or self.monitor):
            raise MisconfigurationException(
                "manual optimization needs FastFaceCallback(loss_key=...), the key of the loss in "
                "what training_step returns, or monitor=..., the name it is logged by, got None"
            )
        if trainer.limit_train_batches == 0:
            rank_zero_warn("limit_train_batches is 0: FastFaceCallback has nothing to schedule")

    # Not before on_train_start, where rates and counters are restored, other callbacks have tuned
    # what they tune, and the loaders are made: counting them earlier would lose their position.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._trainer = trainer
        self._global_step = self._position = trainer.global_step
        self._block = self.read_every or (1 if pl_module.device.type == "cpu" else 32)
        self._rates.read()
        if self._saved:
            self._resume(trainer, self._saved)
        else:
            self._start(trainer, announce=self.monitor is None)
            self._rates.begin(self.state.scale)
            if trainer.global_step:
                how = "for what is left of the run; fit(ckpt_path=...) would go on from a state"
                rank_zero_warn(f"FastFaceCallback starts anew at step {trainer.global_step}, {how}")
        if self._rates.min_lr and self._rates.at_floor(1.0):
            rank_zero_warn(f"no rate is above min_lr={self._rates.min_lr}: none can decay")
        self._hook = register_optimizer_step_post_hook(self._on_optimizer_step)
        if not trainer.fit_loop.restarting:
            self._pace.note(trainer, self._given())

    def _start(self, trainer: Trainer, announce: bool = True) -> None:
        length = self.total_steps or steps_left(trainer, self._validations)
        self._progress = Progress.start(self.schedule, length)
        self._moves = self._progress.moves(self._block)
        self._pace = Pace(self._progress.total_steps, advises=self.total_steps is None)
        if announce:
            self._announce(trainer, self._progress)

    def _announce(self, trainer: Trainer, progress: Progress) -> None:
        """Say what the schedule is, once it is known what its steps are."""
        of = "validations" if self._validations else "optimizer steps"
        rank_zero_info(f"the schedule of {of} is {progress.bound!r}")
        for caution in progress.cautions():
            rank_zero_warn(caution)
        name, settings = type(self.schedule).__name__, values_of(progress.bound)
        for logger in trainer.loggers if self.logs else []:
            # TensorBoard's table of hyper-parameters has one row a run: it stays the user's.
            own: Any = {"metrics": {}} if type(logger).__name__ == "TensorBoardLogger" else {}
            # MLflow's parameters never change: what a resume changes it would refuse.
            if not (self._saved and type(logger).__name__ == "MLFlowLogger"):
                logger.log_hyperparams({self._prefix: {"schedule": name, **settings}}, **own)

    def _resume(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        self._progress, changed = Progress.load(saved, self.schedule)
        self._pace = Pace(self._progress.total_steps, advises=False)
        self._rates.applied, self._validations = saved["applied"], saved["validations"]
        self._moves = saved["moves"]
        self._announce(trainer, self._progress)
        if changed:
            rank_zero_warn(f"the schedule goes on with {'; '.join(changed)}")
        if not self._validations:
            with contextlib.suppress(MisconfigurationException):  # without an end, but a schedule
                self._pace.compare(self.total_steps or self._progress.losses + steps_left(trainer))

    # Steps -------------------------------------------------------------------------------------

    def _on_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler does not call step() after an overflow; only a fused optimizer is called all
        # the same, and finds out on the device.
        if self._trainer and any(optimizer is driven for driven in self._drives(self._trainer)):
            self._stepped = True
            self._found_inf = getattr(optimizer, "found_inf", None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:
            return
        moved = self._global_step != trainer.global_step
        self._global_step = trainer.global_step
        # An optimizer that is none of torch's, or wraps one, may call no hooks.
        hooked = all(hasattr(type(driven).step, "hooked") for driven in self._drives(trainer))
        self._stepped |= moved and not hooked
        if (loss := self._loss(trainer, pl_module, outputs)) is not None:
            self._micro.append(loss)
        if self._stepped or (moved and self.optimizers is None):
            if self._micro:
                skipped = not self._stepped if self._found_inf is None else self._found_inf
                self._unread.append((torch.stack(self._micro).mean(), skipped))
            self._stepped, self._found_inf, self._micro = False, None, []
        # Blocks end at multiples of their length, not once full: at the same steps after a resume.
        # Lightning's counter stands still where its optimizers are stepped behind its back.
        before, self._position = self._position, self._global_step or self._given()
        block = 1 if self._moves else self._block
        if self._position // block > before // block:
            self._read()
            self._rates.apply(self.state.scale)
            self._moves = self._progress.moves(self._block)
        if self.logs and trainer._logger_connector.should_update_logs:
            self._log(trainer, pl_module)

    def _loss(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
        if self.monitor is None:
            # Without outputs training_step has skipped the micro-batch.
            needed = outputs if pl_module.automatic_optimization else self._stepped
            return returned_loss(pl_module, outputs, self.loss_key or "loss", bool(needed))
        value = logged_loss(trainer, self.monitor)
        if value is None or value is self._last_logged:
            return None
        if self._last_logged is None and self._progress and not self._progress.losses:
            self._announce(trainer, self._progress)
        self._last_logged = value
        return scalar(value, self.monitor, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = True
        trained = (self._last_logged is not None or self._progress.losses) and not self._validations
        if self.monitor is None or trained or not was_validated(trainer, self.monitor):
            return
        if not self._validations:  # only now is it known what is monitored
            self._validations = True
            self._start(trainer)
            if self.state.scale != 1:
                raise MisconfigurationException(
                    f"a warm-up needs the loss of training steps, got monitor={self.monitor!r} of "
                    f"validations"
                )
        value = trainer.callback_metrics[self.monitor]
        self._unread.append((scalar(value, self.monitor, pl_module), False))
        self._read()
        self._rates.apply(self.state.scale)

    def _read(self) -> None:
        """Bring the unread losses to the host, in one transfer, and let the schedule take them."""
        trainer = self._trainer
        if not self._unread or self._progress is None or trainer is None:
            return
        unread, self._unread = self._unread, []
        columns = [loss for loss, _ in unread]
        columns += [skip.reshape(()) for _, skip in unread if isinstance(skip, Tensor)]
        lrs = [lr.detach().reshape(()).to(columns[0]) for lr in self._rates.tensors()]
        block = torch.stack([*columns, *lrs])
        if trainer.world_size > 1:
            block = trainer.strategy.reduce(block, reduce_op="mean")
        values = block.tolist()
        found_inf = iter(values[len(unread) :])
        self._rates.read(values[len(columns) :])
        if warning := self._rates.overwritten():
            rank_zero_warn(warning)
        for (_, skipped), loss in zip(unread, values, strict=False):
            # A step that the loss scaler skipped counts only if the loss itself was at fault.
            skips = next(found_inf) > 0 if isinstance(skipped, Tensor) else skipped
            if not (skips and math.isfinite(loss)):
                self._update(loss)
        if self._progress.losses > self._progress.total_steps:
            self._pace.compare(self._progress.losses, so_far=True)

    def _update(self, loss: float) -> None:
        assert self._progress is not None
        before, after = self._progress, self._progress.update(loss)
        rates, old, new = self._rates, before.state.scale, after.state.scale
        if new < old and rates.at_floor(old):
            after = after.without_decay(before)
        self._progress = after
        for remark in after.remarks(before, loss):
            rank_zero_warn(f"step {before.losses}: {remark}")
        if made := after.change(before, 1.0):
            lr = next(filter(None, rates.now()), 0.0)  # of the first group that is not frozen
            was, now = rates.scaled(lr, old), rates.scaled(lr, new)
            made = made._replace(lr=now, factor=now / was if rates.min_lr and was else made.factor)
            self.changes.append(made)
            rank_zero_info(f"step {made.step}: lr {was:.4g} -> {now:.4g} (x {made.factor:g})")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._progress is not None
        lrs = self._rates.now()
        metrics = self._progress.metrics() | {"lr_scale": self.state.scale}
        bar = {f"{self._prefix}/lr": lrs[0]}
        if "plateau" in metrics:
            bar[f"{self._prefix}/plateau"] = metrics.pop("plateau")
        logged = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        if not callbacks_of(trainer, "LearningRateMonitor"):
            names = lr_names(trainer.optimizers)
            drives = range(len(names)) if self.optimizers is None else self.optimizers
            logged |= zip((name for i in drives for name in names[i]), lrs, strict=True)
        # As CPU tensors: Lightning puts a float on the device, where the progress bar waits for it.
        for values, only_bar in ((logged, False), (bar, True)):
            finite = {k: torch.as_tensor(v) for k, v in values.items() if math.isfinite(v)}
            to_logger = bool(trainer.loggers) and not only_bar
            pl_module.log_dict(finite, prog_bar=only_bar, logger=to_logger)

    # The run's length --------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is None:
            return
        given = self._given()
        if self.monitor and not given:
            if self._validated or not trainer.fit_loop.epoch_loop.val_loop.max_batches:
                raise MisconfigurationException(
                    f"monitor must be what training_step or validation_step logs, got "
                    f"{self.monitor!r} of {', '.join(trainer.callback_metrics) or 'nothing'}"
                )
        elif not (self._validations or trainer.should_stop):
            self._pace.project(trainer, given)

    def _given(self) -> int:
        """Losses that the schedule was given, those not read yet among them."""
        return (self._progress.losses if self._progress else 0) + len(self._unread)

    # End and checkpoints -----------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._read()
            # One that was stopped may go on: what a block has decided then comes at its end.
            if not trainer.should_stop or has_ended(trainer):
                self._rates.apply(self.state.scale)
            self._pace.advises &= not trainer.should_stop or bool(callbacks_of(trainer, "Timer"))
            self._pace.compare(self._progress.losses)
        self._release()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self._release()
        self._collective = trainer.world_size == 1  # a rank may be gone

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """What this rank knows; losses not read yet come with :meth:`on_save_checkpoint`."""
        if self._progress is None:
            return copy.deepcopy(self._saved)
        return self._progress.dump() | {
            "applied": self._rates.applied,
            "validations": self._validations,
            "moves": self._moves,
            "changes": [list(made) for made in self.changes],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
        if self._progress is None:  # a run that has ended may not train any more
            self.changes = [Change(*made) for made in state_dict.get("changes", [])]

    def on_save_checkpoint(self, trainer: Trainer, _: Any, checkpoint: dict[str, Any]) -> None:
        # Here every rank is called, so that they may read their losses together.
        if self._collective and self.state_key in checkpoint.get("callbacks", {}):
            self._read()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        fits = trainer.state.fn == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        without = self.state_key not in checkpoint.get("callbacks", {})
        if fits and without and checkpoint.get("lr_schedulers"):
            raise MisconfigurationException(
                "the checkpoint must come from a run with FastFaceCallback, got one with another "
                "scheduler: resume with that one, or start anew from the weights alone"
            )
