"""benchmarks/gpu.py runs, in small, on whatever there is."""

import json
from pathlib import Path

import common
import pytest
import torch
from programs import ROOT, load


@pytest.mark.program
def test_the_first_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--small"])
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    load(ROOT / "benchmarks" / "gpu.py").main()
    torch.backends.cudnn.benchmark = before[0]
    torch.set_float32_matmul_precision(before[1])
    found = json.loads((tmp_path / "gpu_small.json").read_text())
    assert [row["classifier"] for row in found["rows"]] == [
        *("chunked", "chunked classifier.products=bfloat16", "partial", "dynamic_pool", "attfc")
    ]
    assert found["left_out"] == {} and found["device"] and found["device_gib"] > 0
    for row in found["rows"]:
        assert row["images/s"] > 0 and 0 < row["GiB, planned"] < 1
    assert max(found["gradients_apart_from_float64"].values()) < 1e-4
    assert found["loader_images_per_second"] > 0 and found["hours_of_the_recipe"] > 0
