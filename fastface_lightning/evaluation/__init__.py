"""Evaluation: how well embeddings tell people apart, by the field's own protocols."""

from .identification import Identification, IdentificationResult, identification
from .roc import (
    ROC,
    OperatingPoint,
    ROCCurve,
    TARAtFAR,
    equal_error_rate,
    operating_points,
    rates_at_far,
    roc_auc,
    roc_curve,
    tar_at_far,
    thresholds_of,
)
from .templates import template_embeddings, template_scores
from .verification import (
    VerificationAccuracy,
    VerificationResult,
    VerificationTAR,
    verification_accuracy,
    verification_tar,
)

__all__ = [
    "ROC",
    "Identification",
    "IdentificationResult",
    "OperatingPoint",
    "ROCCurve",
    "TARAtFAR",
    "VerificationAccuracy",
    "VerificationResult",
    "VerificationTAR",
    "equal_error_rate",
    "identification",
    "operating_points",
    "rates_at_far",
    "roc_auc",
    "roc_curve",
    "tar_at_far",
    "template_embeddings",
    "template_scores",
    "thresholds_of",
    "verification_accuracy",
    "verification_tar",
]
