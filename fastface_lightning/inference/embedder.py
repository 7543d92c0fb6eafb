"""A trained model as a function, whatever file it is in: face images in, unit embeddings out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import build_backbone, load_weights, normalise
from ..backbones.timm_model import IMAGE_SHAPE
from ..backbones.weights import ABOUT, embedding_size_of, read_about, read_weights, recognise

_NOT_OF_THE_NETWORK = ("_target_", "compile", "freeze", "pretrained", "grad_checkpointing")


class Embedder(ABC):
    """Aligned faces to unit embeddings, in batches, without gradients.

    Args:
        embedding_size: D.
        about: what is known of the model, plain data; see :func:`about_run`.
        device: where images are embedded.
        mirror: add the embedding of the mirror image, as the accuracies in papers are measured;
            twice the work.
        batch_size: images embedded at once.

    Example:
        >>> embed = load_embedder("model.onnx")  # doctest: +SKIP
        >>> embeddings = embed(images)  # doctest: +SKIP
    """

    def __init__(
        self,
        embedding_size: int,
        about: Mapping[str, Any],
        device: torch.device,
        mirror: bool,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image, got {batch_size}")
        self.embedding_size, self.about = embedding_size, dict(about)
        self.device, self.mirror, self.batch_size = device, mirror, batch_size

    def __call__(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, D) float32, on the CPU, of aligned faces.

        Args:
            images: (N, 3, 112, 112) uint8 RGB in [0, 255]; anything :func:`torch.as_tensor` takes.

        Raises:
            ValueError: images of another shape or dtype.
        """
        return F.normalize(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The embeddings before normalisation, whose length tells of an image's quality; with
        ``mirror`` the sum over the image and its mirror image. See :meth:`__call__`."""
        try:
            images = torch.as_tensor(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"images must be a tensor or array, got {type(images)}") from error
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
            shape = ", ".join(map(str, IMAGE_SHAPE))
            hint = ": permute(0, 3, 1, 2)?" if images.ndim == 4 and images.shape[3] == 3 else ""
            raise ValueError(
                f"images must be uint8 (N, {shape}), RGB, got {images.dtype} "
                f"{tuple(images.shape)}{hint}"
            )
        found = torch.empty(len(images), self.embedding_size)
        for part, out in zip(
            images.split(self.batch_size), found.split(self.batch_size), strict=True
        ):
            out.copy_(self._forward(part))
            if self.mirror:
                out += self._forward(part.flip(-1)).cpu()
        return found

    @abstractmethod
    def _forward(self, images: Tensor) -> Tensor:
        """Embeddings (n, D), on any device, of at most ``batch_size`` images uint8."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """What two embedders share only if they embed alike, as far as their weights tell."""


class TorchEmbedder(Embedder):
    """An :class:`Embedder` by a torch backbone, ``network``, which it puts into eval mode."""

    def __init__(self, network: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network = network.to(self.device).eval()

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images.to(self.device, non_blocking=True)))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.about.get("network"), self.mirror]).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class OnnxEmbedder(Embedder):
    """An :class:`Embedder` by an ONNX file, run by onnxruntime.

    Args:
        file: its one input is (N, 3, 112, 112), uint8 in [0, 255] or floats in [-1, 1], RGB; its
            first output is (N, D). N may be a number, and then is the batch size.
        kwargs: see :class:`Embedder`.

    Raises:
        ValueError: onnxruntime is absent, or the file is no such ONNX.
    """

    def __init__(self, file: Path, device: torch.device, mirror: bool, batch_size: int) -> None:
        self.file, self.session = file, _session(file, device)
        fixed, self.is_uint8, embedding_size = _signature(self.session, file)
        self.is_fixed = fixed is not None
        about = json.loads(self.session.get_modelmeta().custom_metadata_map.get(ABOUT, "{}"))
        # The graph may run on a card; its input and output are on the CPU here.
        super().__init__(embedding_size, about, torch.device("cpu"), mirror, fixed or batch_size)

    def _forward(self, images: Tensor) -> Tensor:
        count = len(images)
        if self.is_fixed and count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        given = images.contiguous() if self.is_uint8 else normalise(images)
        (found, *_) = self.session.run(None, {self.session.get_inputs()[0].name: given.numpy()})
        return torch.from_numpy(found)[:count]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.mirror).encode())
        digest.update(self.file.read_bytes())
        return digest.hexdigest()


def load_embedder(
    path: str | Path,
    network: str | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    mirror: bool = False,
    batch_size: int = 128,
) -> Embedder:
    """Load a trained model as a function from images to unit embeddings.

    Args:
        path: a checkpoint of ``train.py``, or what ``recipes/export.py`` writes: ``.onnx``,
            ``.safetensors``, InsightFace's ``backbone.pth``; also an ONNX from elsewhere, or any
            state_dict that :func:`fastface_lightning.backbones.load_weights` reads.
        network: its timm name, or all that
            :func:`fastface_lightning.backbones.build_backbone` takes. None is what the file says;
            of bare weights an IResNet or MobileFaceNet is known by its keys and shapes.
        device: where to embed; None is the GPU if there is one.
        mirror: add the mirror image's embedding, as the accuracies in papers are measured; twice
            the work.
        batch_size: images embedded at once.

    Returns:
        A function from images (N, 3, 112, 112) uint8 RGB to embeddings (N, D) float32 of length 1,
        on the CPU; its ``about`` says what is known of the model.

    Raises:
        ValueError: no such file, one that holds something else, or bare weights of an unknown
            network.

    Example:
        >>> embed = load_embedder("model.onnx")  # doctest: +SKIP
        >>> embed(torch.zeros(2, 3, 112, 112, dtype=torch.uint8)).shape  # doctest: +SKIP
        torch.Size([2, 512])
    """
    path = Path(path)
    if not path.is_file():
        inside = next(iter(sorted(path.rglob("best.ckpt"))), None)
        such = f", such as {inside}" if inside else ""
        raise ValueError(f"a model must be a file{such}, got {path}")
    device = _device(device)
    if path.suffix.lower() == ".onnx":
        return OnnxEmbedder(path, device, mirror, batch_size)
    about = read_about(path)
    if "config" in about:
        try:
            about = about_run(about)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"a checkpoint must say of its run what train.py writes, got another run in {path}"
            ) from error
    spec = _network(path, network, about)
    model = build_backbone(**spec)
    load_weights(model, path)
    about["network"] = spec
    return TorchEmbedder(model, spec["embedding_size"], about, device, mirror, batch_size)


def about_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What to know of a model, from the ``run`` that a checkpoint holds.

    Returns:
        Plain data: ``network`` (what ``build_backbone`` takes), ``data``, ``margin``, ``scale``,
        ``steps`` trained, ``commit`` and ``verification``, the accuracy of each set.
    """
    config = run["config"]
    margin = {k: v for k, v in config["margin"].items() if k != "_target_"}
    kind = config["margin"]["_target_"].rpartition(".")[2]
    data = config["data"]
    return {
        "network": {k: v for k, v in config["model"].items() if k not in _NOT_OF_THE_NETWORK},
        "data": data.get("name") or data["_target_"].rpartition(".")[2],
        "margin": f"{kind}({', '.join(f'{key}={value}' for key, value in margin.items())})",
        "scale": config["classifier"]["scale"],
        "steps": run["steps"],
        "commit": run["commit"],
        "verification": run["verification"],
    }


def _network(
    path: Path, given: str | Mapping[str, Any] | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What to build for a file's weights: what is asked for, what it says, or what fits them."""
    if isinstance(given, Mapping):
        spec = {k: v for k, v in given.items() if k not in _NOT_OF_THE_NETWORK}
    elif given is not None:
        spec = {"name": given}
    else:
        spec = dict(about.get("network") or {})
    spec.pop("channels_last", None)
    if "name" in spec and "embedding_size" in spec:
        return spec
    weights = read_weights(path)
    if "name" not in spec:
        name = recognise(weights)
        if name is None:
            raise ValueError(
                f"network must be given with {path}, whose weights are of no IResNet or "
                f"MobileFaceNet: network=NAME, its name in timm"
            )
        spec["name"] = name
    return {**spec, "embedding_size": embedding_size_of(weights) or 512}


def _device(asked: str | torch.device | None) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=asked).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device must be one that torch can use here, got {asked}") from error


def _session(file: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(
            "an .onnx is run by onnxruntime, which is absent: pip install onnxruntime"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return onnxruntime.InferenceSession(str(file), providers=providers)
    except Exception as error:  # its errors share no base class
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is no ONNX that onnxruntime can run: {reason}") from error


def _signature(session: Any, file: Path) -> tuple[int | None, bool, int]:
    """A graph's fixed batch size, whether it takes uint8, and D; refuse what does not map faces."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    kinds = {"tensor(float)": False, "tensor(uint8)": True}
    channels, height, width = IMAGE_SHAPE
    first = inputs[0]
    fits = (
        len(inputs) == 1
        and first.type in kinds
        and len(first.shape) == 4
        and all(
            not isinstance(found, int) or found == wanted
            for found, wanted in zip(first.shape[1:], (channels, height, width), strict=True)
        )
    )
    if not fits:
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ValueError(
            f"an ONNX must have one input, (N, {channels}, {height}, {width}) of floats in [-1, 1] "
            f"or of uint8, got {found} in {file}"
        )
    shape = outputs[0].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ValueError(
            f"an ONNX must give embeddings (N, D) first, got {outputs[0].name} {shape} in {file}"
        )
    batch = first.shape[0] if isinstance(first.shape[0], int) else None
    return batch, kinds[first.type], shape[1]
