"""recipes/evaluate.py: every kind of set by its protocol, from what is kept where it was."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ijb import make_ijb
from models import network, noise, save_checkpoint
from PIL import Image
from programs import ROOT, Run, load
from torch.nn import functional as F

import fastface_lightning.inference.embedding_file as embedding_file
from fastface_lightning.data import (
    IdentityFolder,
    VerificationPairs,
    encode_jpeg,
    held_out_pairs,
    write_verification_bin,
)
from fastface_lightning.data.formats.recordio_writer import InsightFaceWriter
from fastface_lightning.evaluation import tar_at_far, verification_accuracy
from fastface_lightning.inference.embedder import load_embedder
from fastface_lightning.inference.protocols import Templates, open_protocol

PROGRAM = "recipes/evaluate.py"


def write_images(folder: Path, counts: dict[str, int]) -> None:
    """``folder/<name>/<name>_0001.png`` and so on, noise that differs from image to image."""
    images = iter(noise(sum(counts.values())))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = next(images).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name / f"{name}_{number:04d}.png")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint, 20 pairs in a .bin, a pairs file with an absent image, IJB-C, a folder."""
    save_checkpoint(tmp_path / "best.ckpt", network())
    images = noise(40)
    encoded = []
    for i, image in enumerate(images):
        file = tmp_path / f"{i}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        encoded.append(file.read_bytes())
        file.unlink()
    write_verification_bin(tmp_path / "lfw.bin", encoded, [i % 2 == 0 for i in range(20)])
    write_images(tmp_path / "faces", {"ada": 3, "bob": 2, "cem": 2, "dan": 1, "eve": 1})
    (tmp_path / "pairs.csv").write_text(
        "".join(
            f"ada/ada_0001.png,{name}/{name}_000{n}.png,{int(name == 'ada')}\n"
            for name, n in [("ada", 2), ("bob", 1), ("ada", 3), ("cem", 1), ("absent", 1)] * 5
        )
    )
    make_ijb(tmp_path / "IJBC", people=4)
    return tmp_path


def test_every_kind_of_set(run: Run, place: Path) -> None:
    ended = run(
        "checkpoint=best.ckpt",
        "verify=[lfw.bin,pairs.csv,IJBC,faces]",
        "verify_root=faces",
        program=PROGRAM,
    )
    assert ended.code == 0, ended.err
    written = json.loads((ended.folder / "evaluation.json").read_text())
    assert written["model"]["commit"] == "0123abc"
    lfw, pairs, ijbc, faces = (written["sets"][n] for n in ("lfw", "pairs", "ijbc", "faces"))

    embed = load_embedder(place / "best.ckpt", mirror=True)
    rows = embed(noise(40))
    same = torch.tensor([i % 2 == 0 for i in range(20)])
    accuracy = verification_accuracy(rows[0::2], rows[1::2], same)
    assert (lfw["accuracy"], lfw["std"]) == pytest.approx(accuracy[:2])
    cosines = (rows[0::2] * rows[1::2]).sum(1)
    assert lfw["tar"] == {"1e-01": tar_at_far(cosines, same, 0.1)}  # ten pairs show no lower rate
    accepted = cosines >= lfw["cosine_thresholds"]["1e-01"] - 1e-6
    assert accepted[~same].sum() == 1
    assert accepted[same].double().mean() == pytest.approx(lfw["tar"]["1e-01"])

    assert pairs["pairs"] == 20
    assert len(pairs["missing"]) == 5 and "absent_0001" in pairs["missing"][0]
    assert ijbc["impostors"] < 100 and list(ijbc["tar"]) == ["1e-01"]  # no lower rate is shown
    assert list(ijbc["cosine_thresholds"]) == ["1e-01"] and lfw["impostors"] == 10
    assert ijbc["pairs"] == 32 and len(ijbc["identification"]) == 2
    assert (faces["images"], faces["identification"][0]["gallery"]) == (9, 3)
    assert faces["identification"][0]["mated"] == 4 and faces["identification"][0]["unmated"] == 2

    text = (ended.folder / "evaluation.md").read_text()
    mine = f"| this model | {100 * lfw['accuracy']:.2f} |  |  |  |  |"
    assert mine in text
    assert "| published: r100, webface12m | 99.83 | 99.17 | 98.02 | 95.68 | 97.20 |" in text
    for name in ("roc.png", "scores.png", "worst_lfw.png", "worst_pairs.png"):
        with Image.open(ended.folder / name) as picture:
            assert picture.width > 300


