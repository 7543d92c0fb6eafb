"""From a photograph to aligned crops of its faces, or to the reason why there is none."""

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import reason
from .align import Landmarks, align_face
from .datasets.image_files import ImageFiles
from .detect import Detections, FaceDetector
from .formats.image import decode_original, encode_jpeg
from .formats.names import jpeg_name

AS_LARGE = 0.5  # of the main face's area: with another one so large it is doubtful who is meant


class Aligned(NamedTuple):
    """What a photograph gives.

    Attributes:
        faces: those wanted, by the photograph's name.
        crops: of each a JPEG of 112 x 112.
        why: why there is none; empty if there is one.
    """

    faces: Sequence[Landmarks]
    crops: Sequence[bytes]
    why: str = ""


class Photos:
    """``photos[i]`` aligns the faces of photograph i; worker processes may take the object along.

    Args:
        root: folder of the photographs.
        names: their paths in it.
        detector: finds the faces.
        listed: landmarks by the photographs' names, of those where they are known already.
        every: every face, not the main one alone.
        min_face: pixels, the side of the smallest face's box.
        quality: of the JPEGs, in [1, 100].
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        detector: FaceDetector,
        listed: Mapping[str, Sequence[Landmarks]],
        every: bool = False,
        min_face: float = 32,
        quality: int = 95,
    ) -> None:
        self.root, self.names, self.detector, self.listed = Path(root), names, detector, listed
        self.every, self.min_face, self.quality = every, min_face, quality

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Aligned:
        name = self.names[index]
        try:
            if not can_be_listed(name):
                raise ValueError("its name has a tab or line break, or begins with a blank")
            image = decode_original((self.root / name).read_bytes())
            faces = self.listed.get(name) or self._find(name, image)
            crops = [align_face(image, face.points) for face in faces]
        except NoFaceError as why:
            return Aligned([], [], str(why))
        except (OSError, ValueError) as error:
            return Aligned([], [], f"unreadable: {' '.join(reason(error).split())}")
        return Aligned(faces, [encode_jpeg(crop, self.quality) for crop in crops])

    def _find(self, name: str, image: NDArray[np.uint8]) -> list[Landmarks]:
        found, chosen = find_faces(image, self.detector, self.min_face, self.every)
        points = found.points.round(2)  # as a list holds them, by which crops may be made anew
        return [Landmarks(name, points[k], float(found.scores[k])) for k in chosen]


class FaceFiles(ImageFiles):
    """Face images, aligned or not: one of 112 x 112 pixels is taken as it is, of any other
    photograph the main face is aligned.

    Args:
        paths: the files.
        detector: finds the faces; None: a photograph comes as zeros, and ``why`` says so.
        min_face: pixels, the side of the smallest face's box.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        detector: FaceDetector | None,
        min_face: float = 32,
    ) -> None:
        super().__init__(paths)
        self.detector, self.min_face = detector, min_face

    def _read(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            image = decode_original(Path(path).read_bytes())
            if image.shape[:2] != (self.size, self.size):
                if self.detector is None:
                    height, width = image.shape[:2]
                    raise ValueError(
                        f"an image of {width} x {height} pixels must be aligned, which takes the "
                        f"extra align: pip install -e '.[align]'"
                    )
                found, (main,) = find_faces(image, self.detector, self.min_face)
                image = align_face(image, found.points[main], self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {reason(error)}") from error
        return torch.from_numpy(image.transpose(2, 0, 1).copy())


def find_faces(
    image: NDArray[np.uint8], detector: FaceDetector, min_face: float, every: bool = False
) -> tuple[Detections, list[int]]:
    """The faces in an image, (H, W, 3) uint8 RGB, and which of them are meant.

    Raises:
        NoFaceError: there is none, only smaller ones than ``min_face``, or, unless ``every`` face
            is wanted, another one as large.
    """
    found = detector(image)
    if not len(found.scores):
        raise NoFaceError("no face")
    main, areas = found.main(*image.shape[:2]), found.areas()
    chosen = [k for k in range(len(areas)) if every or k == main]
    chosen = [k for k in chosen if areas[k] >= min_face**2]
    if not chosen:
        raise NoFaceError(f"small: {areas[main] ** 0.5:.0f} pixels")
    large = int((areas >= AS_LARGE * areas[main]).sum())
    if large > 1 and not every:
        raise NoFaceError(f"several: {large} faces of like size")
    for k in chosen:
        found.points[k] = detector.refine(image, found.points[k])
    return found, chosen


def crop_files(name: str, count: int, every: bool) -> list[Path]:
    """Where so many crops of a photograph belong: at its own place, numbered if ``every``."""
    file = Path(name).parent / jpeg_name(name)
    if not every:
        return [file][:count]
    return [file.with_name(f"{file.stem}_{k}.jpg") for k in range(1, count + 1)]


def can_be_listed(name: str) -> bool:
    """Whether a list of landmarks can hold a name, and give it back as it is."""
    return name == name.strip() and not {"\t", "\n", "\r"} & set(name)


def ignore_interrupts(_: int) -> None:
    """For a DataLoader's workers: Ctrl-C is for the program, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_it_is(aligned: Any) -> Any:
    """For a DataLoader, which would make tensors of arrays."""
    return aligned


class NoFaceError(ValueError):
    """Why a photograph gives no crop."""
