"""Evaluation: how well embeddings tell people apart, by the field's own protocols."""

from .identification import Identification, IdentificationResult, identification
from .roc import (
    ROC,
    ROCAUC,
    EqualErrorRate,
    ROCCurve,
    TARAtFAR,
    all_pairs,
    equal_error_rate,
    roc_auc,
    roc_curve,
    tar_at_far,
)
from .templates import TemplateVerification, template_embeddings, template_scores
from .verification import (
    VerificationAccuracy,
    VerificationResult,
    VerificationTAR,
    verification_accuracy,
    verification_tar,
)

__all__ = [
    "ROC",
    "ROCAUC",
    "EqualErrorRate",
    "Identification",
    "IdentificationResult",
    "ROCCurve",
    "TARAtFAR",
    "TemplateVerification",
    "VerificationAccuracy",
    "VerificationResult",
    "VerificationTAR",
    "all_pairs",
    "equal_error_rate",
    "identification",
    "roc_auc",
    "roc_curve",
    "tar_at_far",
    "template_embeddings",
    "template_scores",
    "verification_accuracy",
    "verification_tar",
]