@pytest.mark.program
def test_half_precision_is_said_and_kept_apart(run: Run, place: Path) -> None:
    for precision, said in ((None, "float32"), ("bf16", "bf16")):
        given = [] if precision is None else [f"precision={precision}"]
        ended = run("checkpoint=best.ckpt", "verify=[lfw.bin]", *given, program=PROGRAM)
        assert ended.code == 0, ended.err
        assert json.loads((ended.folder / "evaluation.json").read_text())["precision"] == said
    assert "bf16" in (ended.folder / "evaluation.md").read_text().splitlines()[0]
    assert len(list((place / "embeddings").glob("lfw-*.npy"))) == 2


def test_templates_are_the_protocol(place: Path) -> None:
    """Against loops over templates and medias, with an image that cannot be read."""
    (place / "IJBC" / "loose_crop" / "3.jpg").write_bytes(b"")
    protocol = Templates(place / "IJBC")
    data = protocol.data
    embed = load_embedder(place / "best.ckpt", mirror=True)
    images, readable = zip(*(protocol.images[i] for i in range(protocol.count)), strict=True)
    features = embed.features(torch.stack(images))
    features[~torch.tensor(readable)] = torch.nan
    found, cosines, _ = protocol.evaluate(features)
    assert len(found["missing"]) == 1 and "3.jpg" in found["missing"][0]

    templates: dict[int, torch.Tensor] = {}
    for template in np.unique(data.templates):
        total = torch.zeros(features.shape[1], dtype=torch.float64)
        for medium in np.unique(data.media[data.templates == template]):
            chosen = (data.templates == template) & (data.media == medium)
            kept = [
                features[i].double() * data.scores[i] for i in np.flatnonzero(chosen) if readable[i]
            ]
            if kept:
                total += torch.stack(kept).mean(0)
        if total.any():
            templates[template] = F.normalize(total, dim=0)
    kept_pairs = [
        (a, b, s)
        for (a, b), s in zip(data.pairs, data.same, strict=True)
        if a in templates and b in templates
    ]
    scores = torch.stack([templates[a] @ templates[b] for a, b, _ in kept_pairs])
    assert torch.allclose(cosines.double(), scores, atol=1e-5)
    assert found["pairs"] == len(kept_pairs)
    assert found["pairs_without_images"] == len(data.pairs) - len(kept_pairs)


