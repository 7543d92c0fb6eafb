"""FaceModule: what happens to images, gradients and embeddings between the parts."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastface_lightning.backbones import build_backbone, normalise
from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
    PartialClassifier,
)
from fastface_lightning.margins import AdaFace, CurricularFace, Margin
from fastface_lightning.optim import SGD
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.training.module import FaceModule

IMAGES = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
LABELS = torch.arange(8) % 3


def module(**optimizer: Any) -> FaceModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    return FaceModule(
        backbone, FullClassifier(3, 5), partial(torch.optim.SGD, lr=1e-3, **optimizer)
    )


def quiet(tmp_path: Path, **settings: Any) -> Trainer:
    """A trainer of one step, unless told otherwise, that writes nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_steps": 1, **settings},
    )


def fit(tmp_path: Path, faces: FaceModule, **settings: Any) -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    quiet(tmp_path, **settings).fit(faces, loader)


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert normalise(ends).flatten().tolist() == [-1.0, 1.0]
    assert ends.dtype == torch.uint8  # and the batch itself stays as it was


def test_an_embedding_is_that_of_image_and_mirror_image() -> None:
    faces = module().eval()
    embedding = faces.embed(IMAGES)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(embedding, faces.embed(IMAGES.flip(-1)))
    summed = faces(IMAGES) + faces(IMAGES.flip(-1))
    torch.testing.assert_close(embedding, summed / summed.norm(dim=1, keepdim=True))


def test_clipping_is_the_backbones_alone(tmp_path: Path) -> None:
    """lr 1e-3 without momentum: the step is the gradient, so its norm is the clip's."""
    plain, clipped = module(), module()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for faces, clip in ((plain, None), (clipped, 0.5)):
        torch.manual_seed(1)  # the same mirror images
        fit(tmp_path, faces, gradient_clip_val=clip)

    def moved(faces: FaceModule, part: str) -> float:
        steps = [
            (tensor - before[name]).flatten() / 1e-3
            for name, tensor in faces.state_dict().items()
            if name.startswith(part)
        ]
        return torch.cat(steps).norm().item()

    assert moved(plain, "backbone") > 1
    assert moved(clipped, "backbone") == pytest.approx(0.5, rel=1e-2)
    assert moved(clipped, "classifier") == pytest.approx(moved(plain, "classifier"), rel=1e-6)


def test_a_fused_optimizer_under_a_scaler_cannot_clip(tmp_path: Path) -> None:
    """Its gradients are still scaled when they would be clipped."""
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(MisconfigurationException, match="cannot clip its gradients"):
        fit(tmp_path, module(fused=True), gradient_clip_val=5.0,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)])  # fmt: skip


def test_the_classifier_may_have_a_learning_rate_of_its_own() -> None:
    backbone, classifier = nn.Linear(3, 5), FullClassifier(3, 5)
    make = partial(SGD, lr=0.1, momentum=0.9)
    groups = (
        FaceModule(backbone, classifier, make, classifier_lr=0.02).build_optimizer().param_groups
    )
    assert [(g["lr"], g["momentum"], len(g["params"])) for g in groups] == [
        (0.1, 0.9, 2),
        (0.02, 0.9, 1),
    ]
    assert len(FaceModule(backbone, classifier, make).build_optimizer().param_groups) == 1
    with pytest.raises(ValueError, match="classifier_lr"):
        FaceModule(backbone, classifier, make, classifier_lr=-1)


def sampling(optimizer: Any) -> FaceModule:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    return FaceModule(backbone, PartialClassifier(30, 5, rate=0.4), optimizer)


def test_a_partial_classifier_trains_and_only_with_an_optimizer_of_rows(tmp_path: Path) -> None:
    faces = sampling(partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1))
    before = faces.classifier.weight.detach().clone()
    fit(tmp_path, faces, gradient_clip_val=5.0)
    assert (faces.classifier.weight != before).any(1).sum() == 12
    with pytest.raises(MisconfigurationException, match="got AdamW"):
        fit(tmp_path, sampling(partial(torch.optim.AdamW, lr=0.1)))
    with pytest.raises(MisconfigurationException, match="got SGD"):
        fit(tmp_path, sampling(partial(torch.optim.SGD, lr=0.1)))


