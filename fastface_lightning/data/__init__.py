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
from .dataset import FaceDataset
from .folder import FaceList, IdentityFolder, identity_names
from .ijb import IJBData, TemplateSubjects, is_ijb, read_ijb
from .image import decode_image, decode_into, decode_original, encode_jpeg, is_packable
from .image_files import ImageFiles, find_images
from .order import EpochSampler, FaceLoader, GroupSampler, epoch_order
from .records import RecordDataset
from .sheet import contact_sheet, pairs_sheet, pick_images, sheet_of
from .synthetic import SyntheticFaces, synthetic_pairs
from .verification import (
    VerificationPairs,
    held_out_pairs,
    interleaved,
    pair_files,
    read_pairs,
    read_verification,
    read_verification_bin,
)
from .verification_bin import write_verification_bin
from .zips import ZippedFaces

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
    "SyntheticData",
    "SyntheticFaces",
    "TemplateSubjects",
    "VerificationPairs",
    "ZippedFaces",
    "align_face",
    "contact_sheet",
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
    "pairs_sheet",
    "pick_images",
    "read_ijb",
    "read_landmarks",
    "read_pairs",
    "read_verification",
    "read_verification_bin",
    "sheet_of",
    "similarity_transform",
    "split_identities",
    "synthetic_pairs",
    "write_verification_bin",
]
