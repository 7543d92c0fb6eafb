"""Evaluation: how well embeddings tell people apart, by the field's own protocols."""

from .verification import (
    VerificationAccuracy,
    VerificationResult,
    verification_accuracy,
)

__all__ = ["VerificationAccuracy", "VerificationResult", "verification_accuracy"]
