"""Backbone, classifier and margin trained together: images and identities in, a loss out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..backbones import load_weights, normalise
from ..backbones.weights import check_finite, read_file, read_weights
from ..classifiers import (
    ChunkedClassifier,
    DynamicClassPool,
    MomentumClassifier,
    PartialClassifier,
)
from ..data import People
from ..data.augment import Augment
from ..evaluation import ROC, ROCCurve, VerificationAccuracy
from ..optim import RowSparse, match_memory_format
from ..schedule.length import callbacks_of
from .resumed import check_schedulers, optimizer_record, set_optimizer

log = logging.getLogger(__name__)
PAIRS = 2**14  # compared at a time
ROW_BY_ROW = (RowSparse, SGD, Adam, RMSprop, Adagrad)
LEFT_OVER = 0.1  # highest share of its first weights that a momentum encoder should end with


class FaceModule(LightningModule):
    """Train a backbone under a margin-softmax classifier and verify it on pairs.

    Args:
        backbone: float RGB (N, 3, 112, 112) in [-1, 1] to embeddings (N, D).
        classifier: embeddings (N, D) and labels (N,) int64 to the scalar mean loss; or a
            :class:`fastface_lightning.classifiers.MomentumClassifier`, which is asked for its
            ``training_loss`` and whose momentum encoder follows the backbone from step to step.
        optimizer: takes parameters, or groups of them, gives the optimizer.
        scheduler: takes the optimizer and the run's optimizer steps, gives a torch scheduler that
            steps once an optimizer step; None where a callback sets the learning rate.
        verify_names: name of each validation loader's set of pairs, in order.
        classifier_lr: base learning rate of the classifier; None is the optimizer's own.
        no_decay: keep weights of one dimension (biases, batch norms, PReLUs) and those that the
            backbone names (its ``no_weight_decay()``) from the weight decay.
        layer_decay: in (0, 1]: the learning rate of each layer of the backbone is multiplied by
            layer_decay^(layers above it). Its layers are those of its ``group_matcher()``, as
            timm's networks have it; its head is the last of them. None: all have the same.
        augment: changes a batch of uint8 images on their device; None mirrors half of them.

    Batches are what :class:`fastface_lightning.data.FaceDataModule` gives: for training images
    uint8 (N, 3, 112, 112) RGB and labels (N,) int64, or a dict of such for a MomentumClassifier;
    for validation the two images of each pair, whether they show one person, and the pair's number,
    or images and their places in a :class:`fastface_lightning.data.PairImages`.

    Logs ``train/loss`` (every step), of a DynamicClassPool ``train/in_pool``, and for each set of
    pairs ``verify/<set>/accuracy`` and ``verify/<set>/std`` (ten folds), with their mean over the
    sets as ``verify/accuracy``.

    Attributes:
        curves: ROC of each set at the last verification, by its name; a set whose pairs are all of
            one person, or all of two, has none.
        rates: likewise :func:`fastface_lightning.evaluation.rates_at_far`, of the cosines, where
            all are finite.
        verify_as: what the names of a verification's figures begin with: ``verify``, unless
            :meth:`verifying_as` says otherwise.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer, int], Any] | None = None,
        verify_names: Sequence[str] = (),
        classifier_lr: float | None = None,
        no_decay: bool = False,
        layer_decay: float | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if classifier_lr is not None and not 0 <= classifier_lr < float("inf"):
            raise ValueError(f"classifier_lr must be at least 0 and finite, got {classifier_lr}")
        if not isinstance(no_decay, bool):
            raise ValueError(f"no_decay must be true or false, got {no_decay!r}")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
        self.backbone = backbone
        self.classifier = classifier
        if isinstance(classifier, MomentumClassifier):
            if classifier_lr is not None:
                raise ValueError(
                    f"classifier_lr must be null where no centres are learned, got {classifier_lr}"
                )
            classifier.follow(backbone)
            # They are the same on every rank already; DDP would send them around at every step.
            buffers = [f"classifier.{name}" for name, _ in classifier.named_buffers(recurse=False)]
            self._ddp_params_and_buffers_to_ignore = buffers
        self._followed_step: int | None = None
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.verify_names = list(verify_names)
        self.classifier_lr = classifier_lr
        self.no_decay, self.layer_decay = no_decay, layer_decay
        self.augment = Augment() if augment is None else augment
        self.metrics = nn.ModuleList(VerificationAccuracy() for _ in verify_names)
        self.rocs = nn.ModuleList(ROCCurve() for _ in verify_names)
        self.curves: dict[str, ROC] = {}
        self.rates: dict[str, dict[str, Any]] = {}
        self.verify_as = "verify"
        self._resumed_from: dict[str, Any] = {}
        self._optimizer_record: dict[str, Any] = {}
        self._reduce_loss = False

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, D), not normalised, of images (N, 3, 112, 112) uint8 RGB."""
        return self.backbone(normalise(images))

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, D) float32 of an image and its mirror image, summed."""
        return F.normalize(self(images).float() + self(images.flip(-1)).float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self.classifier, MomentumClassifier):
            self.classifier.check_batch(batch)
            if self._followed_step != self.trainer.global_step:  # once, whatever accumulates
                self._followed_step = self.trainer.global_step
                self.classifier.update_momentum_encoder(self.backbone)
            inputs = {
                name: (normalise(self.augment(images)), labels)
                for name, (images, labels) in batch.items()
            }
            loss = self.classifier.training_loss(self.backbone, inputs)
        elif isinstance(batch, dict):
            raise ValueError(
                f"{type(self.classifier).__name__} trains on images and labels, got a dict of "
                f"{', '.join(batch)}"
            )
        else:
            images, labels = batch
            loss = self.classifier(self(self.augment(images)), labels)
        self.log("train/loss", loss, batch_size=images_in(batch), sync_dist=self._reduce_loss)
        if isinstance(self.classifier, DynamicClassPool):
            share = torch.tensor(self.classifier.in_pool)  # not on the device: it would wait
            self.log("train/in_pool", share, batch_size=images_in(batch))
        if batch_idx % max(self.trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            # The progress bar reads what it shows at every step: on the device it would wait.
            self.log("loss", loss.detach().cpu(), prog_bar=True, logger=False)
        return loss

    def validation_step(
        self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if len(batch) == 2:  # images whose pairs are compared at the end
            images, places = batch
            self._embedded.setdefault(dataloader_idx, []).append((places, self.embed(images)))
            return
        a, b, same, index = batch
        self._compare(dataloader_idx, self.embed(a), self.embed(b), same, index)

    def _compare(self, number: int, a: Tensor, b: Tensor, same: Tensor, index: Tensor) -> None:
        """Give pairs of embeddings (N, D) to the metrics of a set."""
        # What is not finite becomes a mistaken pair: a deep network gives such before its batch
        # norms have seen any image, and no run should end for it.
        lost = ~(a.isfinite().all(1) & b.isfinite().all(1))
        self._lost[number, 0] += lost.sum()
        self._lost[number, 1] += len(lost)
        unit = F.one_hot(torch.zeros_like(same, dtype=torch.int64), a.shape[1]).to(a)
        opposite = torch.where(same[:, None], -unit, unit)  # as unlike, or as alike, as can be
        a, b = a.where(~lost[:, None], unit), b.where(~lost[:, None], opposite)
        self.metrics[number].update(a, b, same, index)  # type: ignore[operator]
        self.rocs[number].update((a * b).sum(1), same, index)  # type: ignore[operator]

    def _compare_recurring(self, number: int) -> None:
        """Compare a set's pairs by the embeddings of its images, of which each rank has a part."""
        places, units = map(torch.cat, zip(*self._embedded[number], strict=True))
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather((places, units))
            places, units = (part.flatten(0, 1) for part in gathered)
        loaders: Any = self.trainer.val_dataloaders
        images = (loaders if isinstance(loaders, list) else [loaders])[number].dataset
        table = units.new_zeros(len(images), units.shape[1])
        embedded = torch.zeros(len(images), dtype=torch.bool, device=units.device)
        table[places], embedded[places] = units, True
        index = images.index.to(units.device)
        usable = embedded[index].all(1).nonzero()[:, 0]
        mine = usable[self.trainer.global_rank :: self.trainer.world_size]
        same = images.same.to(units.device)
        for pairs in mine.split(PAIRS):
            a, b = table[index[pairs, 0]], table[index[pairs, 1]]
            self._compare(number, a, b, same[pairs], pairs)

    def on_validation_epoch_start(self) -> None:
        # Of sets whose images recur, places and embeddings.
        self._embedded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        # Pairs whose embeddings are not finite, and all pairs, of each set.
        self._lost = torch.zeros(len(self.metrics), 2, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        for number in self._embedded:
            self._compare_recurring(number)
        self.curves, self.rates = {}, {}
        counts = self.trainer.strategy.reduce(self._lost, reduce_op="sum").tolist()
        accuracies = []
        metric: Any
        roc: Any
        for name, metric, roc, (lost, pairs) in zip(
            self.verify_names, self.metrics, self.rocs, counts, strict=True
        ):
            accuracies.append(metric.compute())
            if lost:
                text = "%s: of %d of %d pairs the embeddings are not finite, %s"
                mistaken = "which counts as mistaken" if lost < pairs else "so there is no accuracy"
                log.warning(text, name, lost, pairs, mistaken)
            if lost == pairs:
                accuracies[-1] = torch.full_like(accuracies[-1], torch.nan)
            # Every rank has the same result; sync_dist only tells Lightning so.
            logged = f"{self.verify_as}/{name}"
            self.log(f"{logged}/accuracy", accuracies[-1], prog_bar=True, sync_dist=True)
            self.log(f"{logged}/std", metric.result.std, sync_dist=True)
            with suppress(ValueError):  # pairs of one kind; what else may be wrong has been raised
                self.curves[name] = roc.compute()
                if not lost:  # a pair that is counted as mistaken has no cosine
                    self.rates[name] = roc.rates
            metric.reset()
            roc.reset()
        if accuracies:
            mean = torch.stack(accuracies).mean()
            self.log(f"{self.verify_as}/accuracy", mean, sync_dist=True)

    @contextmanager
    def verifying_as(self, name: str) -> Iterator[None]:
        """Within it the names of a verification's figures begin with ``name``."""
        self.verify_as = name
        try:
            yield
        finally:
            self.verify_as = "verify"

    def configure_model(self) -> None:
        """Split the class centres over the ranks of DDP, where the classifier says so."""
        head: Any = self.classifier
        if self._trainer is None or not isinstance(head, ChunkedClassifier) or not head.shard:
            return
        strategy: Any = self.trainer.strategy
        learns = any(p.requires_grad for p in self.backbone.parameters())  # else DDP has nothing
        averages = getattr(strategy, "_model_averaging_period", None)  # of all parameters
        if type(strategy) is not DDPStrategy or averages is not None or not learns:
            return
        head.shard_centers()
        if head.split is None:
            return
        self._ddp_params_and_buffers_to_ignore = ["classifier.weight"]
        plugin: Any = self.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        if type(scaler) is torch.amp.GradScaler:  # which sees the overflows of its own rank alone
            plugin.scaler = ShardedGradScaler(
                scaler._device,
                scaler.get_scale(),
                scaler.get_backoff_factor(),
                scaler.get_growth_factor(),
                scaler.get_growth_interval(),
            )

    def configure_optimizers(self) -> Any:
        optimizer, world_size = self.build_optimizer(), self.trainer.world_size
        self._optimizer_record = optimizer_record(optimizer, self)
        if isinstance(self.classifier, ChunkedClassifier) and self.classifier.split is not None:
            self.classifier.gather_states(optimizer)
            check_by_rows(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        if isinstance(self.classifier, PartialClassifier) and self.classifier.rate < 1:
            check_sparse(optimizer)
            if world_size > 1 and self.classifier.split is None:
                raise MisconfigurationException(
                    f"a partial classifier below rate 1 samples among the centres that a process "
                    f"has: {world_size} processes need trainer.strategy=ddp and "
                    f"classifier.shard=auto, got {type(self.trainer.strategy).__name__} and "
                    f"shard={self.classifier.shard}"
                )
        if self.scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise MisconfigurationException(
                "a torch schedule needs a run of max_steps or max_epochs, got one without an end"
            )
        scheduler = self.scheduler(optimizer, int(steps))
        # A scheduler that looks at the loss must see the same one on every rank.
        self._reduce_loss = isinstance(scheduler, ReduceLROnPlateau)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "train/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def build_optimizer(self) -> Optimizer:
        """The optimizer of all parameters, in groups where rates or weight decays differ.

        Raises:
            ValueError: there is nothing to learn, or a setting that cannot act.
        """
        learns_centres = not isinstance(self.classifier, MomentumClassifier)
        if not learns_centres and not any(p.requires_grad for p in self.backbone.parameters()):
            raise ValueError("a frozen network and no class centres leave nothing to learn")
        groups = parameter_groups(self.backbone, self.no_decay, self.layer_decay)
        if learns_centres:
            head = parameter_groups(self.classifier, self.no_decay)
            if self.classifier_lr is not None:
                head = [{**group, "lr": self.classifier_lr} for group in head]
            groups += head
        if not any(len(group) > 1 for group in groups):  # they differ in nothing
            groups = [{"params": [p for group in groups for p in group["params"]]}]
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.pop("lr_scale", 1.0)  # a tensor may be all groups'
        if self.no_decay and not optimizer.defaults.get("weight_decay"):
            raise ValueError(
                f"no_decay=true needs an optimizer with a weight_decay above 0, got "
                f"{optimizer.defaults.get('weight_decay')}"
            )
        return optimizer

    def start_from(
        self, file: str | Path, reinit: bool = False, trained: Sequence[str] | None = None
    ) -> None:
        """Take the weights of a file; on any error, none of them.

        Args:
            file: a checkpoint of this module, from which class centres and the margin's statistics
                are taken too, or InsightFace's ``backbone.pth`` or ``model.pt``. A
                MomentumClassifier takes no centres, and its encoder follows the new backbone.
            reinit: take the backbone alone, as for other identities.
            trained: names of the identities by label; None: they are not compared with those that
                the file names.

        Raises:
            ValueError: the file does not fit; see :func:`fastface_lightning.backbones.load_weights`
                for the backbone. The classifier must have as many classes,
                and the same where the file names them.
        """
        saved = {} if reinit else read_weights(file, "classifier.")
        state = self.classifier.state_dict()
        if isinstance(self.classifier, MomentumClassifier):
            saved = {key: value for key, value in saved.items() if key.startswith("margin.")}
        centres, wanted = saved.get("weight"), state.get("weight")
        if centres is not None and wanted is not None and centres.shape != wanted.shape:
            raise ValueError(
                f"weights must hold {tuple(wanted.shape)} class centres, got "
                f"{tuple(centres.shape)} in {file}: classifier.reinit=true takes its backbone alone"
            )
        before = People.in_checkpoint(read_file(file))
        if centres is not None and before is not None and trained is not None:
            People(trained).check_same(People(before.trained))
        check_finite(saved, file)
        load_weights(self.backbone, file)
        # Of another margin, what this one does not know is left, and what it has starts anew.
        kept = {k: v for k, v in saved.items() if k in state and v.shape == state[k].shape}
        self.classifier.load_state_dict({**state, **kept})
        if isinstance(self.classifier, MomentumClassifier):
            self.classifier.follow(self.backbone)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the backbone's gradient; the class centres' is left as it is.

        Source: InsightFace's and FastFace's training programs.

        Raises:
            MisconfigurationException: a negative norm, another algorithm than ``"norm"``, or a
                fused optimizer under a loss scaler, whose gradients are still scaled here.
        """
        clip = self.trainer.gradient_clip_val or 0
        if clip < 0 or gradient_clip_algorithm not in (None, "norm"):
            raise MisconfigurationException(
                f"gradient_clip_val must be a norm of at least 0, got {clip} by "
                f"{gradient_clip_algorithm or 'norm'}"
            )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if clip and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise MisconfigurationException(
                "a fused optimizer under a loss scaler cannot clip its gradients: optimizer.fused "
                "must be false, or trainer.gradient_clip_val 0"
            )
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.backbone.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["torch_schedulers"] = self._scheduler_names()
        checkpoint["optimizer"] = self._optimizer_record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raw, trainer = checkpoint.get("current_model_state"), self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return
        self._resumed_from = {
            "names": checkpoint.get("torch_schedulers"),
            "states": checkpoint.get("lr_schedulers"),
        }
        if "optimizer" in checkpoint and (
            new := set_optimizer(checkpoint, self.build_optimizer(), self)
        ):
            log.info("from here on the optimizer has %s", "; ".join(new))
        if raw is not None and not callbacks_of(trainer, "WeightAverage"):
            log.warning("the checkpoint has averaged weights: the run goes on from the raw ones")
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **raw}

    def on_fit_start(self) -> None:
        self._followed_step = None
        if not self.trainer.ckpt_path:
            return
        # Who has counted the steps has made the loader, which Lightning then does not put where
        # the checkpoint stopped: the epoch would begin anew. So it is made again.
        self.trainer.fit_loop._combined_loader = None
        # Lightning would fill one scheduler with another's state, or with none, and say nothing.
        saved, now = self._resumed_from.get("names"), self._scheduler_names()
        if saved is not None and saved != now:
            written, have = (", ".join(names) or "no torch scheduler" for names in (saved, now))
            raise MisconfigurationException(
                f"the checkpoint must come from the same schedule, got one written with "
                f"{written} for a run with {have}: resume with schedule=NAME as it was"
            )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        states = [scheduler.state_dict() for scheduler in schedulers]
        check_schedulers(self._resumed_from.get("states") or (), states)

    def on_train_start(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        if isinstance(self.classifier, MomentumClassifier):
            left = self.classifier.momentum**steps
            if left > LEFT_OVER:
                log.warning(
                    "after %d steps %.0f %% of the momentum encoder will still be what it began "
                    "with, at momentum %s: so short a run wants a smaller one",
                    *(steps, 100 * left, self.classifier.momentum),
                )
        for optimizer in self.trainer.optimizers:
            for p, state in optimizer.state.items():
                match_memory_format(state, p)

    def _scheduler_names(self) -> list[str]:
        return [type(config.scheduler).__name__ for config in self.trainer.lr_scheduler_configs]


def parameter_groups(
    network: nn.Module, no_decay: bool, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """The parameters of a network in an optimizer's groups, by timm's rules, highest rates first.

    Args:
        network: whose ``no_weight_decay()`` and ``group_matcher()`` count, where it has them.
        no_decay, layer_decay: as :class:`FaceModule`; with either, frozen parameters are left out.

    Returns:
        Groups, of which some have a ``weight_decay`` of 0, and with ``layer_decay`` all have an
        ``lr_scale``.

    Raises:
        ValueError: a ``layer_decay`` for a network whose layers are not known.
    """
    if not no_decay and layer_decay is None:
        return [{"params": list(network.parameters())}]
    names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    rules: dict[str, Any] = {
        "weight_decay": 1.0,  # stands for the optimizer's
        "weight_decay_exclude_1d": no_decay,
        "no_weight_decay_list": names if no_decay else (),
    }
    if layer_decay is None:
        groups = param_groups_weight_decay(network, **rules)
    elif hasattr(network, "group_matcher"):
        groups = param_groups_layer_decay(network, layer_decay=layer_decay, **rules)
    else:
        raise ValueError(
            f"layer_decay must be null for {type(network).__name__}, which has no group_matcher"
        )
    kept = [{k: v for k, v in group.items() if k != "weight_decay" or not v} for group in groups]
    return sorted(kept, key=lambda group: -group.get("lr_scale", 1.0))


def check_sparse(optimizer: Optimizer) -> None:
    """Refuse an optimizer that updates, of a sparse gradient, other rows than it names."""
    if not isinstance(optimizer, RowSparse):
        raise MisconfigurationException(
            f"a partial classifier needs an optimizer that updates the sampled rows alone, SGD or "
            f"AdamW of fastface_lightning.optim (optimizer=sgd or adamw), got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )


def check_by_rows(optimizer: Optimizer, scaler: Any) -> None:
    """Refuse an optimizer for centres that are split over ranks: one that looks at more than a row
    at a time, or that a loss scaler leaves to find overflows by itself, on each rank its own."""
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    if not isinstance(optimizer, ROW_BY_ROW):
        raise MisconfigurationException(
            f"centres that are split over ranks need an optimizer that updates each row by itself, "
            f"such as SGD or AdamW, got {name}: classifier.shard=false keeps them whole"
        )
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"centres that are split over ranks cannot be trained by a fused optimizer under a "
            f"loss scaler, got {name}: optimizer.fused must be false"
        )


def images_in(batch: Any) -> int:
    """Training images in a batch of one loader, or in one of several by name."""
    parts = batch.values() if isinstance(batch, dict) else [batch]
    return sum(len(labels) for _, labels in parts)
