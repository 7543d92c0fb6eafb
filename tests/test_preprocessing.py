"""What networks take: uint8 RGB to [-1, 1], by a module that costs no more than torch."""

import pytest
import torch
from test_layers import newly_imported

from fastface_lightning.preprocessing import normalise


def test_normalise() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(2, 3, 4, 1).transpose(2, 3)
    got = normalise(images)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got[1, 2, :, 3], torch.tensor([-1, -0.6, 1]))


@pytest.mark.slow
def test_it_needs_no_timm() -> None:
    loaded = newly_imported(
        "from fastface_lightning.preprocessing import normalise", "import torch"
    )
    assert not loaded & {"timm", "torchvision", "lightning"}
