"""Names of the package are there when asked for, and cost no more than the part they are of."""

import subprocess
import sys

import pytest

from fastface_lightning import data


@pytest.mark.parametrize(
    ("module", "absent"),
    [("align", {"torch", "lightning"}), ("formats.image", {"lightning", "torchmetrics"})],
)
def test_a_part_loads_no_more_than_it_needs(module: str, absent: set[str]) -> None:
    program = f"import sys, fastface_lightning.data.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PIL" in done.stdout.split() and not absent & set(done.stdout.split())


def test_every_public_name_is_there() -> None:
    assert dir(data) == sorted(data.__all__)
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing
