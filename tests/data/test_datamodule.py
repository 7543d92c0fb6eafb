"""Data modules hand a trainer the right batches in the right order, and refuse what cannot work."""

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pixels import Pixels
from ranks import on_ranks

from fastface_lightning.data import (
    FaceData,
    FaceDataModule,
    FaceDataset,
    GroupSampler,
    LFWData,
    SyntheticData,
    VerificationPairs,
    epoch_permutation,
    synthetic_pairs,
)

Tree = Callable[..., Path]


def ready(module: FaceDataModule) -> Any:
    module.setup("fit")
    return module


class PixelsData(FaceDataModule):
    """The images of identities 0, 1 and so on, so many of each."""

    def __init__(self, *counts: int, **common: Any) -> None:
        super().__init__(**common)
        self.counts = counts

    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        return Pixels(np.repeat(np.arange(len(self.counts)), self.counts)), {}


class PairsData(FaceDataModule):
    """Ten images; two verification sets of 5 pairs and 1 pair."""

    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2)
        same = torch.tensor([True, False, True, False, True])
        return Pixels(range(10)), {
            "five": VerificationPairs(images, same, []),
            "one": VerificationPairs(images[:2], same[:1], []),
        }


def test_verification_batches_are_pairs_in_order_with_their_index() -> None:
    data = ready(PairsData(batch_size=3))
    train_set = data.train_set
    data.setup("validate")
    assert data.train_set is train_set and data.num_classes == 10
    assert data.verify_names == ["five", "one"]
    five, one = data.val_dataloader()
    (a, b, same, index), last = list(five)
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape == (3, 3, 2, 2)
    assert a[:, 0, 0, 0].tolist() == [0, 2, 4] and b[:, 0, 0, 0].tolist() == [1, 3, 5]
    assert same.dtype == torch.bool and same.tolist() == [True, False, True]
    assert index.dtype == torch.int64 and index.tolist() == [0, 1, 2]
    assert last[3].tolist() == [3, 4] and len(list(one)) == 1
    data.batch_size = 11
    with pytest.raises(ValueError, match="batch_size 11 is larger than the 10"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("seed", -1),
        ("held_out", 1.0),
        ("verify", "lfw"),
    ],
)
def test_arguments_are_checked(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} must .* got '?{value}"):
        FaceData("anywhere", **{key: value})


def test_synthetic_data_verifies_on_other_people() -> None:
    data = ready(SyntheticData(3, 2, verify_identities=10, verify_pairs=20, batch_size=2))
    assert data.num_classes == 3 and len(data.train_set) == 6
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 112, 112) and images.dtype == torch.uint8
    assert data.verify_names == ["synthetic"]
    (loader,) = data.val_dataloader()
    verified = [bytes(x.numpy()) for images, _ in loader for x in images]
    assert len(verified) == len(set(verified))  # each image once
    trained = {bytes(data.train_set[i][0].numpy()) for i in range(6)}
    assert not trained & set(verified)
    pairs, twin = data.sets["synthetic"], synthetic_pairs(20, 10, 2, first_identity=3)
    assert torch.equal(pairs.images[pairs.pairs().flatten()], twin.images)
    assert torch.equal(pairs.same, twin.same) and pairs.num_people == twin.num_people == 10
    assert ready(SyntheticData(2, 2, verify_pairs=0)).val_dataloader() == []


def verified_on(data: FaceData) -> set[int]:
    """Numbers of the people in the tree whose images are verified on."""
    return set(data.sets["held_out"].images[:, 0, 0, 0].tolist())


def test_folder_data_verifies_on_people_it_does_not_train_on(tree: Tree) -> None:
    root = tree(**{f"p{k}": 3 for k in range(9)}, q9=1)
    data = ready(FaceData(root, held_out=0.4, verify_pairs=60))
    assert data.people.held_out == ["p2", "p6", "p7", "p8", "q9"]  # by their names' hashes
    assert data.people.trained == data.train_set.identities == ["p0", "p1", "p3", "p4", "p5"]
    assert data.verify_names == ["held_out"] and verified_on(data) == {2, 6, 7, 8, 9}
    again = ready(FaceData(root, held_out=0.4, seed=9))
    assert again.train_set.identities == data.train_set.identities
    everybody = ready(FaceData(root, min_images=2))
    assert everybody.num_classes == 9 and everybody.val_dataloader() == []


