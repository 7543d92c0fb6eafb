"""FaceModule: what happens to images, gradients and embeddings between the parts."""

import math
import os
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import on_ranks
from timm.optim import Lamb
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.data import DataLoader, TensorDataset

from fastface_lightning.backbones import build_backbone
from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
    PartialClassifier,
)
from fastface_lightning.data import PairImages, People, VerificationPairs
from fastface_lightning.margins import AdaFace, CurricularFace, Margin
from fastface_lightning.optim import SGD, AdamW
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.training.module import FaceModule, check_by_rows

IMAGES = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
LABELS = torch.arange(8) % 3


def module(classifier: nn.Module | None = None, optimizer: Any = None, **more: Any) -> FaceModule:
    torch.manual_seed(0)
    backbone = more.pop("backbone", None) or nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    optimizer = partial(optimizer or torch.optim.SGD, lr=1e-3)
    return FaceModule(backbone, classifier or FullClassifier(3, 5), optimizer, **more)


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


def fit(tmp_path: Path, faces: FaceModule, data: Any = None, **settings: Any) -> Trainer:
    loader = DataLoader(data or TensorDataset(IMAGES, LABELS), batch_size=None if data else 8)
    trainer = quiet(tmp_path, **settings)
    trainer.fit(faces, loader)
    return trainer


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
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    faces = module(optimizer=partial(torch.optim.SGD, fused=True))
    with pytest.raises(MisconfigurationException, match="cannot clip its gradients"):
        fit(tmp_path, faces, gradient_clip_val=5.0, plugins=[scaler])
    for optimizer in (SGD, AdamW):  # fused too, but on gradients that are unscaled
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        fit(tmp_path, module(optimizer=optimizer), gradient_clip_val=5.0, plugins=[scaler])


def test_the_classifier_may_have_a_learning_rate_of_its_own() -> None:
    own = module(optimizer=SGD, classifier_lr=0.02).build_optimizer().param_groups
    assert [(group["lr"], len(group["params"])) for group in own] == [(1e-3, 2), (0.02, 1)]
    assert len(module().build_optimizer().param_groups) == 1
    with pytest.raises(ValueError, match="classifier_lr"):
        module(classifier_lr=-1)


def grouped(faces: FaceModule) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that is optimized, by its name."""
    groups = faces.build_optimizer().param_groups
    of = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of)
    return {name: of[p] for name, p in faces.named_parameters() if p in of}


NETWORKS = ["iresnet_tiny", "mobilefacenet", "test_vit", "test_convnext"]


@pytest.mark.parametrize("name", NETWORKS)
def test_biases_and_norms_have_no_weight_decay(name: str) -> None:
    """Nor have what timm names of a network; all else has the optimizer's, at the same rate."""
    backbone = build_backbone(name, 5)
    optimizer = partial(AdamW, weight_decay=0.3)
    faces = module(optimizer=optimizer, backbone=backbone, no_decay=True, classifier_lr=0.5)
    found = grouped(faces)
    for key, p in faces.named_parameters():
        exempt = p.ndim < 2 or key.endswith(("pos_embed", "cls_token", "reg_token"))
        rate = 0.5 if key == "classifier.weight" else 1e-3
        if p.requires_grad:
            assert found.pop(key) == (rate, 0.0 if exempt else 0.3), key
    assert not found


@pytest.mark.parametrize(
    ("name", "stem", "last_block", "head"),
    [
        ("iresnet_tiny", "conv1.", "layer4.0.", "fc."),
        ("mobilefacenet", "layers.0.", "conv_sep.", "features."),
        ("test_vit", "trunk.patch_embed.", "trunk.blocks.5.", "neck."),
        ("test_convnext", "trunk.stem.", "trunk.stages.3.blocks.1.", "neck."),
    ],
)
def test_lower_layers_have_lower_rates(name: str, stem: str, last_block: str, head: str) -> None:
    backbone = build_backbone(name, 5)
    faces = module(optimizer=AdamW, backbone=backbone, layer_decay=0.5)
    rates = {key: lr / 1e-3 for key, (lr, decay) in grouped(faces).items() if decay == 1e-2}
    assert rates.keys() == {key for key, p in faces.named_parameters() if p.requires_grad}

    def of(part: str) -> float:
        (rate,) = {rates[key] for key in rates if key.startswith(f"backbone.{part}")}
        return rate

    layers = len(set(rates.values()))
    assert set(rates.values()) == {0.5**n for n in range(layers)}
    assert (of(stem), of(head), rates["classifier.weight"]) == (0.5 ** (layers - 1), 1, 1)
    assert of(last_block) == 0.5
    first = faces.build_optimizer().param_groups[0]
    assert first["lr"] == 1e-3 and "lr_scale" not in first


