"""What of the machine a test needs: the CPU or, in the tier ``gpu``, a GPU; a C++ compiler."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="torch.compile for processors needs a C++ compiler"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Its float32 is float32: products and convolutions without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)
