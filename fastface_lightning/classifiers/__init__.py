"""Classifiers: embeddings and identities in, the loss a face recogniser trains on out."""

from .attention import AttentionClassifier
from .base import CentreClassifier, Classifier
from .chunked import ChunkedClassifier, chunk_that_fits
from .full import FullClassifier
from .momentum import MomentumClassifier
from .partial import PartialClassifier
from .pool import DynamicClassPool

__all__ = [
    "AttentionClassifier",
    "CentreClassifier",
    "ChunkedClassifier",
    "Classifier",
    "DynamicClassPool",
    "FullClassifier",
    "MomentumClassifier",
    "PartialClassifier",
    "chunk_that_fits",
]