@pytest.mark.program
def test_embeddings_are_kept_for_the_next_time(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("checkpoint=best.ckpt", "verify=[lfw.bin,faces]")
    first = run(*arguments, program=PROGRAM, folder="first")
    kept = sorted(place.glob("embeddings/*.npy"))
    assert [file.name.rpartition("-")[0] for file in kept] == ["faces", "lfw"]

    def fail(*_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(embedding_file, "DataLoader", fail)
    again = run(*arguments, program=PROGRAM, folder="again")
    assert (first.code, again.code) == (0, 0)
    found = [json.loads((e.folder / "evaluation.json").read_text())["sets"] for e in (first, again)]
    for sets in found:
        for result in sets.values():
            result.pop("seconds")
    assert found[0] == found[1]
    monkeypatch.undo()
    save_checkpoint(place / "best.ckpt", network(1))
    run(*arguments, program=PROGRAM, folder="other")
    assert len(list(place.glob("embeddings/*.npy"))) == 4


def test_a_pack_that_is_written_anew_is_embedded_anew(place: Path) -> None:
    """Its images are known by their places in the file, which may stay."""
    rec = place / "faces.rec"
    digests = []
    for quality in (90, 91, 91):
        for file in (rec, rec.with_suffix(".idx")):
            file.unlink(missing_ok=True)
        with InsightFaceWriter(rec) as writer:
            for i, image in enumerate(noise(4)):
                jpeg = encode_jpeg(image.permute(1, 2, 0).numpy(), quality)
                writer.write_image(i // 2, jpeg.ljust(40_000, b"\0"))
        os.utime(rec, ns=(quality, quality))
        digests.append(open_protocol(rec).digest())
    assert digests[0] != digests[1] == digests[2]


@pytest.mark.program
def test_a_set_that_fails_leaves_the_results_before_it(run: Run, place: Path) -> None:
    (place / "bad.csv").write_text("a,b,same\nnot a pair\n")
    ended = run(
        "checkpoint=best.ckpt", "verify=[lfw.bin,bad.csv]", "verify_root=faces", program=PROGRAM
    )
    assert ended.code == 2 and "bad.csv:2" in ended.err
    assert list(json.loads((ended.folder / "evaluation.json").read_text())["sets"]) == ["lfw"]


@pytest.mark.program
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=."], "a model must be a file, such as best.ckpt, got ."),
        (["checkpoint=best.ckpt", "verify=[absent.bin]"], "verify must name what is there"),
        (["checkpoint=best.ckpt", "verify=[1]"], "verify must be a list of paths"),
        (["checkpoint=best.ckpt", "verify=[lfw.bin,lfw.bin]"], "different names, got lfw twice"),
        (["checkpoint=weights.pth"], "verify must name sets, as [lfw.bin]"),
        (["checkpoint=best.ckpt", "verify=lone"], "a search needs somebody with 2 images"),
        (["checkpoint=best.ckpt", "verify=pairs.csv"], "verify_root must be the folder"),
        (["checkpoint=best.ckpt", "device=foo"], "device must be one that torch can use here"),
        (["checkpoint=best.ckpt", "batch_size=abc"], "batch_size must be a number, got 'abc'"),
        (["checkpoint=odd.ckpt"], "must say of its run what train.py writes"),
    ],
)
def test_bad_input(run: Run, place: Path, arguments: list[str], message: str) -> None:
    torch.save(network().state_dict(), place / "weights.pth")
    save_checkpoint(place / "odd.ckpt", network(), run={"config": {}})
    write_images(place / "lone", {"ada": 1, "bob": 1})
    ended = run(*arguments, program=PROGRAM)
    assert ended.code == 2 and message in ended.err
    assert "Traceback" not in ended.err


def test_published_rows_are_those_of_the_model() -> None:
    program = load(ROOT / PROGRAM)
    about = {"data": "webface12m", "network": {"name": "iresnet50"}}
    lfw = {"protocol": "pairs", "accuracy": 0.5}
    assert program.headline(about, {"lfw": lfw}).count("published") == 1
    assert program.headline({}, {"lfw": lfw}).count("published") == 5
    assert program.headline(about, {"mine": lfw}).count("published") == 0


def test_the_worst_pairs_are_named(place: Path) -> None:
    program, faces = load(ROOT / PROGRAM), place / "faces"
    pairs = held_out_pairs(IdentityFolder(faces), 4)
    first, second = (pairs.names[i] for i in pairs.pairs()[1].tolist())
    assert program.caption(pairs, 1, 0.25) == f"0.250: {first}, {second}"
    assert first[:3] != second[:3] and {first[:3], second[:3]} <= {
        "ada",
        "bob",
        "cem",
        "dan",
        "eve",
    }
    assert program.caption(VerificationPairs(*pairs, pairs.index), 1, 0.25) == "pair 1: 0.250"


@pytest.mark.program
@pytest.mark.slow
def test_lfw_view_1(run: Run, shared_data: Path, tmp_path: Path) -> None:
    """The benchmark's own list: 999 of 1,000 pairs are there, and the one that is not is named."""
    save_checkpoint(tmp_path / "best.ckpt", network())
    lfw = shared_data / "lfw112"
    ended = run(
        "checkpoint=best.ckpt",
        f"verify=[{lfw}/pairsDevTest.txt]",
        f"verify_root={lfw}/images",
        program=PROGRAM,
    )
    found = json.loads((ended.folder / "evaluation.json").read_text())["sets"]["pairsDevTest"]
    assert found["pairs"] == 999 and "Betsy_Coffin" in found["missing"][0]
    assert 0.5 < found["accuracy"] < 0.8  # a network that was never trained
