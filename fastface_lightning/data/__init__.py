"""Faces as tensors: sets of identities to train on, and sets of pairs to verify on."""

from .align import ARCFACE_POINTS, align_face, read_landmarks, similarity_transform
from .augment import Augment
from .datamodule import (
    FaceData,
    FaceDataModule,
    LFWData,
    SyntheticData,
    open_faces,
    split_identities,
)
from .datasets.base import FaceDataset
from .datasets.folder import FaceList, IdentityFolder, identity_names
from .datasets.image_files import ImageFiles, find_images
from .datasets.records import RecordDataset
from .datasets.shards import ShardDataset
from .datasets.synthetic import SyntheticFaces, synthetic_pairs
from .formats.image import decode_image, decode_into, decode_original, encode_jpeg, is_packable
from .formats.verification_bin import write_verification_bin
from .ijb import IJBData, TemplateSubjects, is_ijb, read_ijb
from .loader import EpochSampler, FaceLoader, GroupSampler, epoch_order
from .pairs import (
    VerificationPairs,
    held_out_pairs,
    interleaved,
    pair_files,
    read_pairs,
    read_verification,
    read_verification_bin,
)

__all__ = [
    "ARCFACE_POINTS",
    "Augment",
    "EpochSampler",
    "FaceData",
    "FaceDataModule",
    "FaceDataset",
    "FaceList",
    "FaceLoader",
    "GroupSampler",
    "IJBData",
    "IdentityFolder",
    "ImageFiles",
    "LFWData",
    "RecordDataset",
    "ShardDataset",
    "SyntheticData",
    "SyntheticFaces",
    "TemplateSubjects",
    "VerificationPairs",
    "align_face",
    "decode_image",
    "decode_into",
    "decode_original",
    "encode_jpeg",
    "epoch_order",
    "find_images",
    "held_out_pairs",
    "identity_names",
    "interleaved",
    "is_ijb",
    "is_packable",
    "open_faces",
    "pair_files",
    "read_ijb",
    "read_landmarks",
    "read_pairs",
    "read_verification",
    "read_verification_bin",
    "similarity_transform",
    "split_identities",
    "synthetic_pairs",
    "write_verification_bin",
]
