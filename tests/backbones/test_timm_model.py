"""build_backbone turns any timm name into images -> embeddings, or says why it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models._hub import save_for_hf
from torch import nn

from fastface_lightning.backbones import IResNet, MobileFaceNet, build_backbone


def test_our_names_give_our_networks_whole() -> None:
    model = build_backbone("iresnet_tiny", 24, dropout=0.3)
    assert isinstance(model, IResNet) and model.num_classes == 24 and model.dropout.p == 0.3
    assert isinstance(build_backbone("mobilefacenet", 24), MobileFaceNet)
    assert build_backbone("iresnet_tiny", width=32).num_features == 256


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_100",  # its pooled features are wider than its last map
        "vit_tiny_patch16_224",  # built for 112x112
        "levit_128s",  # convolutions, then attention
    ],
)
def test_any_timm_model_becomes_an_embedder(name: str) -> None:
    torch.manual_seed(0)
    model = build_backbone(name, 24, dropout=0.2)
    embeddings = model(torch.randn(4, 3, 112, 112))
    embeddings.square().sum().backward()
    assert embeddings.shape == (4, 24)
    assert model.neck.dropout.p == 0.2
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_neck_is_bn_dropout_fc_bn_with_the_last_weight_fixed() -> None:
    torch.manual_seed(0)
    model = build_backbone("test_resnet", 24).double().eval()
    assert [type(m) for m in model.neck] == [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.BatchNorm1d]
    assert torch.all(model.neck.features.weight == 1)
    assert not model.neck.features.weight.requires_grad
    images = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    shrink = (1 + 1e-5) ** -0.5  # fresh running statistics: mean 0, variance 1
    fc = model.neck.fc
    expected = (model.trunk(images) * shrink @ fc.weight.T + fc.bias) * shrink
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)


def test_embeddings_are_float32_under_autocast() -> None:
    model = build_backbone("test_resnet", 24).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(2, 3, 112, 112)).dtype == torch.float32


def test_channels_last_reaches_the_weights() -> None:
    model = build_backbone("iresnet_tiny", 24, channels_last=True)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_shape_check_leaves_no_trace() -> None:
    """Parameters stay on their device, statistics at their start, and the model in training."""
    model = build_backbone("test_resnet", 24)
    assert model.training and all(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not model.trunk.bn1.running_mean.any() and model.trunk.bn1.num_batches_tracked == 0


def test_a_mistyped_name_is_met_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"^name must .* got 'iresnet101', .*iresnet100"):
        build_backbone("iresnet101")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"img_size": 224}),
        ("iresnet_tiny", {"in_chans": 1}),
        ("test_maxvit", {}),
    ],
)
def test_a_model_of_another_size_is_refused(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name} cannot take 3x112x112 images: [^\n]+$"):
        build_backbone(name, **arguments)


def test_a_model_that_cannot_be_built_so_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"_224 cannot be built for 3x112x112 images: [^\n]+$"):
        build_backbone("vit_tiny_r_s16_p8_224")


def test_a_model_without_one_vector_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="test_resnet must give one feature vector an image"):
        build_backbone("test_resnet", global_pool="")


@pytest.mark.parametrize(("name", "value"), [("embedding_size", 0), ("dropout", 1.0)])
def test_refuses_an_argument_out_of_range(name: str, value: float) -> None:
    for model in ("iresnet_tiny", "test_resnet"):
        with pytest.raises(ValueError, match=f"^{name} must .* got {value}"):
            build_backbone(model, **{name: value})


def saved(folder: Path, name: str, **arguments: Any) -> nn.Module:
    """A model of timm's, with the files of the hub in a folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments)
    save_for_hf(model, folder, safe_serialization=True)
    return model


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {}),
        ("test_vit", {"img_size": 112, "patch_size": 8, "depth": 2}),
        ("test_vit", {}),  # of 160 pixels: its positions are interpolated
    ],
)
def test_a_name_may_be_of_a_folder(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """Its weights are taken as timm takes them; without it the architecture builds the network."""
    model = saved(tmp_path / "repo", name, **arguments)
    source = f"local-dir:{tmp_path}/repo"
    fresh = build_backbone(source, 24)
    pretrained = build_backbone(source, 24, pretrained=True)
    for key, value in pretrained.trunk.state_dict().items():
        wanted = model.state_dict()[key]
        assert value.shape != wanted.shape or torch.equal(value, wanted)
        assert value.shape == wanted.shape or (key == "pos_embed" and not arguments)
    assert not torch.equal(*(next(each.trunk.parameters()) for each in (fresh, pretrained)))
    shutil.rmtree(tmp_path / "repo")
    known = json.loads(json.dumps(pretrained.architecture))
    assert known["name"] == name and known == fresh.architecture
    again = build_backbone(source, 24, architecture=known).eval()
    again.load_state_dict(pretrained.state_dict())
    images = torch.randn(2, 3, 112, 112)
    assert torch.equal(again(images), pretrained.eval()(images))
    assert again.architecture == known and build_backbone("test_resnet").architecture is None


def test_the_hub_is_asked_for_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path, "test_resnet")
    asked = []

    def download(repo_id: str, filename: str, **_: Any) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    built = build_backbone("hf_hub:somebody/faces", 24, pretrained=True)
    assert asked == [("somebody/faces", "config.json"), ("somebody/faces", "model.safetensors")]
    assert torch.equal(*(next(each.parameters()) for each in (built.trunk, model)))
    assert built.architecture["name"] == "test_resnet"


@pytest.mark.parametrize("name", ["hf_hub:somebody/faces", "test_resnet.r160_in1k", "resnet18"])
def test_without_the_hub_there_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    with pytest.raises(ValueError, match=rf"got {name} with pretrained=True: [^\n]*all$"):
        build_backbone(name, pretrained=True)


def test_what_cannot_be_looked_up_is_refused(tmp_path: Path) -> None:
    absent = f"local-dir:{tmp_path}/absent"
    with pytest.raises(ValueError, match=r"got local-dir:.*absent with pretrained=False: "):
        build_backbone(absent)
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "config.json").write_text('{"architecture": "nothing"}')
    with pytest.raises(ValueError, match=r"got local-dir:.*absent with pretrained=False: "):
        build_backbone(absent)
    with pytest.raises(ValueError, match="somewhere"):
        build_backbone("somewhere:faces")
    with pytest.raises(ValueError, match=r"architecture must be null .* got test_resnet"):
        build_backbone("test_resnet", architecture={"name": "test_resnet"})


@pytest.mark.slow
def test_a_model_of_every_family_embeds_or_is_refused_in_a_sentence() -> None:
    """The smallest by its name; those refused have tables of positions for one larger size."""
    small = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "tiny", "mini", "_s", "18", "b0")
    refused = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        order = sorted(
            names,
            key=lambda name: min(
                (place for place, token in enumerate(small) if token in name), default=len(small)
            ),
        )
        try:
            model = build_backbone(order[0], 32).eval()
            with torch.no_grad():
                assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 32), order[0]
        except ValueError as error:
            refused[order[0]] = str(error)
    assert len(refused) < 20, refused
    assert all(f"{name} cannot" in text and "\n" not in text for name, text in refused.items())


def test_models_that_deceive_a_probe() -> None:
    """Submodules that are shared, and a table of positions that does not reach."""
    assert build_backbone("coat_lite_tiny", 8).eval()(torch.zeros(1, 3, 112, 112)).shape == (1, 8)
    with pytest.raises(ValueError, match="mvitv2_tiny cannot"):
        build_backbone("mvitv2_tiny", 8)
