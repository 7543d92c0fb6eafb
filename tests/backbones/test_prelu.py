"""Our PReLU is torch's to the bit, in its values and in both gradients."""

import pytest
import torch
from torch import nn

from fastface_lightning.backbones.prelu import PReLU


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_torch(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 6, 9, 7, dtype=dtype)
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, 1e-40])
    results = []
    for kind in (PReLU, nn.PReLU):
        prelu = kind(6).to(dtype)
        with torch.no_grad():
            prelu.weight.copy_(torch.linspace(-0.5, 1.5, 6))
        taken = x.to(memory_format=memory_format, copy=True).requires_grad_()
        y = prelu(taken)
        y.backward(grad.to(memory_format=memory_format))
        results.append((y.detach(), taken.grad, prelu.weight.grad))
        assert y.is_contiguous(memory_format=memory_format)
        assert results[-1][1].is_contiguous(memory_format=memory_format)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_frozen_slope_and_no_gradient() -> None:
    prelu, x = PReLU(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    prelu.requires_grad_(False)
    prelu(x).sum().backward()
    assert torch.equal(x.grad, torch.where(x > 0, 1.0, 0.25))
    with torch.no_grad():
        assert torch.equal(prelu(x), nn.PReLU(3)(x))
