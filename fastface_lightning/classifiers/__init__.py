"""Classifiers: embeddings and identities in, the loss a face recogniser trains on out."""

from .base import Classifier
from .chunked import ChunkedClassifier, chunk_that_fits
from .full import FullClassifier
from .partial import PartialClassifier

__all__ = [
    "ChunkedClassifier",
    "Classifier",
    "FullClassifier",
    "PartialClassifier",
    "chunk_that_fits",
]
