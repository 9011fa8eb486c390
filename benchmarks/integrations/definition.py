"""Truncated cross-entropy of logits by its definition, called as a loss of transformers is."""

import math

import torch.nn.functional as F
from torch import Tensor


class Definition:
    """In float64.

    Attributes:
        threshold: tokens of a larger probability have no loss.
        confidence: (n,) of the tokens of the last call, those that are ignored left out.
    """

    def __init__(self, is_shifted: bool, threshold: float = 1.0):
        self.is_shifted, self.threshold = is_shifted, threshold
        self.confidence: Tensor | None = None

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size=None, num_items_in_batch=None, ignore_index: int = -100,
        shift_labels: Tensor | None = None, **kwargs,
    ) -> Tensor:  # fmt: skip
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if self.is_shifted else labels
        valid = shift_labels != ignore_index
        log_prob = logits.double().log_softmax(-1).gather(-1, shift_labels.where(valid, 0)[..., None])[..., 0]
        self.confidence = log_prob[valid].detach().exp()
        kept = valid & (log_prob.exp() <= self.threshold)
        number = valid.sum() if num_items_in_batch is None else num_items_in_batch
        return (-log_prob.where(kept, 0.0).sum() / number).float()

    def between(self, low: float, high: float) -> float:
        """A threshold that a share of the tokens from `low` to `high` does not exceed, in the widest gap there is."""
        p = self.confidence.sort().values
        p = p[int(low * len(p)) : math.ceil(high * len(p))]
        i = p.diff().argmax()
        return ((p[i] + p[i + 1]) / 2).item()
