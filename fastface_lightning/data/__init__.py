"""Faces as tensors: sets of identities to train on, and sets of pairs to verify on."""

# ruff: noqa: F401
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .align import ARCFACE_POINTS, align_face, read_landmarks, similarity_transform
    from .augment import Augment
    from .datamodule import (
        FaceData,
        FaceDataModule,
        LFWData,
        SyntheticData,
        open_faces,
    )
    from .datasets.base import FaceDataset
    from .datasets.folder import FaceList, IdentityFolder, identity_names
    from .datasets.image_files import ImageFiles, find_images, other_files
    from .datasets.records import RecordDataset
    from .datasets.shards import ShardDataset
    from .datasets.synthetic import SyntheticFaces
    from .detect import Detections, FaceDetector
    from .formats.image import decode_image, decode_into, decode_original, encode_jpeg, is_packable
    from .formats.verification_bin import write_verification_bin
    from .ijb import IJBData, TemplateSubjects, is_ijb, read_ijb
    from .loader import EpochSampler, FaceLoader, GroupSampler, epoch_permutation
    from .pairs import (
        PairImages,
        VerificationPairs,
        held_out_pairs,
        interleaved,
        pair_files,
        read_pairs,
        read_verification,
        read_verification_bin,
        synthetic_pairs,
    )
    from .people import People, is_held_out
else:  # a type checker that saw this __getattr__ would take any name for one of ours

    def __getattr__(name: str) -> object:
        """Load a public name at its first use: aligning needs no torch, reading no Lightning."""
        from importlib import import_module

        for module, names in _NAMES.items():
            if name in names.split():
                value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_NAMES = {
    "align": "ARCFACE_POINTS align_face read_landmarks similarity_transform",
    "augment": "Augment",
    "datamodule": "FaceData FaceDataModule LFWData SyntheticData open_faces",
    "datasets.base": "FaceDataset",
    "datasets.folder": "FaceList IdentityFolder identity_names",
    "datasets.image_files": "ImageFiles find_images other_files",
    "datasets.records": "RecordDataset",
    "datasets.shards": "ShardDataset",
    "datasets.synthetic": "SyntheticFaces",
    "detect": "Detections FaceDetector",
    "formats.image": "decode_image decode_into decode_original encode_jpeg is_packable",
    "formats.verification_bin": "write_verification_bin",
    "ijb": "IJBData TemplateSubjects is_ijb read_ijb",
    "loader": "EpochSampler FaceLoader GroupSampler epoch_permutation",
    "pairs": "PairImages VerificationPairs held_out_pairs interleaved pair_files read_pairs"
    " read_verification read_verification_bin synthetic_pairs",
    "people": "People is_held_out",
}
__all__ = [name for names in _NAMES.values() for name in names.split()]


def __dir__() -> list[str]:
    return sorted(__all__)
