"""An ONNX file as an embedder, run by onnxruntime alone: neither Lightning nor timm is loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import METADATA_KEY
from ..preprocessing import IMAGE_SHAPE
from .embedder import Embedder

log = logging.getLogger(__name__)
ALIKE = 1e-5  # 1 - cosine below which images are not told apart


class OnnxEmbedder(Embedder):
    """An :class:`Embedder` by an ONNX file.

    Args:
        file: its one input is (N, 3, 112, 112), uint8 in [0, 255] or floats; its first output is
            (N, D). N may be a number, and then is the batch size.
        device: where the graph runs; images and embeddings are on the CPU.
        mirror: see :func:`load_embedder`.
        batch_size: images embedded at once.
        range: lowest and highest value that a graph of floats wants; None: what the file says, or
            [-1, 1], or [0, 255] where a graph that normalises by itself shows by a few images,
            which it would not tell apart in [-1, 1].
        channels: ``rgb``, or ``bgr``.

    Raises:
        ValueError: onnxruntime is absent, the file is no such ONNX, or it tells nothing apart.
    """

    def __init__(
        self,
        file: Path,
        device: torch.device,
        mirror: bool,
        batch_size: int,
        range: Sequence[float] | None = None,
        channels: str = "rgb",
    ) -> None:
        self.file, self.session = file, _session(file, device)
        fixed, self.is_uint8, embedding_size = _signature(self.session, file)
        self.is_fixed = fixed is not None
        metadata = self.session.get_modelmeta().custom_metadata_map
        about = json.loads(metadata.get(METADATA_KEY, "{}"))
        if self.is_uint8 and range is not None:
            raise ValueError(f"range must be null for a graph of uint8, got {list(range)}")
        given = (embedding_size, about, torch.device("cpu"), mirror, fixed or batch_size)
        super().__init__(*given, range, channels)
        on_gpu = "CUDAExecutionProvider" in self.session.get_providers()
        self.mirrors_at_once = on_gpu and not self.is_fixed
        if range is None and not (about or self.is_uint8):
            self._find_range()

    def _find_range(self) -> None:
        """Take [0, 255] where images lie far further apart in it than in [-1, 1]."""
        spreads = {}
        for self.range in ((-1.0, 1.0), (0.0, 255.0)):
            spreads[self.range] = self._spread()
        normal, pixels = spreads.values()
        if max(normal, pixels) < ALIKE:
            raise ValueError(
                f"an ONNX must tell images apart in [-1, 1] or [0, 255], got embeddings that are "
                f"all alike from {self.file}: give the range that it wants"
            )
        if normal > 0.05 or pixels < 10 * normal:
            self.range = (-1.0, 1.0)
        else:
            log.warning(
                "%s tells images apart in [0, 255] alone, as if it normalised by itself: it is "
                "given such; range=[-1,1] says otherwise",
                self.file,
            )

    def _spread(self) -> float:
        """1 - lowest cosine between the embeddings of patterns that have little in common; 0 where
        they are not finite."""
        size = IMAGE_SHAPE[1]
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        patterns = [x < size // 2, y < size // 2, (x + y) // 8 % 2 == 0, (x - y).abs() < size // 4]
        images = torch.stack(patterns)[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255
        rows = torch.cat([self._forward(part) for part in images.split(self.batch_size)])
        units = F.normalize(rows.float())
        return float(1 - (units @ units.T).min()) if units.isfinite().all() else 0.0

    def _forward(self, images: Tensor) -> Tensor:
        count = len(images)
        if self.is_fixed and count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        pixels = (images.contiguous() if self.is_uint8 else self._floats(images)).numpy()
        embeddings = self.session.run(None, {self.session.get_inputs()[0].name: pixels})[0]
        return torch.from_numpy(embeddings)[:count]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.mirror} {self.range} {self.channels}".encode())
        digest.update(self.file.read_bytes())
        return digest.hexdigest()


def _session(file: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError("an .onnx takes onnxruntime: pip install onnxruntime") from error
    onnxruntime.set_default_logger_severity(3)
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return onnxruntime.InferenceSession(str(file), providers=providers)
    except Exception as error:  # its errors share no base class
        first_line = str(error).splitlines()[0]
        raise ValueError(f"{file} is no ONNX that onnxruntime can run: {first_line}") from error


def _signature(session: Any, file: Path) -> tuple[int | None, bool, int]:
    """A graph's fixed batch size, whether it takes uint8, and D; refuse what does not map faces."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    image, embedding = inputs[0], outputs[0]
    fits = (
        len(inputs) == 1
        and image.type in ("tensor(float)", "tensor(uint8)")
        and len(image.shape) == 4
        and all(
            not isinstance(size, int) or size == expected
            for size, expected in zip(image.shape[1:], IMAGE_SHAPE, strict=True)
        )
    )
    if not fits:
        described = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise ValueError(
            f"an ONNX must have one input, (N, 3, 112, 112) of floats or of uint8, "
            f"got {described} in {file}"
        )
    if len(embedding.shape) != 2 or not isinstance(embedding.shape[1], int):
        got = f"{embedding.name} {embedding.shape}"
        raise ValueError(f"an ONNX must give embeddings (N, D) first, got {got} in {file}")
    batch = image.shape[0] if isinstance(image.shape[0], int) else None
    return batch, image.type == "tensor(uint8)", embedding.shape[1]