def test_groups_that_cannot_be_are_refused() -> None:
    for value in (0.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"layer_decay must lie in \(0, 1\], got {value}"):
            module(layer_decay=value)
    with pytest.raises(ValueError, match="layer_decay must be null for Sequential"):
        module(layer_decay=0.5).build_optimizer()
    with pytest.raises(ValueError, match="layer_decay must be null for pit_ti_224"):
        module(backbone=build_backbone("pit_ti_224", 5), layer_decay=0.5).build_optimizer()
    with pytest.raises(ValueError, match="no_decay must be true or false, got 'yes'"):
        module(no_decay="yes")
    with pytest.raises(ValueError, match=r"no_decay=true needs .*, got 0"):
        module(no_decay=True).build_optimizer()


def test_a_partial_classifier_trains_and_only_with_an_optimizer_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in one process."""
    sampling = partial(PartialClassifier, 30, 5, rate=0.4)
    for optimizer in (partial(SGD, momentum=0.9, weight_decay=0.1), AdamW):
        faces = module(sampling(), optimizer)
        before = faces.classifier.weight.detach().clone()
        fit(tmp_path, faces, gradient_clip_val=5.0)
        assert (faces.classifier.weight != before).any(1).sum() == 12
    with pytest.raises(MisconfigurationException, match=r"got torch\.optim\.sgd\.SGD"):
        fit(tmp_path, module(sampling(), torch.optim.SGD))
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(MisconfigurationException, match=r"2 processes need .* got SingleDevice"):
        faces.configure_optimizers()
    faces.classifier.rate = 1.0
    faces.configure_optimizers()


@pytest.mark.slow
def test_centres_are_split_only_where_ddp_trains_something_else(tmp_path: Path) -> None:
    """And a module without a trainer, as Lightning loads one, has them whole."""

    def check(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        small: Any = {"accelerator": "cpu", "devices": 2, "logger": False}
        for strategy, frozen, split in (("ddp", False, True), ("ddp", True, False)):
            faces = module(ChunkedClassifier(30, 5))
            faces.configure_model()
            faces.backbone.requires_grad_(not frozen)
            faces.trainer = Trainer(strategy=strategy, enable_checkpointing=False, **small)
            faces.classifier.weight.requires_grad_(frozen)
            faces.trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", 8.0)
            faces.configure_model()
            assert (faces.classifier.split is not None) == split
            assert faces.classifier.weight.requires_grad == frozen
            scaler: Any = faces.trainer.precision_plugin.scaler
            assert (type(scaler) is ShardedGradScaler) == split and scaler.get_scale() == 8.0
        with pytest.raises(MisconfigurationException, match=r"each row by itself, .* got timm"):
            check_by_rows(Lamb(faces.parameters()), None)
        with pytest.raises(MisconfigurationException, match="fused"):
            check_by_rows(torch.optim.AdamW(faces.parameters(), fused=True), scaler)
        check_by_rows(torch.optim.AdamW(faces.parameters(), fused=True), None)

    on_ranks(check, tmp_path)


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


def test_centres_are_taken_of_the_same_people_alone(tmp_path: Path) -> None:
    saved, faces = small_face_module(2), small_face_module(2)
    content = {"state_dict": saved.state_dict(), "data": People(["ann", "bob"]).state_dict()}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"got 'bobby' for 'bob'.*classifier\.reinit=true"):
        faces.start_from(tmp_path / "last.ckpt", trained=["ann", "bobby"])
    faces.start_from(tmp_path / "last.ckpt", trained=["ann", "bob"])
    assert same(faces, saved)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """Other identities, whose backbone can be taken alone, and centres that are no numbers."""
    saved, faces = small_face_module(7), small_face_module(9)
    file = checkpoint(saved, tmp_path / "last.ckpt")
    before = {key: value.clone() for key, value in faces.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(9, 16\) class centres, got \(7, 16\)"):
        faces.start_from(file)
    with torch.no_grad():
        saved.classifier.weight[3] = torch.nan
    with pytest.raises(ValueError, match="finite, got nan in weight"):
        small_face_module(7).start_from(checkpoint(saved, tmp_path / "nan.ckpt"))
    assert all(torch.equal(value, before[key]) for key, value in faces.state_dict().items())
    faces.start_from(file, reinit=True)
    assert same(faces.backbone, saved.backbone)
    assert torch.equal(faces.classifier.weight, before["classifier.weight"])
    again = small_face_module(7)  # also where the number is the same
    again.start_from(file, reinit=True)
    assert not torch.equal(again.classifier.weight, saved.classifier.weight)


@pytest.mark.parametrize("optimizer", [SGD, AdamW, partial(torch.optim.AdamW, fused=True)])
def test_an_optimizers_state_follows_the_weights_memory_format(
    optimizer: Any, tmp_path: Path
) -> None:
    backbone = nn.Conv2d(3, 4, 3)
    faces = FaceModule(backbone, ChunkedClassifier(3, 4), partial(optimizer, lr=0.1))
    built = faces.build_optimizer()
    for p in faces.parameters():
        p.grad = torch.ones_like(p)
        built.state[p] = {"of it": torch.arange(p.numel()).view(p.shape).float(), "step": 3}
    backbone.to(memory_format=torch.channels_last)
    faces.trainer = quiet(tmp_path)
    faces.trainer.strategy.optimizers = [built]
    faces.on_train_start()
    held = built.state[backbone.weight]["of it"]
    assert held.stride() == backbone.weight.stride()
    assert torch.equal(held, torch.arange(108).view(4, 3, 3, 3).float())


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_torch_schedule_is_refused(tmp_path: Path) -> None:
    """Lightning would fill one scheduler with another's state, or with none, and say nothing."""
    cosine = FixedSchedule("CosineAnnealingLR", T_max=4)
    drops = FixedSchedule("StepLR", step_size=2)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)

    def trained(schedule: FixedSchedule | None, steps: int, **more: Any) -> Trainer:
        faces, trainer = module(), quiet(tmp_path, max_steps=steps)
        faces.scheduler = schedule
        trainer.fit(faces, loader, **more)
        return trainer

    for first, then in ((cosine, drops), (None, cosine)):
        trained(first, 1).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(MisconfigurationException, match="the same schedule, got one written"):
            trained(then, 2, ckpt_path=tmp_path / "last.ckpt")
        assert trained(first, 2, ckpt_path=tmp_path / "last.ckpt").global_step == 2
    whole = FixedSchedule("CosineAnnealingLR", T_max=1.0)
    trained(whole, 1).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match="T_max must be 1, got 2"):
        trained(whole, 2, ckpt_path=tmp_path / "last.ckpt")