def test_a_partial_classifier_trains_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = sampling(partial(SGD, lr=0.1))
    faces.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(MisconfigurationException, match=r"trains in one process, .* got 2"):
        faces.configure_optimizers()
    faces.classifier.rate = 1.0
    faces.configure_optimizers()


def small_face_module(num_classes: int, margin: Margin | None = None) -> FaceModule:
    backbone = build_backbone("iresnet_tiny", 16)
    return FaceModule(backbone, ChunkedClassifier(num_classes, 16, margin), partial(SGD, lr=0.1))


def checkpoint(faces: FaceModule, file: Path) -> Path:
    torch.save({"state_dict": faces.state_dict(), "global_step": 3}, file)
    return file


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_start_from_a_checkpoint(tmp_path: Path) -> None:
    """The margin's statistics too; of another margin those that it has not are left."""
    saved, faces = (small_face_module(7, AdaFace()) for _ in range(2))
    saved.classifier.margin.mean.fill_(5.0)
    file = checkpoint(saved, tmp_path / "last.ckpt")
    faces.start_from(file)
    assert same(faces, saved)
    other = small_face_module(7, CurricularFace())
    other.start_from(file)
    assert torch.equal(other.classifier.weight, saved.classifier.weight)
    assert other.classifier.margin.t == 0


def test_start_from_centres_that_are_no_numbers(tmp_path: Path) -> None:
    saved, faces = small_face_module(7), small_face_module(7)
    with torch.no_grad():
        saved.classifier.weight[3] = torch.nan
    before = {key: value.clone() for key, value in faces.state_dict().items()}
    with pytest.raises(ValueError, match="finite, got nan in weight"):
        faces.start_from(checkpoint(saved, tmp_path / "last.ckpt"))
    assert all(torch.equal(value, before[key]) for key, value in faces.state_dict().items())


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, fused=True)])
def test_an_optimizers_state_follows_the_weights_memory_format(optimizer: Any) -> None:
    backbone = nn.Conv2d(3, 4, 3)
    faces = FaceModule(
        backbone, ChunkedClassifier(3, 4), partial(optimizer, lr=0.1, weight_decay=1)
    )
    built = faces.build_optimizer()
    for p in faces.parameters():
        p.grad = torch.ones_like(p)
        built.state[p] = {"of it": torch.arange(p.numel()).view(p.shape).float(), "step": 3}
    backbone.to(memory_format=torch.channels_last)
    faces.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    faces.trainer.strategy.optimizers = [built]
    faces.on_train_start()
    held = built.state[backbone.weight]["of it"]
    assert held.stride() == backbone.weight.stride()
    assert torch.equal(held, torch.arange(108).view(4, 3, 3, 3).float())


