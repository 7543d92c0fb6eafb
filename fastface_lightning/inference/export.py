"""A trained backbone as ONNX, InsightFace's weights or safetensors, checked as it is written."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.weights import SAFETENSORS, read_weights
from ..data import SyntheticFaces
from ..files import METADATA_KEY, replacing, write_text
from ..preprocessing import IMAGE_SHAPE, normalise
from .onnx_embedder import OnnxEmbedder
from .torch_embedder import TorchEmbedder

SUFFIXES = (".onnx", ".pth", SAFETENSORS)
OPSET = 20  # of 2023; runtimes on phones and GPUs are years behind the newest
MAX_DIFFERENCE, MIN_COSINE = 1e-4, 0.9999


def export(embedder: TorchEmbedder, target: Path, uint8: bool = False) -> dict[str, Any]:
    """Write a model to a file whose suffix says how; the file is checked before it has its name.

    - ``.onnx``: input ``images`` (N, 3, 112, 112) RGB, float32 in [-1, 1] or uint8 in [0, 255];
      output ``embedding`` (N, D) float32, not normalised. N is free.
    - ``.pth``: a state_dict with InsightFace's keys, as its ``backbone.pth``, and beside it
      ``FILE.pth.json`` with the metadata.
    - ``.safetensors``: the same keys.

    Args:
        embedder: of :func:`fastface_lightning.load_embedder`, from any file of weights.
        target: the file; one that is there is replaced.
        uint8: the ONNX takes uint8 and normalises inside.

    Returns:
        The metadata in the file: what ``embedder.about`` says, ``input`` and ``output``. Of an ONNX
        also ``difference``, the largest of an element of its embeddings from torch's, in lengths of
        the embedding, and ``cosine``, the least.

    Raises:
        ValueError: an unknown suffix; ``uint8`` without an ONNX; an ONNX whose ``difference`` is
            above 1e-4 or whose ``cosine`` is not above 0.9999.
    """
    check_target(target, uint8)
    about: dict[str, Any] = {
        **embedder.about,
        "input": {
            "shape": ["N", *IMAGE_SHAPE],
            "colour_order": "RGB",
            "dtype": "uint8" if uint8 else "float32",
            "range": [0, 255] if uint8 else [-1, 1],
            "alignment": "ArcFace's five points",
        },
        "output": {"shape": ["N", embedder.embedding_size], "dtype": "float32", "unit": False},
    }
    with replacing(target) as part:
        if target.suffix == ".onnx":
            network = copy.deepcopy(embedder.network).cpu()
            network.to(memory_format=torch.contiguous_format)
            _write_onnx(network, part, about, uint8)
            about |= _compare(network, part)
        else:
            weights = {k: v.contiguous() for k, v in embedder.network.state_dict().items()}
            if target.suffix == SAFETENSORS:
                save_file(weights, part, metadata={METADATA_KEY: json.dumps(about), "format": "pt"})
            else:
                torch.save(weights, part)
            written = read_weights(part)
            if written.keys() != weights.keys() or not all(
                torch.equal(written[key], weights[key].cpu()) for key in weights
            ):
                raise ValueError(f"{part} must hold the weights that were written, got others")
        part.chmod(0o644)  # safetensors writes a file that its owner alone may read
    if target.suffix == ".pth":
        write_text(target.with_name(target.name + ".json"), json.dumps(about, indent=2) + "\n")
    return about


def check_target(target: Path, uint8: bool) -> None:
    """Refuse a file of no known kind, before anything is loaded; see :func:`export`."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"target must end in {' or '.join(SUFFIXES)}, got {target}")
    if uint8 and target.suffix != ".onnx":
        raise ValueError(f"uint8=true is for an .onnx, weights take floats, got {target}")


class _Normalise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return normalise(images)


def _write_onnx(network: nn.Module, file: Path, about: dict[str, Any], uint8: bool) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  what torch exports with
    except ModuleNotFoundError as error:
        raise ValueError(
            "an .onnx takes packages that are absent: pip install onnx onnxscript onnxruntime"
        ) from error
    images = torch.zeros(2, *IMAGE_SHAPE, dtype=torch.uint8)
    model = nn.Sequential(_Normalise(), network) if uint8 else network
    for library in ("torch.onnx", "onnxscript", "onnx_ir"):  # which report every optimisation
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            (images if uint8 else normalise(images),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            input_names=["images"],
            output_names=["embedding"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(about)})
    onnx.checker.check_model(proto)
    onnx.save(proto, file)


@torch.no_grad()
def _compare(network: nn.Module, file: Path) -> dict[str, float]:
    """Embed faces with both, in batches of other sizes than the exported one."""
    faces = SyntheticFaces(8, 1)
    images = torch.stack([faces[i][0] for i in range(len(faces))])
    exported = OnnxEmbedder(file, torch.device("cpu"), mirror=False, batch_size=5)
    by_torch, by_onnx = network(normalise(images)).double(), exported.features(images).double()
    if not by_torch.isfinite().all():
        raise ValueError("a network must give finite embeddings, got others: has it been trained?")
    length = by_torch.norm(dim=1, keepdim=True)
    difference = ((by_torch - by_onnx).abs() / length).max().item()
    cosine = F.cosine_similarity(by_torch, by_onnx).min().item()
    if not (difference <= MAX_DIFFERENCE and cosine > MIN_COSINE):
        raise ValueError(
            f"an ONNX must embed as torch does, within {MAX_DIFFERENCE} and above a cosine of "
            f"{MIN_COSINE}, got {difference:.2g} and {cosine:.6f}: nothing is written"
        )
    return {"difference": difference, "cosine": cosine}
