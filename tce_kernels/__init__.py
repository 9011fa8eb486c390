"""Truncated, focal and plain cross-entropy for large vocabularies."""

from . import distributed, reference
from .functional import (
    focal_cross_entropy,
    linear_focal_cross_entropy,
    linear_truncated_cross_entropy,
    truncated_cross_entropy,
)
from .modules import (
    FocalCrossEntropyLoss,
    LinearTruncatedCrossEntropyLoss,
    TruncatedCrossEntropyHead,
    TruncatedCrossEntropyLoss,
)
from .stats import LossStats

__version__ = "0.1.0"

__all__ = [
    "FocalCrossEntropyLoss",
    "LinearTruncatedCrossEntropyLoss",
    "LossStats",
    "TruncatedCrossEntropyHead",
    "TruncatedCrossEntropyLoss",
    "distributed",
    "focal_cross_entropy",
    "linear_focal_cross_entropy",
    "linear_truncated_cross_entropy",
    "reference",
    "truncated_cross_entropy",
]
