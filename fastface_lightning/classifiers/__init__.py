"""Classifiers: embeddings and identities in, the loss a face recogniser trains on out."""

from fastface_lightning.classifiers.full import FullClassifier

__all__ = ["FullClassifier"]
