"""Averaged weights as a Lightning callback: ``Trainer(callbacks=[WeightAverage()])``."""

from __future__ import annotations

from functools import partial
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


class WeightAverage(Callback):
    r"""Averages the weights over the latest optimizer steps; the average is judged and saved.

    .. math:: \bar\theta \leftarrow \bar\theta + (\theta - \bar\theta)
        \min(1, k / \min(W_n, n - n_0))

    where :math:`\theta` are the weights and floating-point buffers, such as batch norm's, after
    optimizer step n (``trainer.global_step``: it counts the steps of every optimizer), and
    :math:`\bar\theta` their average, which began at step :math:`n_0` and was updated k steps ago.
    The window :math:`W_n` is a share q of the run so far, q n (power average: needs no length of
    the run), or w steps (EMA, at first a running mean). The average is on the weights' device and
    float32 at least; an update is one pass over it, which nothing waits for.

    Training goes on with the raw weights. They stand in the module but while it is validated,
    tested or predicts, where the average is put into the same tensors; so also after ``fit``, when
    :meth:`copy_to` puts it there to stay. What is loaded by ``validate(ckpt_path=...)`` and its
    like is judged as it is, and the average dropped.

    In a checkpoint ``state_dict`` has the average, ``current_model_state`` the raw weights of the
    averaged part; ``fit(ckpt_path=...)`` restores both. For checkpoints of weights alone the
    LightningModule's own ``state_dict()`` has the average during ``fit``; after it, call
    :meth:`copy_to` before ``save_checkpoint(weights_only=True)``, which asks no callback.

    One step with weights that are not finite spoils the average. Each validation and the end of
    ``fit`` look, and drop such an average with a warning: it begins anew at the next update.

    Args:
        window: a float below 1 is q, an int w; None for 0.1.
        decay: of an EMA, in (0, 1), in the place of ``window``: w = 1 / (1 - decay).
        module: what to average, a name that ``get_submodule`` takes (``""`` is the whole); None for
            ``backbone`` where the LightningModule has one, else the whole.
        every_n_steps: optimizer steps between two updates, fewer than w; None for 1.

    Attributes:
        judges: False to validate, test and predict with the raw weights.

    Raises:
        ValueError: an argument out of its range; in ``fit``, an average of another submodule.
        MisconfigurationException: in ``fit``, when there are no such weights, another callback
            averages, or the strategy shards the weights.

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
            if steps is not None and not isinstance(window, float):
                check_count(name, steps, 1, " step")
        self.window = 0.1 if window is None and decay is None else window
        self.decay, self.module, self.every_n_steps = decay, module, every_n_steps or 1
        # A share of the run below 1, else steps.
        self._window: float = self.window or 1 / (1 - (decay or 0))
        if 1 <= self._window <= self.every_n_steps:
            raise ValueError(
                f"the window must be longer than every_n_steps, got {self._window:g} and "
                f"{self.every_n_steps}: the average would be the newest weights"
            )
        self.judges = True
        self._hook: Any = None
        self._drop()

    def _drop(self) -> None:
        self._name, self._part = "", nn.Module()  # what is averaged
        self._average: list[Tensor] = []  # of _floats(self._part), in their order; empty: none yet
        self._raw: list[Tensor] | None = None  # while the average stands in the module
        self._start = self._updated = 0  # global steps: where it began, and of its last update

    def __repr__(self) -> str:
        given = {key: getattr(self, key) for key in ("window", "decay", "module", "every_n_steps")}
        parts = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        return f"WeightAverage({', '.join(parts)})"

    def copy_to(self, pl_module: LightningModule) -> None:
        """Put the average into a LightningModule: the one that was trained, or another like it."""
        if not self._average:
            raise ValueError("copy_to needs an average, got none: no step has been averaged")
        _copy(self._average, self._find(pl_module)[1])

    def _find(self, pl_module: LightningModule) -> tuple[str, nn.Module]:
        """Name of what is to be averaged, and itself."""
        name = self.module
        if name is None:
            name = "backbone" if "backbone" in dict(pl_module.named_children()) else ""
        try:
            part = pl_module.get_submodule(name)
        except AttributeError:
            part = nn.Module()
        if not _floats(part):
            raise MisconfigurationException(
                f"module must name a submodule of {type(pl_module).__name__} that has weights, got "
                f"{name!r}"
            )
        return name, part

    def _has(self, pl_module: LightningModule) -> bool:
        """Whether there is an average, and of this module."""
        return bool(self._average) and self._find(pl_module)[1] is self._part

    # Training ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        others = [c for kind in AVERAGING for c in callbacks_of(trainer, kind) if c is not self]
        if others:
            names = f"{type(self).__name__} and {type(others[0]).__name__}"
            raise MisconfigurationException(f"one callback may average the weights, got {names}")
        strategy = type(trainer.strategy)
        if SHARDING & {kind.__name__ for kind in strategy.__mro__}:
            raise MisconfigurationException(
                f"WeightAverage needs whole weights on every rank, got {strategy.__name__}"
            )
        if trainer.global_step < self._updated:  # the average is of an earlier run
            self._drop()
        self._release()
        self._hook = pl_module.register_state_dict_post_hook(partial(self._replace))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has(pl_module):  # a checkpoint's lies on the host, and in any memory format
            pairs = zip(_floats(self._part), self._average, strict=True)
            self._average = [torch.empty_like(w, dtype=a.dtype).copy_(a) for w, a in pairs]
        else:
            self._drop()
            self._name, self._part = self._find(pl_module)
            self._start = self._updated = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, elapsed = trainer.global_step, trainer.global_step - self._updated
        if elapsed < self.every_n_steps:  # as while gradients accumulate
            return
        self._updated, weights = step, _floats(self._part)
        if not self._average:
            wide = [torch.promote_types(w.dtype, torch.float32) for w in weights]
            self._average = [w.to(d, copy=True) for w, d in zip(weights, wide, strict=True)]
        else:
            pairs = zip(weights, self._average, strict=True)
            weights = [w.to(a.dtype) for w, a in pairs]  # most often w itself
            window = self._window if self._window >= 1 else self._window * step
            gain = elapsed / min(window, step - self._start)
            torch._foreach_lerp_(self._average, weights, min(1.0, gain))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # Lightning has moved the module to the host, too
            self._average = [a.cpu() for a in self._average]
            self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _check(self, trainer: Trainer) -> None:
        """The average is finite, and on all ranks the one that is saved."""
        if trainer.world_size > 1:  # batch norm's statistics are of each rank's own images
            for a in self._average:
                dist.broadcast(a, 0)
        if not all(a.isfinite().all() for a in self._average):
            rank_zero_warn(
                f"averaged weights must be finite, got others at step {trainer.global_step}: the "
                f"average begins anew, from the weights as they are at the next update"
            )
            self._average, self._start = [], self._updated

    # Evaluation --------------------------------------------------------------------------------

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._check(trainer)
        elif trainer.ckpt_path:  # the module holds what the file holds
            self._drop()
        if self.judges and self._raw is None and self._has(pl_module):
            self._raw = [w.clone() for w in _floats(self._part)]
            _copy(self._average, self._part)

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy(self._raw, self._part)
            self._raw = None

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave(trainer, pl_module)
        self._release()

    # Checkpoints -------------------------------------------------------------------------------

    def _keyed(self, tensors: list[Tensor], pl_module: LightningModule) -> dict[str, Tensor]:
        """Tensors in the order of _floats, by all their keys in the module's state_dict."""
        of = dict(zip(map(id, _named(self._part, every=False).values()), tensors, strict=True))
        return {name: of[id(w)] for name, w in _named(pl_module).items() if id(w) in of}

    def _replace(self, pl_module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if self._has(pl_module):
            for name, a in self._keyed(self._average, pl_module).items():
                if prefix + name in state_dict:
                    state_dict[prefix + name] = a

    def state_dict(self) -> dict[str, Any]:
        at = {"module": self._name, "start": self._start, "updated": self._updated}
        return {"settings": repr(self), **at} if self._average else {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._has(pl_module):
            raw = self._keyed(self._raw or _floats(self._part), pl_module)
            state, prefix = checkpoint["state_dict"], f"{self._name}." if self._name else ""
            checkpoint["current_model_state"] = {
                k: raw.get(k, v) for k, v in state.items() if k in raw or k.startswith(prefix)
            }
            self._replace(pl_module, state, "", None)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        self._drop()
        saved, step = checkpoint["callbacks"].get(self.state_key), checkpoint["global_step"]
        if saved:
            self._name, self._part = self._find(pl_module)
            if saved["module"] != self._name:
                raise ValueError(
                    f"module must be {saved['module']!r}, what the checkpoint's average is of, got "
                    f"{self._name!r}"
                )
            if saved["settings"] != repr(self):
                rank_zero_warn(f"the average by {saved['settings']} goes on by {self}")
            self._start, self._updated = saved["start"], saved["updated"]
            weights, state = _floats(self._part), checkpoint["state_dict"]
            keys = {id(w): key for key, w in self._keyed(weights, pl_module).items()}
            self._average = [state.get(keys[id(w)], w) for w in weights]
        elif step:
            rank_zero_warn(f"the checkpoint has no average: one begins at step {step}")
        if raw := checkpoint.get("current_model_state"):
            pl_module.load_state_dict(raw, strict=False)


def _named(module: nn.Module, every: bool = True) -> dict[str, Tensor]:
    """The floating-point parameters and buffers; ``every`` name of a tied one, or its first."""
    parts = (module.named_parameters, module.named_buffers)
    pairs = chain.from_iterable(names(remove_duplicate=not every) for names in parts)
    return {name: w for name, w in pairs if w.is_floating_point()}


def _floats(module: nn.Module) -> list[Tensor]:
    """Each of them once, to be written to."""
    return [w.detach() for w in _named(module, every=False).values()]


@torch.no_grad()
def _copy(tensors: list[Tensor], module: nn.Module) -> None:
    """Into :func:`_floats` of a module, whatever their devices and dtypes."""
    for w, tensor in zip(_floats(module), tensors, strict=True):
        w.copy_(tensor)