def test_more_people_move_nobody_else(tree: Tree) -> None:
    root = tree(**{f"p{k}": 2 for k in range(9)})
    before = ready(FaceData(root, held_out=0.4)).people
    shutil.copytree(root / "p0", root / "a_new_one")
    after = ready(FaceData(root, held_out=0.4)).people
    assert set(before.trained) < set(after.trained) and before.held_out == after.held_out
    with pytest.raises(ValueError, match=r"which by their names is 0 of 10.*held_out=FILE"):
        ready(FaceData(root, held_out=0.05))


@pytest.mark.parametrize("kind", ["names", "list", "folder"])
def test_the_held_out_may_be_named_listed_or_apart(tree: Tree, tmp_path: Path, kind: str) -> None:
    root = tree(ann=2, bob=3, cem=2, dan=2)
    if kind == "folder":
        held_out = tmp_path / "val"
        for name in ("cem", "ann"):
            shutil.copytree(root / name, held_out / name)
    else:
        held_out = tmp_path / "val.txt"
        rows = ["cem", "ann"]
        if kind == "list":
            rows = [f"{name}/{name}_000{j}.png {name}" for name in rows for j in (1, 2)]
        held_out.write_text("\n".join([*rows, ""]))
    data = ready(FaceData(root, held_out=held_out))
    assert data.people.trained == ["bob", "dan"] and data.people.held_out == ["ann", "cem"]
    assert verified_on(data) == {0, 2}


def test_who_may_not_be_held_out(tree: Tree, tmp_path: Path) -> None:
    root, file = tree(ann=2, bob=2, cem=2), tmp_path / "val.txt"
    file.write_text("ann\nbert\n")
    with pytest.raises(ValueError, match=r"must name people in .*, got bert"):
        ready(FaceData(root, held_out=file))
    with pytest.raises(ValueError, match="must leave somebody to train on"):
        ready(FaceData(root, held_out=root))
    with pytest.raises(ValueError, match="a path that is there, got"):
        ready(FaceData(root, held_out=tmp_path / "gone"))