def test_start_from_the_backbone_of_other_identities(tmp_path: Path) -> None:
    saved, faces = small_face_module(7), small_face_module(9)
    file = checkpoint(saved, tmp_path / "last.ckpt")
    before = {key: value.clone() for key, value in faces.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(9, 16\) class centres, got \(7, 16\)"):
        faces.start_from(file)
    assert all(torch.equal(value, before[key]) for key, value in faces.state_dict().items())
    faces.start_from(file, reinit=True)
    assert same(faces.backbone, saved.backbone)
    assert torch.equal(faces.classifier.weight, before["classifier.weight"])
    again = small_face_module(7)  # also where the number is the same
    again.start_from(file, reinit=True)
    assert not torch.equal(again.classifier.weight, saved.classifier.weight)


def test_start_from_insightfaces_backbone(tmp_path: Path) -> None:
    saved, faces = small_face_module(7), small_face_module(9)
    torch.save(saved.backbone.state_dict(), tmp_path / "backbone.pth")
    faces.start_from(tmp_path / "backbone.pth")
    assert same(faces.backbone, saved.backbone)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_torch_schedule_is_refused(tmp_path: Path) -> None:
    """Lightning would fill one scheduler with another's state, or with none, and say nothing."""
    cosine, drops = (
        FixedSchedule("CosineAnnealingLR", T_max=1.0),
        FixedSchedule("StepLR", step_size=2),
    )
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)

    def trained(schedule: FixedSchedule | None, steps: int, **more: Any) -> Trainer:
        faces, trainer = module(), quiet(tmp_path, max_steps=steps)
        faces.scheduler = schedule
        trainer.fit(faces, loader, **more)
        return trainer

    for first, then in ((cosine, drops), (cosine, None), (None, cosine)):
        trained(first, 1).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(MisconfigurationException, match="the same schedule, got one written"):
            trained(then, 2, ckpt_path=tmp_path / "last.ckpt")
        assert trained(first, 2, ckpt_path=tmp_path / "last.ckpt").global_step == 2


class Overflows(nn.Module):
    """Gives (brightness, 1), but infinity for a black image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean((1, 2, 3))
        light = torch.where(light > -1, light, torch.inf)
        return torch.stack([light, torch.ones_like(light)], 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("lost", "accuracy"), [(0, 1.0), (5, 0.75), (20, 0.5)])
def test_pairs_without_finite_embeddings_count_as_mistaken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int, accuracy: float
) -> None:
    """As a hundred layers give before their batch norms have seen an image."""
    faces = FaceModule(Overflows(), nn.Identity(), torch.optim.SGD, verify_names=["drawn"])
    same = torch.arange(20) % 2 == 0
    a = torch.full((20, 3, 112, 112), 255, dtype=torch.uint8)
    b = torch.where(same[:, None, None, None], a, 1)
    # Of both kinds, and of pairs of one person both images: they must not pass for alike.
    a[:lost] = 0
    b[:lost] = torch.where(same[:lost, None, None, None], 0, b[:lost])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    pairs = DataLoader(TensorDataset(a, b, same, torch.arange(20)), batch_size=8)
    (found,) = trainer.validate(faces, pairs, verbose=False)
    assert found["verify/drawn/accuracy"] == pytest.approx(accuracy)
    assert (f"{lost} verification pairs have embeddings" in caplog.text) == (lost > 0)


def momentum_module(classifier: MomentumClassifier) -> FaceModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    return FaceModule(backbone, classifier, partial(torch.optim.SGD, lr=1e-3))


class Pairs(torch.utils.data.Dataset[Any]):
    """Dual batches, as a loader without collation takes them."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        pairs = torch.arange(4).repeat_interleave(2)
        return {"identity": (IMAGES, pairs), "instance": (IMAGES[:4], LABELS[:4])}


class Watch(Callback):
    """The momentum encoder's and the pool's state before each batch."""

    def __init__(self) -> None:
        self.encoders: list[torch.Tensor] = []
        self.slots: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        classifier = pl_module.classifier
        self.encoders.append(classifier.momentum_encoder[1].weight.clone())
        self.slots.append(classifier.slots.to_tensor())


def test_the_momentum_encoder_moves_once_an_optimizer_step(tmp_path: Path) -> None:
    """And the pool with every batch."""
    faces, watch = momentum_module(DynamicClassPool(10, 5, pool_size=6, momentum=0.5)), Watch()
    trainer = quiet(
        tmp_path, max_steps=-1, max_epochs=1, accumulate_grad_batches=2, callbacks=[watch]
    )
    trainer.fit(faces, DataLoader(Pairs(), batch_size=None))
    moved = [not torch.equal(a, b) for a, b in pairwise(watch.encoders)]
    assert moved == [False, True, False, True, False]
    assert all(not torch.equal(a, b) for a, b in pairwise(watch.slots))


