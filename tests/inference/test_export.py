"""An exported model embeds as the checkpoint, says what it is, and is never half written."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from models import RUN, SIZE, network, noise, save_checkpoint
from programs import Run
from safetensors import safe_open

import fastface_lightning.inference.export as export_module
from fastface_lightning.backbones import build_backbone, load_weights
from fastface_lightning.data import encode_jpeg, write_verification_bin
from fastface_lightning.inference.embedder import load_embedder
from fastface_lightning.inference.export import export
from fastface_lightning.inference.torch_embedder import TorchEmbedder


@pytest.fixture
def embedder(tmp_path: Path) -> TorchEmbedder:
    embedder = load_embedder(save_checkpoint(tmp_path / "best.ckpt", network()))
    assert isinstance(embedder, TorchEmbedder)
    return embedder


@pytest.mark.parametrize("uint8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_embeds_as_torch_in_batches_of_any_size(
    embedder: TorchEmbedder, tmp_path: Path, uint8: bool
) -> None:
    about = export(embedder, tmp_path / "deep" / "model.onnx", uint8)
    assert about["difference"] <= 1e-4 and about["cosine"] > 0.9999
    model = onnx.load(tmp_path / "deep" / "model.onnx")
    (images_in,), (embedding_out,) = model.graph.input, model.graph.output
    assert (images_in.name, embedding_out.name) == ("images", "embedding")
    dtype = onnx.TensorProto.UINT8 if uint8 else onnx.TensorProto.FLOAT
    assert images_in.type.tensor_type.elem_type == dtype
    written = load_embedder(tmp_path / "deep" / "model.onnx", batch_size=4)
    for count in (1, 4, 7):
        images = noise(count, seed=count)
        assert torch.allclose(written(images), embedder(images), atol=1e-4)
    assert written.about["input"]["dtype"] == ("uint8" if uint8 else "float32")
    assert written.about["input"]["colour_order"] == "RGB"
    assert written.about["verification"] == {"lfw": 0.9}
    assert written.about["commit"] == RUN["commit"]


def test_the_file_holds_the_thresholds(run: Run, embedder: TorchEmbedder, tmp_path: Path) -> None:
    """Of the checkpoint, or of an evaluation of the same weights, and of no others."""
    export(embedder, tmp_path / "model.safetensors")
    about = load_embedder(tmp_path / "model.safetensors").about
    assert about["thresholds"] == RUN["thresholds"]

    encoded = [encode_jpeg(image.permute(1, 2, 0).numpy()) for image in noise(80)]
    write_verification_bin(tmp_path / "noise.bin", encoded, [i % 2 > 0 for i in range(40)])
    evaluated = run(
        *("checkpoint=best.ckpt", "verify=[noise.bin]", "mirror=false"),
        program="recipes/evaluate.py",
        folder="evaluation",
    )
    assert evaluated.code == 0, evaluated.err
    evaluation = evaluated.folder / "evaluation.json"
    written = json.loads(evaluation.read_text())
    noise_bin = written["sets"]["noise"]
    # Of templates, and of people trained on, there are no thresholds for two images of others.
    written["sets"]["ijbc"] = {**noise_bin, "protocol": "templates", "impostors": 10**6}
    written["sets"]["seen"] = {**noise_bin, "trained_people": 1}
    evaluation.write_text(json.dumps(written))
    arguments = ["target=model.pth", f"evaluation={evaluation}"]
    ended = run("checkpoint=best.ckpt", *arguments, program="recipes/export.py")
    assert ended.code == 0, ended.err
    kept = ("accuracy", "people", "impostors", "far", "cosine_thresholds")
    expected = {"mirror": False, "precision": "float32", **{key: noise_bin[key] for key in kept}}
    assert load_embedder(tmp_path / "model.pth").about["thresholds"] == {"noise": expected}
    assert set(noise_bin["cosine_thresholds"]) == {"1e-01"} and noise_bin["impostors"] == 20

    save_checkpoint(tmp_path / "other.ckpt", network(1))
    (evaluated.folder / "x.json").write_text('{"sets": 1}')
    for checkpoint, file in (
        ("other.ckpt", evaluation),
        ("best.ckpt", evaluated.folder / "x.json"),
        ("best.ckpt", evaluated.folder / "absent.json"),
        ("best.ckpt", evaluated.folder),
    ):
        arguments = [f"checkpoint={checkpoint}", "target=no.pth", f"evaluation={file}"]
        ended = run(*arguments, program="recipes/export.py")
        assert ended.code == 2 and "evaluation must be" in ended.err, ended.err
        assert not (tmp_path / "no.pth").exists()


def test_weights_are_bit_for_bit_the_networks(embedder: TorchEmbedder, tmp_path: Path) -> None:
    for name in ("backbone.pth", "model.safetensors"):
        export(embedder, tmp_path / name)
        model = build_backbone("iresnet_tiny", SIZE)
        load_weights(model, tmp_path / name)
        for key, value in embedder.network.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
        images = noise(2)
        assert torch.equal(load_embedder(tmp_path / name)(images), embedder(images))
    beside = json.loads((tmp_path / "backbone.pth.json").read_text())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        inside = json.loads(opened.metadata()["fastface_lightning"])
    assert beside == inside
    assert inside["margin"] == "CosFace(m=0.4)" and inside["output"]["shape"] == ["N", SIZE]
    # A state_dict and nothing else, as InsightFace's programs read it.
    plain = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert list(plain) == list(embedder.network.state_dict())


@pytest.mark.slow
def test_an_onnx_that_embeds_otherwise_is_not_written(
    embedder: TorchEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "model.onnx"
    export(embedder, target)
    before = target.read_bytes()
    write = export_module._write_onnx

    def write_another(_: torch.nn.Module, *rest: object) -> None:
        write(network(1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "_write_onnx", write_another)
    with pytest.raises(ValueError, match="an ONNX must embed as torch does"):
        export(embedder, target)
    assert [file.name for file in target.parent.iterdir()] == ["model.onnx"]
    assert target.read_bytes() == before


@pytest.mark.slow
def test_a_network_without_finite_embeddings_is_refused(
    embedder: TorchEmbedder, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(embedder.network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="finite embeddings"):
        export(embedder, tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_targets_of_other_kinds_are_refused(embedder: TorchEmbedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target must end in"):
        export(embedder, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="uint8=true is for an"):
        export(embedder, tmp_path / "model.pth", uint8=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18", "resnet18", "vit_tiny_patch16_224"])
def test_other_networks_become_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_backbone(name, SIZE)
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 112, 112) * 2 - 1)
    embedder = TorchEmbedder(model, SIZE, {}, torch.device("cpu"), False, 8)
    assert export(embedder, tmp_path / "model.onnx")["difference"] <= 1e-4


def test_the_program(run: Run, embedder: TorchEmbedder, tmp_path: Path) -> None:
    arguments = ("checkpoint=best.ckpt", "target=model.onnx")
    ended = run(*arguments, program="recipes/export.py")
    assert ended.code == 0 and "iresnet_tiny" in ended.out
    written = json.loads((ended.folder / "export.json").read_text())
    assert written["target"] == "model.onnx" and written["cosine"] > 0.9999
    found = load_embedder(tmp_path / "model.onnx")(noise(2))
    assert torch.allclose(found, embedder(noise(2)), atol=1e-4)


@pytest.mark.program
def test_the_program_takes_weights_of_any_network(run: Run, tmp_path: Path) -> None:
    model = build_backbone("resnet18", SIZE).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = ("checkpoint=weights.pth", "network=resnet18", "target=model.safetensors")
    ended = run(*arguments, program="recipes/export.py")
    assert ended.code == 0, ended.err
    found = load_embedder(tmp_path / "model.safetensors")  # which says what network it is of
    assert torch.equal(found(noise(2)), load_embedder("weights.pth", "resnet18")(noise(2)))


@pytest.mark.program
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["target=a.bin"], "target must end in"),
        (["target=a.pth", "uint8=true"], "uint8=true is for an .onnx"),
        ([], "target"),
    ],
)
@pytest.mark.usefixtures("embedder")
def test_bad_input(run: Run, tmp_path: Path, target: list[str], message: str) -> None:
    ended = run("checkpoint=best.ckpt", *target, program="recipes/export.py")
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("a.")]
