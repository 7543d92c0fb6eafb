"""What a device is good at: the settings that say ``auto`` follow it."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import DictConfig


def uses_cuda(cfg: DictConfig) -> bool:
    """Whether the trainer will choose a CUDA device."""
    return torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def resolve_device(cfg: DictConfig) -> None:
    """Replace the settings of a run that say ``auto``, or null, by what its device is good at.

    ``model.channels_last``, ``trainer.precision`` (bf16 where a GPU has it, else float16) and
    ``trainer.benchmark``. A plan for a GPU of so many GiB is made as if it were here.
    """
    cuda = uses_cuda(cfg) or (bool(cfg.plan) and cfg.plan is not True)
    if uses_cuda(cfg):
        torch.set_float32_matmul_precision("high")
    if cfg.model.channels_last == "auto":
        cfg.model.channels_last = cuda
    if cfg.trainer.precision == "auto":
        half = "bf16-mixed" if cfg.plan or torch.cuda.is_bf16_supported(False) else "16-mixed"
        cfg.trainer.precision = half if cuda else "32-true"
    if cfg.trainer.benchmark is None:
        cfg.trainer.benchmark = cuda


def loss_scaling(cfg: DictConfig) -> list[MixedPrecision]:
    """The paper's loss scaler of float16, as a plugin of the trainer: it grows every 100 steps, not
    every 2000."""
    if cfg.trainer.precision != "16-mixed" or not uses_cuda(cfg):
        return []
    scaler = torch.amp.GradScaler("cuda", growth_interval=100)
    return [MixedPrecision("16-mixed", "cuda", scaler)]
