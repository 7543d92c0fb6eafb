"""Settings that say `auto` follow the device."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fastface_lightning.training.devices import loss_scaling, resolve_device


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Any:
    def resolved(cuda: bool, bf16: bool, accelerator: str = "auto", plan: Any = False) -> Any:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        trainer = {"accelerator": accelerator, "precision": "auto", "benchmark": None}
        cfg = OmegaConf.create(
            {
                "trainer": trainer,
                "model": {"channels_last": "auto"},
                "plan": plan,
            }
        )
        resolve_device(cfg)
        found = cfg.trainer.precision, cfg.model.channels_last, cfg.trainer.benchmark
        return found, loss_scaling(cfg)

    return resolved


def test_a_processor_and_a_gpu(resolved: Any) -> None:
    assert resolved(cuda=False, bf16=False) == (("32-true", False, False), [])
    assert resolved(cuda=True, bf16=True, accelerator="cpu")[0][0] == "32-true"
    assert resolved(cuda=True, bf16=True) == (("bf16-mixed", True, True), [])


def test_a_gpu_without_bf16_has_the_papers_float16_and_loss_scaler(resolved: Any) -> None:
    found, (plugin,) = resolved(cuda=True, bf16=False)
    assert found == ("16-mixed", True, True)
    assert plugin.scaler.get_growth_interval() == 100


def test_a_plan(resolved: Any) -> None:
    """For a GPU that is elsewhere, or for this device."""
    assert resolved(cuda=False, bf16=False, plan=24)[0][:2] == ("bf16-mixed", True)
    assert resolved(cuda=False, bf16=False, plan=True)[0][:2] == ("32-true", False)
