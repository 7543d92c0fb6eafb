"""Classifiers: embeddings and identities in, the loss a face recogniser trains on out."""

from .full import FullClassifier

__all__ = ["FullClassifier"]
