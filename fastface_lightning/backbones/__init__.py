"""Images to embeddings by any timm model; importing registers IResNet and MobileFaceNet there."""

from .embedder import build_backbone
from .iresnet import IResNet
from .mobilefacenet import MobileFaceNet
from .weights import load_weights

__all__ = ["IResNet", "MobileFaceNet", "build_backbone", "load_weights"]
