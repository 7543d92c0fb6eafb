"""A model is the same function of images whatever file it comes from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import FLOATS, RUN, SIZE, network, noise, onnx_file, save_checkpoint
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch.nn import functional as F

import fastface_lightning
from fastface_lightning.backbones import build_backbone
from fastface_lightning.inference.embedder import load_embedder
from fastface_lightning.inference.onnx_embedder import OnnxEmbedder
from fastface_lightning.inference.torch_embedder import TorchEmbedder
from fastface_lightning.training.module import FaceModule


def plain(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model((images.float() - 127.5) / 127.5)


def test_a_checkpoint_embeds_as_its_backbone(tmp_path: Path) -> None:
    model, images = network(), noise(5)
    embed = fastface_lightning.load_embedder(save_checkpoint(tmp_path / "best.ckpt", model))
    embeddings = embed(images)
    assert embeddings.shape == (5, SIZE) and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings, F.normalize(plain(model, images)), atol=1e-6)
    assert torch.allclose(embed.features(images), plain(model, images), atol=1e-5)
    assert torch.equal(embed(images.numpy()), embeddings)


def test_mirrored_embeddings_are_those_that_a_run_is_verified_with(tmp_path: Path) -> None:
    model, images = network(), noise(5)
    embed = load_embedder(save_checkpoint(tmp_path / "best.ckpt", model), mirror=True)
    module = FaceModule(model, torch.nn.Identity(), lambda p: torch.optim.SGD(p)).eval()
    with torch.no_grad():
        assert torch.allclose(embed(images), module.embed(images), atol=1e-6)


def test_batches_do_not_show(tmp_path: Path) -> None:
    model, images = network(), noise(7)
    file = save_checkpoint(tmp_path / "best.ckpt", model)
    for batch_size in (1, 3, 128):
        features = load_embedder(file, batch_size=batch_size).features(images)
        assert torch.allclose(features, plain(model, images), atol=1e-5)
    assert load_embedder(file).features(images[:0]).shape == (0, SIZE)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 128])
def test_an_image_and_its_mirror_image_may_go_at_once(tmp_path: Path, batch_size: int) -> None:
    """One forward of twice as many images gives what one of each gives."""
    model, images = network(), noise(5)
    wanted = plain(model, images) + plain(model, images.flip(-1))
    file = save_checkpoint(tmp_path / "best.ckpt", model)
    for at_once in (True, False):
        embed = load_embedder(file, mirror=True, batch_size=batch_size)
        assert isinstance(embed, TorchEmbedder) and not embed.mirrors_at_once  # on a processor
        embed.mirrors_at_once = at_once
        sizes: list[int] = []
        embed.network.register_forward_pre_hook(
            lambda _, given, sizes=sizes: sizes.append(len(given[0]))
        )
        assert torch.allclose(embed.features(images), wanted, rtol=1e-6, atol=1e-5)
        assert sum(sizes) == 10 and max(sizes) <= batch_size * (1 + at_once)
        assert not at_once or len(sizes) == -(-5 // batch_size)
        assert embed.features(images[:0]).shape == (0, SIZE)


def test_half_precision_is_near_float32(tmp_path: Path) -> None:
    """By autocast of a network in channels_last; the embedding is float32."""
    model, images = network(), noise(5)
    file = save_checkpoint(tmp_path / "best.ckpt", model)
    full = load_embedder(file, mirror=True)
    half = load_embedder(file, mirror=True, precision="bf16")
    assert isinstance(half, TorchEmbedder)
    seen: list[torch.Tensor] = []
    first = next(m for m in half.network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embeddings = half(images)
    assert embeddings.dtype == torch.float32
    assert (embeddings * full(images)).sum(1).min() > 0.999
    assert not torch.equal(embeddings, full(images))
    assert all(maps.dtype == torch.bfloat16 for maps in seen)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
    others = [load_embedder(file, mirror=True, precision="fp16"), full]
    assert len({half.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_channels_last_changes_no_embedding(tmp_path: Path) -> None:
    images = noise(3)
    embed = load_embedder(save_checkpoint(tmp_path / "best.ckpt", network()))
    assert isinstance(embed, TorchEmbedder)
    before = embed(images)
    embed.network.to(memory_format=torch.channels_last)
    assert torch.allclose(embed(images), before, atol=1e-6)


def test_a_gpu_without_bfloat16_takes_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.nn.Module):
        def to(self, *_: Any, **__: Any) -> Any:
            return self

    for supported, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, s=supported: s)
        given = (SIZE, {}, torch.device("cuda"), True, 4)
        embed = TorchEmbedder(Elsewhere(), *given, precision="bf16")
        assert embed.precision == precision and embed.mirrors_at_once


def test_another_precision_is_refused(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "best.ckpt", network())
    with pytest.raises(ValueError, match="precision must be null, bf16 or fp16, got int8"):
        load_embedder(file, precision="int8")
    with pytest.raises(ValueError, match=r"precision must be null for an ONNX, got bf16"):
        load_embedder(onnx_file(tmp_path / "f.onnx", [FLOATS]), precision="bf16")


def test_what_is_known_of_a_run_comes_along(tmp_path: Path) -> None:
    about = load_embedder(save_checkpoint(tmp_path / "best.ckpt", network())).about
    assert about == {
        "network": {"name": "iresnet_tiny", "embedding_size": SIZE},
        "data": "webface12m",
        "margin": "CosFace(m=0.4)",
        "scale": 64.0,
        "steps": 7,
        "commit": "0123abc",
        "verification": {"lfw": 0.9},
        "thresholds": RUN["thresholds"],
    }


LARGE = [
    pytest.param(name, 512, marks=pytest.mark.slow)
    for name in ("iresnet34", "iresnet50", "iresnet100", "iresnet200", "mobilefacenet_large")
]


@pytest.mark.parametrize(
    ("name", "size"), [("iresnet_tiny", 24), ("iresnet18", 512), ("mobilefacenet", 24), *LARGE]
)
def test_bare_weights_are_known_by_their_shapes(name: str, size: int, tmp_path: Path) -> None:
    file = tmp_path / "backbone.pth"
    weights = build_backbone(name, size).state_dict()
    # InsightFace's old files lack the counts.
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, file)
    embed = load_embedder(file)
    assert embed.about == {"network": {"name": name, "embedding_size": size}}
    assert embed(noise(1)).shape == (1, size)


def test_weights_of_another_network_need_its_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    model = build_backbone("resnet18", 24).eval()
    save_file(model.state_dict(), file)
    with pytest.raises(ValueError, match=r"network must be given with .*weights\.safetensors"):
        load_embedder(file)
    images = noise(2)
    embeddings = load_embedder(file, network="resnet18").features(images)
    assert torch.allclose(embeddings, plain(model, images), atol=1e-5)
    with pytest.raises(ValueError, match="weights must match resnet34"):
        load_embedder(file, network="resnet34")


def test_a_checkpoint_without_what_it_takes_is_refused(tmp_path: Path) -> None:
    no_run = save_checkpoint(tmp_path / "no_run.ckpt", network(), run=None)
    assert load_embedder(no_run).about["network"]["name"] == "iresnet_tiny"  # by its shapes
    torch.save({"state_dict": {"classifier.weight": torch.zeros(3, 4)}}, tmp_path / "head.ckpt")
    with pytest.raises(ValueError, match="without keys"):
        load_embedder(tmp_path / "head.ckpt")
    other = {**RUN, "config": {**RUN["config"], "model": {"name": "iresnet18"}}}
    with pytest.raises(ValueError, match="weights must match iresnet18"):
        load_embedder(save_checkpoint(tmp_path / "other.ckpt", network(), run=other))
    with pytest.raises(ValueError, match=r"absent\.ckpt"):
        load_embedder(tmp_path / "absent.ckpt")


@pytest.mark.parametrize("name", ["text.ckpt", "text.onnx", "text.safetensors", "text.pth"])
def test_files_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("not a model\n" * 100)
    with pytest.raises(ValueError, match=rf"text\.{name[5:]}") as raised:
        load_embedder(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "images",
    [
        noise(2).float(),
        noise(2)[0],
        noise(2)[:, :, :100],
        np.zeros((2, 112, 112, 3), np.uint8),
        ["a.jpg"],
    ],
)
def test_other_images_are_refused(tmp_path: Path, images: Any) -> None:
    embed = load_embedder(save_checkpoint(tmp_path / "best.ckpt", network()))
    with pytest.raises(ValueError, match="images must be"):
        embed(images)


def test_a_batch_must_hold_an_image(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.ckpt", network())
    with pytest.raises(ValueError, match="batch_size must be at least 1 image, got 0"):
        load_embedder(tmp_path / "best.ckpt", batch_size=0)


def test_fingerprints_tell_models_apart_and_files_of_one_not(tmp_path: Path) -> None:
    a = save_checkpoint(tmp_path / "a.ckpt", network(0))
    same = save_checkpoint(tmp_path / "same.ckpt", network(0))
    other = save_checkpoint(tmp_path / "other.ckpt", network(1))
    prints = [load_embedder(file).fingerprint for file in (a, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert load_embedder(a, mirror=True).fingerprint != prints[0]


def test_an_onnx_from_elsewhere(tmp_path: Path) -> None:
    images = noise(5)
    floats = load_embedder(onnx_file(tmp_path / "f.onnx", [FLOATS]), batch_size=2)
    assert isinstance(floats, OnnxEmbedder) and floats.about == {}
    wanted = images.float().mean((2, 3))
    assert torch.allclose(floats.features(images), (wanted - 127.5) / 127.5, atol=1e-4)
    raw = onnx_file(tmp_path / "u.onnx", [("x", TensorProto.UINT8, ["N", 3, "H", "W"])])
    assert torch.allclose(load_embedder(raw).features(images), wanted, atol=1e-2)
    assert load_embedder(raw).fingerprint != floats.fingerprint


def test_an_onnx_of_a_fixed_batch_serves_any_number(tmp_path: Path) -> None:
    file = onnx_file(
        tmp_path / "two.onnx", [("x", TensorProto.UINT8, [2, 3, 112, 112])], output=[2, 3]
    )
    images = noise(5)
    embeddings = load_embedder(file, batch_size=64).features(images)
    assert torch.allclose(embeddings, images.float().mean((2, 3)), atol=1e-2)
    mirrored = load_embedder(file, mirror=True)  # an image and its mirror image have one mean
    assert torch.allclose(mirrored.features(images), 2 * embeddings, atol=1e-3)
    assert mirrored.features(images[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("inputs", "output", "op"),
    [
        ([("x", TensorProto.FLOAT, ["N", 3, 224, 224])], ("N", 3), "ReduceMean"),
        ([("x", TensorProto.FLOAT, ["N", 112, 112, 3])], ("N", 3), "ReduceMean"),
        ([("x", TensorProto.INT64, ["N", 3, 112, 112])], ("N", 3), "ReduceMean"),
        ([FLOATS, ("y", TensorProto.FLOAT, ["N"])], ("N", 3), "ReduceMean"),
        ([FLOATS], ("N", 3, 112, 112), "Identity"),
        ([("x", TensorProto.FLOAT, ["N", 3, "H", "W"])], ("N", "D"), "Flatten"),
    ],
)
def test_an_onnx_of_another_kind_is_refused(
    tmp_path: Path, inputs: list[Any], output: tuple[Any, ...], op: str
) -> None:
    file = onnx_file(tmp_path / "other.onnx", inputs, output, op)
    with pytest.raises(ValueError, match=r"an ONNX must .*other\.onnx"):
        load_embedder(file)


def projecting(file: Path, shift: float, scale: float) -> Path:
    """An ONNX that gives a random projection of (images - shift) * scale."""
    weight = np.random.default_rng(0).normal(size=(3 * 112 * 112, 8)).astype(np.float32)
    constants = {"shift": np.float32(shift), "scale": np.float32(scale), "w": weight}
    graph = helper.make_graph(
        [
            helper.make_node("Sub", ["images", "shift"], ["shifted"]),
            helper.make_node("Mul", ["shifted", "scale"], ["scaled"]),
            helper.make_node("Flatten", ["scaled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["out"]),
        ],
        "g",
        [helper.make_tensor_value_info(*FLOATS)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file)
    return file


def test_an_onnx_that_normalises_by_itself_is_given_pixels(tmp_path: Path) -> None:
    images = noise(4)
    bare = load_embedder(projecting(tmp_path / "bare.onnx", 0.0, 1.0))
    itself = load_embedder(projecting(tmp_path / "itself.onnx", 127.5, 1 / 127.5))
    assert torch.allclose(bare(images), itself(images), atol=1e-5)
    assert (bare.range, itself.range) == ((-1.0, 1.0), (0.0, 255.0))
    given = load_embedder(tmp_path / "itself.onnx", range=[0, 255], channels="bgr")
    assert torch.allclose(given(images), bare(images.flip(1)), atol=1e-5)
    assert len({each.fingerprint for each in (itself, given)}) == 2
    with pytest.raises(ValueError, match=r"all alike from .*same\.onnx"):
        load_embedder(projecting(tmp_path / "same.onnx", 1e9, 1.0))


def test_range_and_channels_of_a_torch_network(tmp_path: Path) -> None:
    model, images = network(), noise(3)
    file = save_checkpoint(tmp_path / "best.ckpt", model)
    with torch.no_grad():
        expected = model(images.flip(1).float() / 255)
    got = load_embedder(file, range=(0, 1), channels="bgr").features(images)
    assert torch.allclose(got, expected, atol=1e-4)
    for wrong in ({"range": [1, 0]}, {"channels": "gbr"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            load_embedder(file, **wrong)


def test_what_an_onnx_says_of_itself_is_kept(tmp_path: Path) -> None:
    file = onnx_file(tmp_path / "f.onnx", [FLOATS])
    model = onnx.load(file)
    helper.set_model_props(model, {"fastface_lightning": json.dumps({"data": "lfw"})})
    onnx.save(model, file)
    assert load_embedder(file).about == {"data": "lfw"}
