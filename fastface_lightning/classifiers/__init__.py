"""Classifiers: embeddings and identities in, the loss a face recogniser trains on out."""

from .attention import AttentionClassifier
from .base import CenterClassifier, Classifier
from .chunked import ChunkedClassifier, chunk_that_fits
from .dynamic_pool import DynamicClassPool
from .full import FullClassifier
from .momentum import MomentumClassifier
from .partial import PartialClassifier

__all__ = [
    "AttentionClassifier",
    "CenterClassifier",
    "ChunkedClassifier",
    "Classifier",
    "DynamicClassPool",
    "FullClassifier",
    "MomentumClassifier",
    "PartialClassifier",
    "chunk_that_fits",
]
