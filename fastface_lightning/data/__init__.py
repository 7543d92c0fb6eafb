"""Faces as tensors: sets of identities to train on, and sets of pairs to verify on."""

from .datamodule import (
    FaceDataModule,
    FolderData,
    LFWData,
    SyntheticData,
    split_identities,
)
from .folder import IdentityFolder, identity_names
from .image import decode_image
from .order import EpochSampler, epoch_order
from .synthetic import SyntheticFaces, synthetic_pairs
from .verification import (
    VerificationPairs,
    held_out_pairs,
    interleaved,
    read_pairs,
)

__all__ = [
    "EpochSampler",
    "FaceDataModule",
    "FolderData",
    "IdentityFolder",
    "LFWData",
    "SyntheticData",
    "SyntheticFaces",
    "VerificationPairs",
    "decode_image",
    "epoch_order",
    "held_out_pairs",
    "identity_names",
    "interleaved",
    "read_pairs",
    "split_identities",
    "synthetic_pairs",
]
