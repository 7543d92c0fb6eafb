"""The running average follows the batches and shrugs off those that are not finite."""

import math

import pytest
import torch

from fastface_lightning.margins.running import update


def test_is_an_exponential_moving_average() -> None:
    running, expected = torch.tensor(20.0), 20.0
    for batch in (3.0, 50.0, -7.5):
        update(running, torch.tensor(batch), 0.1)
        expected = 0.9 * expected + 0.1 * batch
    assert running.item() == pytest.approx(expected, rel=1e-6)


def test_alpha_one_takes_the_batch() -> None:
    running = torch.tensor(20.0)
    update(running, torch.tensor(3.0), 1)
    assert running == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_changes_nothing(bad: float) -> None:
    running = torch.tensor(20.0)
    update(running, torch.tensor(bad), 0.1)
    assert running == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_its_own_dtype_and_graph(dtype: torch.dtype) -> None:
    running = torch.tensor(20.0)
    update(running, torch.tensor(10.0, dtype=dtype, requires_grad=True), 0.01)
    assert running.dtype == torch.float32 and not running.requires_grad
    torch.testing.assert_close(running, torch.tensor(19.9), atol=2e-3, rtol=0)
