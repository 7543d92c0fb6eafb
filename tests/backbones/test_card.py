"""The numbers of docs/backbones.md are those of the networks its configs build."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from fastface_lightning.backbones import build_backbone

ROOT = Path(__file__).resolve().parents[2]
CARD = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", CARD, flags=re.MULTILINE)
CONFIGS = ROOT / "conf" / "model"
SWITCHES = ("embedding_size", "dropout", "channels_last", "compile", "grad_checkpointing", "freeze")


def test_every_config_has_its_row() -> None:
    found = {config: name for config, name, _, _ in ROWS}
    expected = {file.stem: OmegaConf.load(file).name for file in CONFIGS.glob("*.yaml")}
    del expected["timm"]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [pytest.param(*row[1:], marks=[] if float(row[3]) < 3 else [pytest.mark.slow]) for row in ROWS],
)
def test_parameters_and_multiply_adds(name: str, parameters: str, multiply_adds: str) -> None:
    with torch.device("meta"):
        model = build_backbone(name, embedding_size=512).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 112, 112))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.2f}" == parameters
    assert f"{counter.get_total_flops() / 2e9:.2f}" == multiply_adds


def test_every_switch_is_in_every_config_and_in_the_card() -> None:
    for file in CONFIGS.glob("*.yaml"):
        keys = [key for key in OmegaConf.load(file) if key in SWITCHES]
        assert keys == list(SWITCHES), file
    for switch in SWITCHES:
        assert f"| `model.{switch}` |" in CARD
