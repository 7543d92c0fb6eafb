"""Averaged weights as a Lightning callback: ``Trainer(callbacks=[WeightAverage()])``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ..schedule.length import callbacks_of
from ..schedule.plateau import check_count

AVERAGING = ("WeightAverage", "WeightAveraging", "StochasticWeightAveraging")
SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
STATISTICS = ("running_mean", "running_var")
NONE_YET = "no step has been averaged"


class WeightAverage(Callback):
    r"""Averages the weights over the latest optimizer steps; the average is judged and saved.

    .. math:: \bar\theta \leftarrow \bar\theta + (\theta - \bar\theta)
        \min(1, k / \min(W_n, n - n_0))

    where :math:`\theta` are the parameters and batch norm's running statistics after optimizer
    step n (``trainer.global_step``: it counts the steps of every optimizer), and
    :math:`\bar\theta` their average, which began at step :math:`n_0` and was updated k steps ago.
    The window :math:`W_n` is a share q of the run so far, q n (power average: needs no length of
    the run), or w steps (EMA, at first a running mean). The average is on the weights' device and
    float32 at least; an update is one pass over it, which nothing waits for. Of every other buffer
    the newest counts.

    Training goes on with the raw weights. They stand in the module but while it is validated,
    tested or predicts, where the average is put into the same tensors; so also after ``fit``, until
    others change the weights or :meth:`copy_to` puts it there to stay. What is loaded by
    ``validate(ckpt_path=...)`` and its like is judged as it is, and the average dropped.

    In a checkpoint ``state_dict`` has the average, ``current_model_state`` the raw weights of the
    averaged part; ``fit(ckpt_path=...)`` restores both. Lightning asks no callback for a checkpoint
    of weights alone: call :meth:`copy_to` before ``save_checkpoint(weights_only=True)``.

    One step with weights that are not finite spoils the average. Each validation, each checkpoint
    and the end of ``fit`` look, and drop such an average with a warning: it begins anew at the next
    update. So it does where another parameter has taken the place of one.

    Args:
        window: a float below 1 is q, an int w; None for 0.05.
        decay: of an EMA, in (0, 1), in the place of ``window``: w = 1 / (1 - decay).
        module: what to average, a name that ``get_submodule`` takes; None for the whole.
        every_n_steps: the average is updated after the first step, at the steps that this divides,
            and where ``fit`` ends as planned; fewer than w; None for 1. A validation updates
            nothing and sees an average that is at most so much behind: no resume and no change of
            when one validates makes another average.

    Raises:
        ValueError: an argument out of its range; in ``fit``, an average of another submodule, or a
            checkpoint without the raw weights.
        MisconfigurationException: in ``fit``, when there are no such weights, another callback
            averages, a ModelCheckpoint saves weights alone, the strategy shards the weights, or it
            trains in processes that end with ``fit``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from fastface_lightning import WeightAverage
        >>> trainer = Trainer(callbacks=[WeightAverage()], logger=False)
    """

    def __init__(
        self,
        window: int | float | None = None,
        decay: float | None = None,
        module: str | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        if window is not None and decay is not None:
            raise ValueError(f"give window or decay, got window={window} and decay={decay}")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must lie in (0, 1), got {decay}")
        if isinstance(window, float) and not 0 < window < 1:
            raise ValueError(f"window must be a share in (0, 1) or whole steps, got {window}")
        for name, steps in (("window", window), ("every_n_steps", every_n_steps)):
            if steps is not None and not (name == "window" and isinstance(window, float)):
                check_count(name, steps, 1, " step")
        self.window = 0.05 if window is None and decay is None else window
        self.decay, self.module, self.every_n_steps = decay, module, every_n_steps or 1
        # A share of the run below 1, else steps.
        self._window: float = self.window or 1 / (1 - (decay or 0))
        if 1 <= self._window <= self.every_n_steps:
            raise ValueError(
                f"the window must be longer than every_n_steps, got {self._window:g} and "
                f"{self.every_n_steps}: the average would be the newest weights"
            )
        self._judges = True
        self._drop(NONE_YET)

    def _drop(self, why: str) -> None:
        self._why = why  # there is no average
        self._average: dict[str, Tensor] = {}
        self._of: LightningModule | None = None  # whose weights are averaged, and are to be judged
        self._seen: dict[str, Tensor] = {}  # these weights
        self._left: dict[str, Any] | None = None  # how they were left by a fit that is over
        self._rewritten = False  # by DDP since then, with what they are
        self._raw: dict[str, Tensor] | None = None  # while the average stands in the module
        self._start = self._updated = 0  # global steps: where it began, and of its last update

    def __repr__(self) -> str:
        given = {key: getattr(self, key) for key in ("window", "decay", "module", "every_n_steps")}
        parts = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        return f"WeightAverage({', '.join(parts)})"

    def copy_to(self, pl_module: LightningModule) -> None:
        """Put the average into a LightningModule: the one that was trained, or another like it.

        The one that was trained is from then on judged and saved as it stands.
        """
        if not self._average:
            raise ValueError(f"copy_to needs an average, got none: {self._why}")
        weights = self._weights(pl_module)
        if name := _difference(weights, self._average):
            raise ValueError(f"copy_to needs a module of the same weights, got another {name}")
        _copy(self._average, weights)
        if pl_module is self._of and self._left:
            self._of = None

    @contextmanager
    def judging_raw(self) -> Iterator[None]:
        """Within it the trainer validates, tests and predicts with the raw weights."""
        self._judges = False
        try:
            yield
        finally:
            self._judges = True

    def _weights(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """What is to be averaged, by name in the LightningModule; a tied one by its first."""
        name = self.module or ""
        try:
            part = pl_module.get_submodule(name)
        except AttributeError:
            part = nn.Module()
        statistics = ((k, w) for k, w in part.named_buffers(name) if k.split(".")[-1] in STATISTICS)
        named = chain(part.named_parameters(name), statistics)
        weights = {k: w for k, w in named if w.is_floating_point() or w.is_complex()}
        if not weights:
            raise MisconfigurationException(
                f"module must name a submodule of {type(pl_module).__name__} that has weights, got "
                f"{name!r}"
            )
        return weights

    def _has(self, pl_module: LightningModule) -> bool:
        """Whether there is an average, and of this module."""
        return bool(self._average) and self._of is pl_module

    # Training ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy, self._rewritten = trainer.strategy, False
        kinds = {kind.__name__ for kind in type(strategy).__mro__}
        if "DDPStrategy" in kinds:
            self._look(pl_module)
            self._rewritten = True
        if stage != "fit":
            return
        others = [c for kind in AVERAGING for c in callbacks_of(trainer, kind) if c is not self]
        if others:
            names = f"{type(self).__name__} and {type(others[0]).__name__}"
            raise MisconfigurationException(f"one callback may average the weights, got {names}")
        if any(each.save_weights_only for each in callbacks_of(trainer, "ModelCheckpoint")):
            raise MisconfigurationException(
                "Lightning asks no callback for checkpoints of weights alone, which would hold the "
                "raw ones: ModelCheckpoint needs save_weights_only=False, got True"
            )
        if SHARDING & kinds:
            raise MisconfigurationException(
                f"WeightAverage needs whole weights on every rank, got {type(strategy).__name__}"
            )
        launcher = {kind.__name__ for kind in type(strategy.launcher).__mro__}
        if "_MultiProcessingLauncher" in launcher:  # spawned or forked
            raise MisconfigurationException(
                "the average would end with the processes that a notebook or strategy='ddp_spawn' "
                "trains in: WeightAverage needs one device, or strategy='ddp' in a script"
            )
        if trainer.global_step < self._updated:
            self._drop("it was of an earlier run")

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(pl_module)
        weights = self._weights(pl_module)
        from ..classifiers import ChunkedClassifier  # the callback is imported without faces

        for name, part in pl_module.named_modules():
            split = isinstance(part, ChunkedClassifier) and part.split is not None
            if split and (key := f"{name}.weight".lstrip(".")) in weights:
                raise MisconfigurationException(
                    f"WeightAverage needs whole weights on every rank, got {key}, which is split: "
                    f"module must name the network alone, got {self.module or ''!r}"
                )
        if self._has(pl_module):  # a checkpoint's lies on the host, and in any memory format
            for key, a in self._average.items():
                self._average[key] = torch.empty_like(weights[key], dtype=a.dtype).copy_(a)
        else:
            self._drop(NONE_YET)
            self._of, self._start, self._updated = pl_module, *[trainer.global_step] * 2
        self._left = None
        if not any(w.requires_grad for w in weights.values()):
            rank_zero_warn(f"none of the weights requires a gradient that {self} averages")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.every_n_steps, trainer.global_step
        first = step > self._updated and not self._average
        if first or step // every > self._updated // every:
            self._update(step, pl_module)

    @torch.no_grad()
    def _update(self, step: int, pl_module: LightningModule) -> None:
        weights, elapsed = self._weights(pl_module), step - self._updated
        self._compare(step, weights)
        if not self._average:
            wide = {k: torch.promote_types(w.dtype, torch.float32) for k, w in weights.items()}
            self._average = {k: w.to(wide[k], copy=True) for k, w in weights.items()}
            self._seen = weights
        elif elapsed:
            window = self._window if self._window >= 1 else self._window * step
            gain = min(1.0, elapsed / min(window, step - self._start))
            newest = [weights[k].to(a.dtype) for k, a in self._average.items()]  # most often itself
            torch._foreach_lerp_(list(self._average.values()), newest, gain)
        self._updated = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self._average and not trainer.should_stop:  # else a resume would differ
            self._update(step, pl_module)
        self._check(trainer, pl_module)
        if not self._average and self._why == NONE_YET:
            rank_zero_warn(
                f"no step was averaged: trainer.global_step still is {step}, which counts the "
                f"steps of the optimizers that Lightning gives, as self.optimizers()"
            )
        elif self._window < 1 and self._window * step <= self.every_n_steps:
            rank_zero_warn(
                f"the window must be longer than every_n_steps, got {self._window * step:g} after "
                f"{step} steps and {self.every_n_steps}: the average is the newest weights"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._has(pl_module):  # Lightning has moved the module to the host
            self._average = {key: a.cpu() for key, a in self._average.items()}
            self._left = _state(self._seen)

    def _begin_anew(self, why: str) -> None:
        rank_zero_warn(f"{why}: the average begins anew, from the weights at the next update")
        self._why, self._average, self._start = why, {}, self._updated

    def _compare(self, step: int, weights: dict[str, Tensor]) -> None:
        """The weights are those that were averaged."""
        seen = self._seen
        others = (k for k, w in weights.items() if _is_parameter(w) and w is not seen[k])
        if self._average and (name := _difference(weights, self._average) or next(others, "")):
            self._begin_anew(f"averaged weights must stay, got another {name} at step {step}")

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average is of these weights, finite, and in ``fit`` on all ranks that of rank 0."""
        if not self._has(pl_module):
            return
        self._compare(trainer.global_step, self._weights(pl_module))
        if trainer.world_size > 1 and self._left is None:
            for a in self._average.values():  # batch norm's are of each rank's own images
                dist.broadcast(a, 0)
        if not all(a.isfinite().all() for a in self._average.values()):
            step = trainer.global_step
            self._begin_anew(f"averaged weights must be finite, got others at step {step}")

    def _look(self, pl_module: LightningModule) -> None:
        """After ``fit``: the weights are as it left them."""
        if self._rewritten:  # since setup, where they were looked at: rank 0's, sent to every rank
            self._left, self._rewritten = self._left and _state(self._seen), False
        if self._has(pl_module) and self._left and self._left != _state(self._weights(pl_module)):
            self._drop("the weights were changed after fit")
            rank_zero_warn(f"{self._why}, so that their average no longer counts: it is dropped")

    # Evaluation --------------------------------------------------------------------------------

    @torch.no_grad()
    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._check(trainer, pl_module)
        elif trainer.ckpt_path and self._has(pl_module):
            self._drop(f"{trainer.ckpt_path} was loaded in the place of what was trained")
        self._look(pl_module)
        if self._judges and self._raw is None and self._has(pl_module):
            weights = self._weights(pl_module)
            self._raw = {key: w.clone() for key, w in weights.items()}
            _copy(self._average, weights)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy(self._raw, self._weights(pl_module))
            self._raw = None
            self._left = self._left and _state(self._seen)

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(trainer, pl_module)
        self._left = self._left or _state(self._seen)  # Lightning calls no teardown

    # Checkpoints -------------------------------------------------------------------------------

    def _every_name(
        self, tensors: dict[str, Tensor], pl_module: LightningModule
    ) -> dict[str, Tensor]:
        """Also by the other names of tied weights."""
        first = {id(w): key for key, w in self._weights(pl_module).items()}
        names = (pl_module.named_parameters, pl_module.named_buffers)
        named = chain.from_iterable(each(remove_duplicate=False) for each in names)
        return {key: tensors[first[id(w)]] for key, w in named if id(w) in first}

    def state_dict(self) -> dict[str, Any]:
        settings = {"module": self.module or "", "window": self._window, "says": repr(self)}
        at = {"every": self.every_n_steps, "start": self._start, "updated": self._updated}
        return settings | at if self._average else {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(pl_module)
        self._check(trainer, pl_module)
        if not self._has(pl_module):
            checkpoint["callbacks"].pop(self.state_key, None)
            return
        state, average = checkpoint["state_dict"], self._every_name(self._average, pl_module)
        raw = {**state, **self._every_name(self._raw, pl_module)} if self._raw else {**state}
        part = [key for key in state if key in average or _within(key, self.module)]
        checkpoint["current_model_state"] = {key: raw[key] for key in part}
        state.update((key, a) for key, a in average.items() if key in state)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        self._drop(NONE_YET)
        saved, step = checkpoint["callbacks"].get(self.state_key), checkpoint["global_step"]
        raw, state = checkpoint.get("current_model_state", {}), checkpoint["state_dict"]
        if saved:
            if saved["module"] != (self.module or ""):
                raise ValueError(
                    f"module must be {saved['module']!r}, what the checkpoint's average is of, got "
                    f"{self.module or ''!r}"
                )
            same = math.isclose(saved["window"], self._window, rel_tol=1e-9)
            if not same or saved["every"] != self.every_n_steps:
                rank_zero_warn(f"the average by {saved['says']} goes on by {self}")
            self._of, self._seen = pl_module, self._weights(pl_module)
            self._start, self._updated = saved["start"], saved["updated"]
            self._average = {k: state.get(k, w.detach()) for k, w in self._seen.items()}
        elif step:
            rank_zero_warn(f"the checkpoint has no average: one begins at step {step}")
        if saved or raw:
            name = self.module or ""
            own = pl_module.get_submodule(name).state_dict(prefix=name and f"{name}.")
            if lost := next((key for key in state if key in own and key not in raw), None):
                raise ValueError(f"the checkpoint must have the raw {lost}, got none")
        pl_module.load_state_dict(raw, strict=False)


def _within(key: str, module: str | None) -> bool:
    return not module or key.startswith(f"{module}.")


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """First name that one of them lacks, or of tensors of two shapes."""
    shapes = [{key: w.shape for key, w in each.items()} for each in (a, b)]
    return next((k for k in {**a, **b} if shapes[0].get(k) != shapes[1].get(k)), "")


def _state(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Another one, once anyone writes to a parameter."""
    return {key: (id(w), w.shape, w._version) for key, w in weights.items() if _is_parameter(w)}


def _is_parameter(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter)  # buffers are others once the device changes


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """By name, whatever their devices and dtypes."""
    for key, w in weights.items():
        w.copy_(tensors[key])
