"""Margins: from the cosine between an embedding and its class centre to the target logit."""

from .arcface import ArcFace
from .base import Margin
from .combined import Combined
from .cosface import CosFace
from .softmax import Softmax

__all__ = ["ArcFace", "Combined", "CosFace", "Margin", "Softmax"]