def test_a_schedule_of_schedules_resumes(tmp_path: Path) -> None:
    def warmed(optimizer: Any, _: int) -> Any:
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
        ]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    def trained(steps: int, lr: float, **more: Any) -> list[float]:
        faces, trainer, seen = module(), quiet(tmp_path, max_steps=steps), list[float]()
        faces.scheduler, faces.optimizer = warmed, partial(torch.optim.SGD, lr=lr)
        watch = Callback()
        watch.on_train_batch_start = lambda trainer, *_: seen.append(  # type: ignore[method-assign]
            trainer.optimizers[0].param_groups[0]["lr"]
        )
        trainer.callbacks.append(watch)
        trainer.fit(faces, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4), **more)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return seen

    whole = trained(6, 0.1)
    trained(3, 0.1)
    assert trained(6, 0.2, ckpt_path=tmp_path / "3.ckpt") == pytest.approx(
        [2 * x for x in whole[3:]]
    )


class Overflows(nn.Module):
    """Gives (brightness, 1), but infinity for a black image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = images.mean((1, 2, 3))
        light = torch.where(light > -1, light, torch.inf)
        return torch.stack([light, torch.ones_like(light)], 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("lost", "accuracy"), [(0, 1.0), (5, 0.75), (20, math.nan)])
def test_pairs_without_finite_embeddings_count_as_mistaken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int, accuracy: float
) -> None:
    """As a hundred layers give before their batch norms have seen an image."""
    faces = FaceModule(Overflows(), nn.Identity(), torch.optim.SGD, verify_names=["noise"])
    same = torch.arange(20) % 2 == 0
    a = torch.full((20, 3, 112, 112), 255, dtype=torch.uint8)
    b = torch.where(same[:, None, None, None], a, 1)
    # Of both kinds, and of pairs of one person both images: they must not pass for alike.
    a[:lost] = 0
    b[:lost] = torch.where(same[:lost, None, None, None], 0, b[:lost])
    pairs = DataLoader(TensorDataset(a, b, same, torch.arange(20)), batch_size=8)
    (found,) = quiet(tmp_path).validate(faces, pairs, verbose=False)
    assert found["verify/noise/accuracy"] == pytest.approx(accuracy, nan_ok=True)
    assert (f"of {lost} of 20 pairs the embeddings are not finite" in caplog.text) == (lost > 0)


@pytest.mark.filterwarnings("ignore")
def test_recurring_images_are_embedded_once_and_judged_alike(tmp_path: Path) -> None:
    """As if every pair had its two images; on a part of the images the pairs that it holds."""
    images = torch.randint(0, 256, (9, 3, 112, 112), dtype=torch.uint8)
    index = torch.tensor([(i, j) for i in range(9) for j in range(i)])
    same = index.sum(1) % 3 == 0
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(48, 8))
    calls: list[int] = []
    backbone.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    faces = FaceModule(backbone, nn.Identity(), torch.optim.SGD, verify_names=["noise"])

    def verified(dataset: Any, **settings: Any) -> dict[str, float]:
        (found,) = quiet(tmp_path, **settings).validate(
            faces, DataLoader(dataset, 4), verbose=False
        )
        return found

    once = PairImages(VerificationPairs(images, same, [], index))
    a, b, places = images[index[:, 0]], images[index[:, 1]], torch.arange(len(index))
    expected = verified(TensorDataset(a, b, same, places))
    assert sum(calls) == 4 * len(index)
    calls.clear()
    assert verified(once) == pytest.approx(expected, abs=1e-6) and sum(calls) == 2 * 9
    part = (index < 8).all(1)
    expected = verified(TensorDataset(a[part], b[part], same[part], places[part]))
    assert verified(once, limit_val_batches=2) == pytest.approx(expected, abs=1e-6)


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
    faces, watch = module(DynamicClassPool(10, 5, pool_size=6, momentum=0.5)), Watch()
    length = {"max_steps": -1, "max_epochs": 1}
    fit(tmp_path, faces, Pairs(), accumulate_grad_batches=2, callbacks=[watch], **length)
    moved = [not torch.equal(a, b) for a, b in pairwise(watch.encoders)]
    assert moved == [False, True, False, True, False]
    assert all(not torch.equal(a, b) for a, b in pairwise(watch.slots))


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


def test_without_centres_the_network_alone_is_optimized(tmp_path: Path) -> None:
    pool = partial(DynamicClassPool, 10, 5, pool_size=6)
    faces = module(pool())
    (group,) = faces.build_optimizer().param_groups
    assert group["params"] == list(faces.backbone.parameters())
    with pytest.raises(ValueError, match="a dict of instance and identity"):
        fit(tmp_path, faces)
    with pytest.raises(ValueError, match="images and labels, got a dict"):
        fit(tmp_path, module(), Pairs())
    with pytest.raises(ValueError, match="classifier_lr must be null"):
        module(pool(), classifier_lr=0.1)
    faces.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="leave nothing to learn"):
        faces.build_optimizer()


def test_the_same_module_goes_on_as_a_new_one_would(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The momentum encoder moves at a fit's first step, whatever step the last one ended at."""

    def started(momentum: float) -> FaceModule:
        pool = DynamicClassPool(10, 5, pool_size=6, momentum=momentum)
        return module(pool, augment=nn.Identity())

    def encoder(faces: FaceModule) -> torch.Tensor:
        torch.manual_seed(7)
        loader, file = DataLoader(Pairs(), batch_size=None), tmp_path / "3.ckpt"
        quiet(tmp_path, max_steps=4).fit(faces, loader, ckpt_path=file)
        return faces.classifier.momentum_encoder[1].weight

    first, again = started(0.4), started(0.4)
    fit(tmp_path, first, Pairs(), max_steps=3).save_checkpoint(tmp_path / "3.ckpt")
    encoder(first)  # its last step began at 3, where the next fit begins
    assert torch.equal(encoder(first), encoder(again))
    assert "momentum encoder" not in caplog.text
    fit(tmp_path, started(0.999), Pairs())
    assert "will still be what it began" in caplog.text  # so short a run is told