def test_nobody_is_verified_on_whom_the_network_has_seen(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(**{f"p{k}": 2 for k in range(9)})
    data = FaceData(root, held_out=0.4)
    data.earlier = ["p1", "p2"]
    assert ready(data).people.held_out == ["p6", "p7", "p8"]
    assert "p1" in data.people.trained and data.people.earlier == ["p1", "p2"]
    assert verified_on(data) == {6, 7, 8} and caplog.messages[-1].endswith("verified on: p2")


def test_nobody_left_to_verify_on_is_refused(tree: Tree) -> None:
    data = FaceData(tree(**{f"p{k}": 2 for k in range(9)}), held_out=0.4)
    data.earlier = ["p2", "p6", "p7"]
    with pytest.raises(ValueError, match=r"got 1 of 4: held_out=FILE"):
        ready(data)


def test_an_evaluation_needs_those_held_out_alone(tree: Tree) -> None:
    root = tree(**{f"p{k}": 2 for k in range(9)})
    people = ready(FaceData(root, held_out=0.4)).people
    for name in people.trained:
        shutil.rmtree(root / name)
    data = FaceData(root, held_out=0.4)
    data.verify_people = people.held_out
    assert verified_on(ready(data)) == {2, 6, 7, 8}


def test_an_evaluation_holds_out_whom_the_run_did(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(**{f"p{k}": 2 for k in range(9)})
    run = ready(FaceData(root, held_out=0.4)).people
    (root / "p0").rename(root / "p10")
    (root / "p2").rename(root / "p11")  # by name these would be chosen otherwise
    data = FaceData(root, held_out=0.4)
    data.verify_people = run.held_out
    ready(data)
    assert data.people.held_out == ["p2", "p6", "p7", "p8"] and len(data.sets["held_out"].same) == 6
    assert any("1 of the 4 identities sought" in message for message in caplog.messages)


def test_folder_data_verifies_on_a_pairs_file(
    tree: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(ann=2, bob=2, cem=2, dan=2)
    file = tmp_path / "mine.txt"
    file.write_text("1\nann 1 2\nann 1 bob 1\n")
    data = ready(FaceData(root, verify=[file], held_out=0.5))
    assert data.verify_names == ["held_out", "mine"]
    assert list(data.people.trained) == ["ann", "cem"] and "mine: 1 of its 2 people" in caplog.text
    caplog.clear()
    a, b = data.people.held_out
    (root / "others.txt").write_text(f"1\n{a} 1 2\n{a} 1 {b} 1\n")
    ready(FaceData(root, verify=["others.txt"], held_out=0.5))
    assert not caplog.messages
    (root / "mine.txt").write_text("1\nann 1 2\nann 1 bob 1\n")
    data = ready(FaceData(root, verify=["mine.txt"], verify_root=root))
    assert len(data.sets["mine"].same) == 2
    with pytest.raises(ValueError, match="got mine twice"):
        ready(FaceData(root, verify=["mine.txt", file]))
    with pytest.raises(ValueError, match=r"got lfw; looked for lfw and .*lfw\.bin"):
        ready(FaceData(root, verify=["lfw"]))


def test_absent_and_unexpected_faces_are_told(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(**{f"p{k}": 3 for k in range(10)})
    with pytest.raises(ValueError, match="ten: nothing at"):
        FaceData(root / "gone", name="ten").setup()
    ready(FaceData(root, held_out=0.4, num_identities=10, num_images=30))
    assert not caplog.messages
    ready(FaceData(root, name="ten", num_identities=10, num_images=31))
    (message,) = caplog.messages
    assert message.startswith("ten: expected 10 identities and 31 images in")
    assert message.endswith("got 10 identities and 30 images")


def test_lfw_data(shared_data: Path) -> None:
    data = ready(LFWData(shared_data / "lfw112"))
    assert data.num_classes == 4038 and len(data.train_set) == 9525
    assert data.verify_names == ["lfw_view1"] and len(data.sets["lfw_view1"].same) == 999
    assert "Betsy_Coffin" not in data.train_set.identities
    assert len(data.train_dataloader()) == 9525 // 128


def test_lfw_data_says_what_should_be_there(tree: Tree, caplog) -> None:
    root = tree(ann=2, bob=1, cem=2)
    with pytest.raises(ValueError, match=r"^lfw: no .*faces/images"):
        LFWData(root).setup()
    root.rename(root.parent / "images")
    people = root.parent / "peopleDevTrain.txt"
    (root.parent / "pairsDevTest.txt").write_text("1\ncem 1 2\ncem 1 ann 2\n")
    for text in ("2\nann\t1\n", "1\nann\n"):
        people.write_text(text)
        with pytest.raises(ValueError, match=r"peopleDevTrain\.txt:"):
            LFWData(root.parent).setup()
    people.write_text("2\nann\t2\nbob\t3\n")
    data = ready(LFWData(root.parent))
    assert data.train_set.identities == data.faces().identities == ["ann", "bob"]
    assert "lfw: expected 2 identities and 5 images in" in caplog.text


# Several images of one identity.


COUNTS = (4, 1, 3, 6, 2, 5, 1)  # 22 images


def numbers(batch: Any) -> dict[str, list[int]]:
    """The images of each part of a batch."""
    parts = batch if isinstance(batch, dict) else {"images": batch}
    for images, labels in parts.values():
        own = np.repeat(np.arange(len(COUNTS)), COUNTS)[images[:, 0, 0, 0]]
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 1, 1)
        assert labels.dtype == torch.int64 and labels.tolist() == own.tolist()
    return {name: images[:, 0, 0, 0].tolist() for name, (images, _) in parts.items()}


def groups(size: int, by: Any, seed: int, epoch: int) -> list[int]:
    """The images of an epoch, of all ranks."""
    dataset = Pixels(np.repeat(np.arange(len(COUNTS)), COUNTS))
    sampler = GroupSampler(dataset, size, by, seed, num_replicas=1, rank=0)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_program_may_set_what_batches_are() -> None:
    data = ready(PixelsData(*COUNTS, batch_size=2))
    assert len(data.train_dataloader()) == 11
    data.batches, data.keys = "keys", 1
    images, labels = next(iter(data.train_dataloader()))[0]["identity"]
    assert images.shape == (4, 3, 1, 1) and labels.shape == (4,)
    data.batches = "pairs"
    with pytest.raises(ValueError, match="batches must be images, dual or keys, got pairs"):
        data.train_dataloader()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("num_workers", "shares"), [(0, [0, 0]), (1, [1, 1]), (8, [3, 5])])
def test_dual_loaders_share_the_workers(num_workers: int, shares: list[int]) -> None:
    data = ready(PixelsData(*COUNTS, batch_size=2, batches="dual", num_workers=num_workers))
    assert [part.num_workers for part in data.train_dataloader().flattened] == shares


@pytest.mark.parametrize(
    ("counts", "levels"),
    [((1, 2, 1, 3), [logging.INFO]), ((1, 1, 1, 3), [logging.WARNING]), ((2, 2), [])],
)
def test_single_images_are_told_once(
    counts: Any, levels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastface_lightning")
    data = ready(PixelsData(*counts, batch_size=1, batches="dual"))
    data.train_dataloader()
    data.train_dataloader()
    assert [record.levelno for record in caplog.records] == levels


class Killed(Exception):
    """What a run does not survive."""


class Watcher(LightningModule):
    """Writes down each batch by its epoch and number; the run is killed before one of them."""

    def __init__(self, kill: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.kill = kill
        self.seen: dict[tuple[int, int], dict[str, list[int]]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.fit_loop.total_batch_idx == self.kill:
            raise Killed
        epoch = self.trainer.fit_loop.epoch_progress.current.processed
        self.seen[epoch, batch_idx] = numbers(batch)
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watch(
    data: FaceDataModule,
    folder: Path,
    every: dict[str, int],
    kill: int | None = None,
    **options: Any,
) -> dict[tuple[int, int], dict[str, list[int]]]:
    """What a run saw, from the folder's checkpoint on if there is one."""
    module, last = Watcher(kill), folder / "last.ckpt"
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=ModelCheckpoint(folder, "last", **every, enable_version_counter=False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with nullcontext() if kill is None else pytest.raises(Killed):
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    return module.seen


def expected(batches: str, epoch: int, batch: int) -> dict[str, list[int]]:
    """What a run of seed 7 sees in a batch of 4."""
    if batches == "images":
        return {"images": epoch_permutation(22, 7, epoch)[4 * batch :][:4].tolist()}
    if batches == "keys":
        return {"identity": groups(3, "images", 7, epoch)[12 * batch :][:12]}
    return {
        "instance": epoch_permutation(22, 7, epoch)[4 * batch :][:4].tolist(),
        "identity": groups(2, "identities", 7, epoch)[8 * batch :][:8],
    }


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize(
    ("num_workers", "every"), [(0, {"every_n_epochs": 1}), (2, {"every_n_train_steps": 2})]
)
@pytest.mark.parametrize("batches", ["images", "dual", "keys"])
def test_a_killed_run_sees_what_an_uninterrupted_one_sees(
    tmp_path: Path, batches: str, num_workers: int, every: dict[str, int]
) -> None:
    """Five batches an epoch: killed twice, within epochs and at the ends of them."""

    def seen(folder: Path, kill: int | None = None) -> dict[tuple[int, int], Any]:
        common = {"batch_size": 4, "seed": 7, "num_workers": num_workers}
        return watch(
            PixelsData(*COUNTS, batches=batches, **common), folder, every, kill, max_epochs=3
        )

    whole = seen(tmp_path / "whole")
    assert len(whole) == 15 and whole == {at: expected(batches, *at) for at in whole}
    for first, second in [(3, 11)] if num_workers else [(2, 3), (5, 10), (6, 12)]:
        folder = tmp_path / f"{first}-{second}"
        assert seen(folder, first) | seen(folder, second) | seen(folder) == whole, (first, second)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("batches", ["dual", "keys"])
def test_two_ranks_share_the_groups_of_an_epoch(
    tmp_path: Path, batches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer keeps the samplers, which take every second image and group."""

    def check(rank: int) -> None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        data = PixelsData(*COUNTS, batch_size=4, seed=7, batches=batches)
        seen = watch(data, tmp_path, {}, max_epochs=2, strategy="ddp", devices=2)
        assert list(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for (epoch, batch), found in seen.items():
            for name, images in found.items():
                size = len(images) // 4
                whole = [expected(batches, epoch, k)[name] for k in range(5)]
                rows = np.concatenate(whole).reshape(-1, size)[rank::2]
                assert images == rows[4 * batch :][:4].ravel().tolist()

    (tmp_path / "meet").mkdir()
    on_ranks(check, tmp_path / "meet")
