"""Images to embeddings by any timm model; importing registers IResNet and MobileFaceNet there."""

from ..preprocessing import normalise
from .iresnet import IResNet
from .mobilefacenet import MobileFaceNet
from .timm_model import build_backbone
from .weights import load_weights

__all__ = ["IResNet", "MobileFaceNet", "build_backbone", "load_weights", "normalise"]
