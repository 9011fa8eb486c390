"""The specification: what each loss means, in plain PyTorch.

Nothing here is shared with the fast backends. Gradients come from autograd, to any order and in the dtype of the
logits, float64 included. The softmax of all rows is in memory at once: this is for reading and for checking.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .stats import LossStats


def truncated_cross_entropy(logits: Tensor, target: Tensor, threshold: float | Tensor = 0.9, **options):
    """phi(s) = -s where s = log p_t <= log(threshold), otherwise the row is dropped. Options of the public function."""
    log_threshold = torch.as_tensor(threshold, dtype=torch.float64, device=logits.device).log()
    return _loss(logits, target, lambda s: -s, lambda s: ~(s > log_threshold.to(s.dtype)), **options)


def focal_cross_entropy(logits: Tensor, target: Tensor, gamma: float = 2.0, *, alpha: float = 1.0, **options):
    """phi(s) = -alpha (1 - p)^gamma s, differentiated through the factor. Options of the public function."""

    def phi(s):
        if gamma == 0:
            return -alpha * s
        # Below s = -100 the factor is 1 in any dtype; at q = 0 loss and derivative are 0. Both keep autograd finite.
        q = -torch.expm1(s.clamp(min=-100))
        return torch.where(q == 0, 0 * s, -alpha * torch.where(q == 0, 1, q) ** gamma * s)

    return _loss(logits, target, phi, lambda s: torch.full_like(s, alpha != 0, dtype=torch.bool), **options)


def linear_truncated_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, threshold: float | Tensor = 0.9, *,
    linear_bias: Tensor | None = None, **options,
):  # fmt: skip
    """`truncated_cross_entropy` of the logits input linear_weight^T + linear_bias."""
    return truncated_cross_entropy(F.linear(input, linear_weight, linear_bias), target, threshold, **options)


def linear_focal_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, gamma: float = 2.0, *,
    linear_bias: Tensor | None = None, **options,
):  # fmt: skip
    """`focal_cross_entropy` of the logits input linear_weight^T + linear_bias."""
    return focal_cross_entropy(F.linear(input, linear_weight, linear_bias), target, gamma, **options)


def _loss(
    logits: Tensor,
    target: Tensor,
    phi,
    keep,
    *,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
):
    valid = target != ignore_index
    target, bad = _checked(target, valid, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    row_weight = valid.to(dtype)
    if weight is not None:
        row_weight = row_weight * weight[target].to(dtype)
    if token_weight is not None:
        row_weight = torch.where(valid, row_weight * token_weight.to(dtype), 0)

    def transformed(logits):
        z = logits.to(dtype) * logit_scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    # A row without weight may hold NaN, which 0 * NaN would carry into its gradient.
    z = transformed(logits.masked_fill((row_weight == 0)[..., None], 0))
    log_probs = F.log_softmax(z, dim=-1)
    s = log_probs.gather(-1, target[..., None]).squeeze(-1).masked_fill(bad, math.nan)
    kept = keep(s) & (row_weight != 0)
    loss = (1 - label_smoothing) * phi(s)
    if label_smoothing:
        loss = loss - label_smoothing * log_probs.mean(-1)
    if z_loss:
        loss = loss + z_loss * z.logsumexp(-1) ** 2
    loss = torch.where(kept, row_weight * loss, 0)

    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        if isinstance(denominator, str):
            counted = kept if denominator == "kept" else valid
            denominator = torch.where(counted, row_weight, 0).sum()
        denominator = torch.as_tensor(denominator, dtype=loss.dtype, device=loss.device)
        empty = denominator == 0
        loss = torch.where(empty, 0, loss / denominator.masked_fill(empty, 1))
    return (loss, _stats(transformed(logits.detach()), target, bad, valid, kept)) if return_stats else loss


def _checked(target: Tensor, valid: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Targets that can be indexed with, and which of them stand for one that is out of range."""
    bad = valid & ((target < 0) | (target >= V))
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target must be in [0, {V}) or ignore_index, got {target[bad][0].item()} at position {position}"
        )
    return target.long().masked_fill(bad | ~valid, 0), bad


def _stats(z: Tensor, target: Tensor, bad: Tensor, valid: Tensor, kept: Tensor) -> LossStats:
    log_prob = F.log_softmax(z, dim=-1).gather(-1, target[..., None]).squeeze(-1).masked_fill(bad, math.nan)
    correct = z.gather(-1, target[..., None]).squeeze(-1) == z.amax(-1)
    return LossStats(
        log_prob=log_prob.masked_fill(~valid, 0),
        lse=z.logsumexp(-1).masked_fill(~valid, 0),
        kept=kept,
        correct=correct & valid & ~log_prob.isnan(),
        valid=valid,
        n_valid=valid.sum(),
        n_kept=kept.sum(),
    )