def test_the_optimizer_has_the_network_and_not_its_follower() -> None:
    faces = momentum_module(DynamicClassPool(10, 5, pool_size=6))
    (group,) = faces.build_optimizer().param_groups
    assert group["params"] == list(faces.backbone.parameters())
    with pytest.raises(ValueError, match="classifier_lr must be null"):
        FaceModule(nn.Identity(), DynamicClassPool(10, 5), torch.optim.SGD, classifier_lr=0.1)


@pytest.mark.parametrize("kind", [DynamicClassPool, AttentionClassifier])
def test_a_momentum_encoder_starts_from_the_weights_of_a_file(
    kind: type[MomentumClassifier], tmp_path: Path
) -> None:
    """From InsightFace's weights and from a checkpoint with other identities alike."""
    backbone = build_backbone("iresnet_tiny", 8)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    earlier = FaceModule(build_backbone("iresnet_tiny", 8), ChunkedClassifier(9, 8), SGD)
    torch.save({"state_dict": earlier.state_dict()}, tmp_path / "last.ckpt")
    for file, network in (("backbone.pth", backbone), ("last.ckpt", earlier.backbone)):
        faces = FaceModule(build_backbone("iresnet_tiny", 8), kind(20, 8), SGD)
        faces.start_from(tmp_path / file)
        assert isinstance(faces.classifier, kind) and faces.classifier.momentum_encoder is not None
        for name, value in faces.classifier.momentum_encoder.state_dict().items():
            assert torch.equal(value, network.state_dict()[name])
    # And the other way: what a pool has trained, under centres that start anew.
    torch.save({"state_dict": faces.state_dict()}, tmp_path / "pool.ckpt")
    centres = FaceModule(build_backbone("iresnet_tiny", 8), ChunkedClassifier(9, 8), SGD)
    centres.start_from(tmp_path / "pool.ckpt")
    assert torch.equal(centres.backbone.conv1.weight, faces.backbone.conv1.weight)


def test_batches_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a dict of instance and identity"):
        fit(tmp_path, momentum_module(DynamicClassPool(10, 5, pool_size=6)))
    trainer = quiet(tmp_path)
    with pytest.raises(ValueError, match="images and labels, got a dict"):
        trainer.fit(module(), DataLoader(Pairs(), batch_size=None))


def test_a_frozen_network_without_centres_has_nothing_to_learn() -> None:
    faces = momentum_module(DynamicClassPool(10, 5, pool_size=6))
    faces.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="leave nothing to learn"):
        faces.build_optimizer()


def test_the_same_module_goes_on_as_a_new_one_would(tmp_path: Path) -> None:
    """The momentum encoder moves at a fit's first step, whatever step the last one ended at."""

    def trainer(steps: int) -> Trainer:
        return quiet(tmp_path, max_steps=steps)

    def encoder(faces: FaceModule) -> torch.Tensor:
        torch.manual_seed(7)
        trainer(4).fit(faces, DataLoader(Pairs(), batch_size=None), ckpt_path=tmp_path / "3.ckpt")
        return faces.classifier.momentum_encoder[1].weight

    pool = partial(DynamicClassPool, 10, 5, pool_size=6, momentum=0.5)
    first = momentum_module(pool())
    first.augment = nn.Identity()
    began = trainer(3)
    began.fit(first, DataLoader(Pairs(), batch_size=None))
    began.save_checkpoint(tmp_path / "3.ckpt")
    again = momentum_module(pool())
    again.augment = nn.Identity()
    encoder(first)  # its last step began at 3, where the next fit begins
    assert torch.equal(encoder(first), encoder(again))


def test_a_run_too_short_for_its_momentum_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for momentum in (0.5, 0.999):
        caplog.clear()
        faces = momentum_module(DynamicClassPool(10, 5, pool_size=6, momentum=momentum))
        trainer = quiet(tmp_path, max_steps=6)
        trainer.fit(faces, DataLoader(Pairs(), batch_size=None))
        told = [r for r in caplog.records if "momentum encoder" in r.getMessage()]
        assert len(told) == (momentum > 0.9)
