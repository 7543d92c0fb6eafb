"""Margins: from the cosine between an embedding and its class centre to the target logit."""

from fastface_lightning.margins.arcface import ArcFace
from fastface_lightning.margins.base import Margin
from fastface_lightning.margins.combined import Combined
from fastface_lightning.margins.cosface import CosFace
from fastface_lightning.margins.softmax import Softmax

__all__ = ["ArcFace", "Combined", "CosFace", "Margin", "Softmax"]
