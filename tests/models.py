"""A small network in the files that a model can come in."""

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from fastface_lightning.backbones import build_backbone

SIZE = 16
RUN: dict[str, Any] = {
    "config": {
        "model": {
            "_target_": "fastface_lightning.backbones.build_backbone",
            "name": "iresnet_tiny",
            "embedding_size": SIZE,
            "channels_last": True,
            "compile": False,
            "freeze": ["conv1"],
        },
        "data": {"_target_": "fastface_lightning.data.FaceData", "name": "webface12m"},
        "margin": {"_target_": "fastface_lightning.margins.CosFace", "m": 0.4},
        "classifier": {"scale": 64.0},
    },
    "commit": "0123abc",
    "steps": 7,
    "verification": {"lfw": 0.9},
    "thresholds": {
        "lfw": {
            "mirror": True,
            "precision": "32-true",
            "accuracy": 0.9,
            "people": 40,
            "impostors": 300,
            "far": {"1e-02": 0.01, "1e-01": 0.1},
            "cosine_thresholds": {"1e-02": 0.4, "1e-01": 0.3},
        }
    },
}


def network(seed: int = 0) -> nn.Module:
    """iresnet_tiny in eval mode, its statistics those of noise."""
    torch.manual_seed(seed)
    model = build_backbone("iresnet_tiny", SIZE)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, 3, 112, 112) * 2 - 1)
    return model.eval()


def save_checkpoint(file: Path, model: nn.Module, run: dict[str, Any] | None = RUN) -> Path:
    """As train.py writes it, without what a resume needs."""
    weights = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    content = {"state_dict": {**weights, "classifier.weight": torch.zeros(3, SIZE)}}
    torch.save(content if run is None else {**content, "run": run}, file)
    return file


def noise(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8, generator=generator)


def onnx_file(
    file: Path, inputs: list[Any], output: list[Any] = ("N", 3), op: str = "ReduceMean"
) -> Path:
    """A graph that gives the mean of each channel, or something else, of inputs so described."""
    values = [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs]
    nodes = [helper.make_node("Cast", [inputs[0][0]], ["floats"], to=TensorProto.FLOAT)]
    if op == "ReduceMean":
        axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
        nodes.append(helper.make_node(op, ["floats", "axes"], ["out"], keepdims=0))
    else:
        axes = None
        nodes.append(helper.make_node(op, ["floats"], ["out"]))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, list(output))
    graph = helper.make_graph(nodes, "g", values, [out], [axes] if axes else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, file)
    return file


FLOATS = ("images", TensorProto.FLOAT, ["N", 3, 112, 112])
