"""Margins: from the cosine between an embedding and its class centre to the target logit."""

from .adaface import AdaFace
from .arcface import ArcFace
from .base import Margin
from .combined import Combined
from .cosface import CosFace
from .curricularface import CurricularFace
from .elasticface import ElasticFace
from .magface import MagFace
from .softmax import Softmax

__all__ = [
    "AdaFace",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "MagFace",
    "Margin",
    "Softmax",
]
