"""The schedules as a Lightning callback: ``Trainer(callbacks=[FastFaceCallback()])``."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from .base import Progress, Schedule, left_out
from .fastface import FastFace
from .lr_scheduler import set_lr
from .replay import Change, change


class FastFaceCallback(Callback):
    """Watches the training loss and scales every learning rate of the run.

    Needs no argument: the run's length comes from the trainer, the base learning rates from the
    optimizers, the loss from ``training_step``. The schedule takes one step for every optimizer
    step that really happened, with the mean loss of its micro-batches and ranks.

    Losses stay on their device and are read in blocks, so that training never waits for them. A
    decision belongs to its step; the learning rate follows when the block is read, at most
    ``read_every - 1`` steps late, and at the same steps whether the run was interrupted or not.

    Logged, every ``log_every_n_steps``: ``fastface/lr_scale``, ``fastface/response``,
    ``fastface/threshold``, ``fastface/plateau_steps`` and ``lr-<optimizer>[/pg<group>]``; the
    first group's rate and the progress to the next decay also show in the progress bar, as
    ``fastface/lr`` and ``fastface/plateau``.

    Args:
        schedule: ``FastFace(...)``, ``MHLR(...)`` or another
            :class:`~fastface_lightning.schedule.Schedule`; None for ``FastFace()``.
        total_steps: optimizer steps of the whole run; None to take them from the trainer.
        loss_key: key of the loss in what ``training_step`` returns. Needed under manual
            optimization. The default loss is Lightning's own.
        read_every: optimizer steps between two readings of the losses; None for 1 on CPU and 32
            on accelerators.

    Attributes:
        changes: decays and restarts so far, those before a resume included.
        state: the schedule's state at the last reading.

    Raises:
        MisconfigurationException: at the start of ``fit``, when the run has no end, something else
            schedules the learning rate, or the loss cannot be found.
        ValueError: ``read_every`` below 1, or a checkpoint of another schedule.

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
    ) -> None:
        for name, steps in (("read_every", read_every), ("total_steps", total_steps)):
            if steps is not None and steps < 1:
                raise ValueError(f"{name} must be at least 1 step, got {steps}")
        self.schedule = schedule or FastFace()
        self.total_steps = total_steps
        self.loss_key = loss_key
        self.read_every = read_every
        self._reset()

    def _reset(self) -> None:
        self.changes: list[Change] = []
        self._progress: Progress | None = None
        self._base_lrs: list[list[float]] = []
        self._micro: list[Tensor] = []  # losses of the micro-batches since the last optimizer step
        # Step, loss, and whether the step was skipped: known here, or only on the device.
        self._unread: list[tuple[int, Tensor, bool | Tensor]] = []
        self._stepped = False
        self._found_inf: Tensor | None = None
        self._global_step = 0
        self._trainer: Trainer | None = None
        self._hooks: list[Any] = []
        self._began_at = 0  # optimizer step of the run

    @property
    def state(self) -> Any:
        return self._progress.state if self._progress else None

    # Start -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._progress = None  # whatever checkpoint it started from
            return
        self._refuse_rivals(trainer)
        if not pl_module.automatic_optimization and self.loss_key is None:
            raise MisconfigurationException(
                "manual optimization needs FastFaceCallback(loss_key=...), the key of the loss in "
                "what training_step returns, got None"
            )
        if self._progress is None:
            left = (self.total_steps or total_steps_of(trainer)) - self._began_at
            self._progress = Progress.start(self.schedule, max(1, left))
            # A resumed optimizer gets its state, and with it a scaled rate, only after this hook.
            self._base_lrs = [[float(g["lr"]) for g in o.param_groups] for o in trainer.optimizers]
        self._block = self.read_every or (1 if pl_module.device.type == "cpu" else 32)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is None:
            return
        self._trainer = trainer
        self._global_step = trainer.global_step
        hook = self._on_optimizer_step
        self._hooks = [optimizer.register_step_post_hook(hook) for optimizer in trainer.optimizers]
        if self.state.step == 0:
            self._apply(trainer)
        # Not in an earlier hook: counting steps makes the loaders, which would then lose the
        # position that a checkpoint has for them.
        sentence = self._progress.describe()
        length = getattr(self._progress.bound, "total_steps", None)
        rank_zero_info(sentence)
        with contextlib.suppress(MisconfigurationException):  # without an end, but a schedule
            now = self.total_steps or total_steps_of(trainer)
            if length and length != now - self._began_at:
                rank_zero_warn(
                    f"the run now has {now} steps; its schedule stays as it was made for {length}: "
                    f"{sentence}"
                )

    def _refuse_rivals(self, trainer: Trainer) -> None:
        rivals: list[Any] = [c.scheduler for c in trainer.lr_scheduler_configs]
        rivals += callbacks_of(trainer, StochasticWeightAveraging)
        if rivals:
            names = ", ".join(type(rival).__name__ for rival in rivals)
            raise MisconfigurationException(
                f"only one schedule may set the learning rate, got FastFaceCallback and {names}: "
                f"leave one of them out"
            )
        if not any(optimizer.param_groups for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "FastFaceCallback needs an optimizer, got none from configure_optimizers"
            )

    # Steps -------------------------------------------------------------------------------------

    def _on_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler does not call step() after an overflow; only a fused optimizer is called all
        # the same, and finds out on the device.
        self._stepped = True
        self._found_inf = getattr(optimizer, "found_inf", None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress is None:
            return
        self._collect(trainer, pl_module, outputs)
        if trainer.global_step != self._global_step:
            self._close_step(trainer)
        if trainer._logger_connector.should_update_logs:
            self._log(trainer, pl_module)

    def _collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        if not outputs and (pl_module.automatic_optimization or not self._stepped):
            return  # training_step returned None: this micro-batch was skipped
        key = self.loss_key or "loss"
        if key not in outputs:
            got = ", ".join(map(str, outputs)) or "nothing"
            raise MisconfigurationException(
                f"training_step must return loss_key={key!r}, got {got}"
            )
        loss = torch.as_tensor(outputs[key], dtype=torch.float32, device=pl_module.device)
        divided_by = trainer.accumulate_grad_batches if key == "loss" else 1
        self._micro.append(loss.detach().reshape(()) * divided_by)

    def _close_step(self, trainer: Trainer) -> None:
        """Keep the optimizer step's mean loss; at the end of a block, read and decide."""
        before, self._global_step = self._global_step, trainer.global_step
        if self._micro:
            loss = torch.stack(self._micro).mean()
            skipped = not self._stepped if self._found_inf is None else self._found_inf
            self._unread.append((trainer.global_step - 1, loss, skipped))
        self._stepped, self._found_inf, self._micro = False, None, []
        # Blocks end at multiples of their length, not once full: at the same steps after a resume.
        if trainer.global_step // self._block > before // self._block:
            self._read(trainer)
            self._apply(trainer)

    def _read(self, trainer: Trainer) -> None:
        """Bring the unread losses to the host, in one transfer, and let the schedule take them."""
        if not self._unread or self._progress is None:
            return
        unread, self._unread = self._unread, []
        columns = [loss for _, loss, _ in unread]
        columns += [skip.reshape(()) for _, _, skip in unread if isinstance(skip, Tensor)]
        block = torch.stack(columns)
        if trainer.world_size > 1:
            block = trainer.strategy.reduce(block, reduce_op="mean")
        values = block.tolist()
        found_inf = iter(values[len(unread) :])
        for (step, _, skipped), loss in zip(unread, values, strict=False):
            # A step that the loss scaler skipped counts only if the loss itself was at fault.
            if isinstance(skipped, Tensor):
                skipped = next(found_inf) > 0
            if not (skipped and math.isfinite(loss)):
                self._update(step, loss)

    def _update(self, step: int, loss: float) -> None:
        assert self._progress is not None
        before = self.state
        self._progress = self._progress.update(loss)
        if warning := left_out(before, self.state, loss):
            rank_zero_warn(f"step {step}: {warning}")
        made = change(before, self.state, step, self._base_lrs[0][0])
        if made:
            self.changes.append(made)
            rank_zero_info(
                f"step {step}: lr {made.lr / made.factor:.4g} -> {made.lr:.4g} (x {made.factor:g})"
            )

    def _apply(self, trainer: Trainer) -> None:
        """Set every group to its base learning rate times the scale."""
        scale = self.state.scale
        for optimizer, base_lrs in zip(trainer.optimizers, self._base_lrs, strict=True):
            # A group that joined the run (as fine-tuning callbacks add them) keeps its own rate.
            for group in optimizer.param_groups[len(base_lrs) :]:
                base_lrs.append(float(group["lr"]) / scale)
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=False):
                set_lr(group, base_lr * scale)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._progress is not None
        scale = self.state.scale
        metrics = self._progress.metrics() | {"lr_scale": scale}
        rates = [
            # One that lives on the device is computed: reading it would wait.
            base_lr * scale if isinstance(group["lr"], Tensor) else group["lr"]
            for optimizer, base_lrs in zip(trainer.optimizers, self._base_lrs, strict=True)
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=False)
        ]
        bar = {"fastface/lr": rates[0]}
        if "plateau" in metrics:
            bar["fastface/plateau"] = metrics.pop("plateau")
        logged = {f"fastface/{name}": v for name, v in metrics.items() if math.isfinite(v)}
        logged |= zip(lr_names(trainer.optimizers), rates, strict=True)
        # As CPU tensors: Lightning puts a float on the device, where the progress bar waits for it.
        pl_module.log_dict({name: torch.as_tensor(v) for name, v in logged.items()})
        pl_module.log_dict(
            {name: torch.as_tensor(v) for name, v in bar.items()}, prog_bar=True, logger=False
        )

    # End and checkpoints -----------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            self._read(trainer)
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()
        if trainer.world_size > 1:
            self._trainer = None  # no collective read for a checkpoint now: a rank may be gone

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        if self._progress is None:
            return {}
        if self._trainer is not None:
            self._read(self._trainer)
        return self._progress.dump() | {
            "base_lrs": self._base_lrs,
            "began_at": self._began_at,
            "changes": [list(made) for made in self.changes],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._progress = Progress.load(state_dict, self.schedule)
        self._base_lrs = state_dict["base_lrs"]
        self._began_at = state_dict["began_at"]
        self.changes = [Change(*made) for made in state_dict["changes"]]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.state_key in checkpoint.get("callbacks", {}) or not checkpoint.get("global_step"):
            return
        if checkpoint.get("lr_schedulers"):
            raise MisconfigurationException(
                "the checkpoint must come from a run with FastFaceCallback, got one with another "
                "scheduler: resume with that one, or start anew from the weights alone"
            )
        self._began_at = checkpoint["global_step"]
        rank_zero_warn(
            f"the checkpoint holds no state of FastFaceCallback: its schedule starts anew at step "
            f"{self._began_at}, for what is left of the run"
        )


def total_steps_of(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, as the trainer's settings imply."""
    accumulation = callbacks_of(trainer, GradientAccumulationScheduler)
    if not accumulation or trainer.max_epochs == -1:
        steps = trainer.estimated_stepping_batches
    else:  # Lightning's estimate does not serve accumulation that changes by epoch
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        batches = trainer.num_training_batches
        if batches < math.inf:
            factors = map(
                accumulation[0].get_accumulate_grad_batches, range(trainer.max_epochs or 1)
            )
            steps = min(steps, sum(math.ceil(batches / factor) for factor in factors))
    if not 0 <= steps < math.inf:
        raise MisconfigurationException(
            "FastFaceCallback needs the length of the run, got a trainer without an end: set "
            "max_steps or max_epochs, or FastFaceCallback(total_steps=...)"
        )
    return max(1, int(steps))


def callbacks_of(trainer: Trainer, kind: type) -> list[Any]:
    """The trainer's callbacks of a class."""
    return [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]


def lr_names(optimizers: list[Optimizer]) -> list[str]:
    """A name for every parameter group, as Lightning's LearningRateMonitor has them."""
    names: list[str] = []
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    for i, (kind, optimizer) in enumerate(zip(kinds, optimizers, strict=True)):
        number = kinds[:i].count(kind)
        name = f"lr-{kind}-{number}" if number else f"lr-{kind}"
        groups = optimizer.param_groups
        several = [f"{name}/{g.get('name', f'pg{k}')}" for k, g in enumerate(groups, 1)]
        names += several if len(groups) > 1 else [name]
    return names
