"""The specification: what each loss means, in plain PyTorch.

Nothing here is shared with the fast backends. Gradients come from autograd, to any order and in the dtype of the
logits, float64 included. The softmax of all rows is in memory at once: this is for reading and for checking.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import has_data, holds
from .stats import LossStats


def truncated_cross_entropy(logits: Tensor, target: Tensor, threshold: float | Tensor = 0.9, **options):
    """phi(s) = -s where s = log p_t <= log(threshold), otherwise the row is dropped. Options of the public function."""
    return _loss(_given(logits), target, *_truncated(threshold), **options)


def focal_cross_entropy(logits: Tensor, target: Tensor, gamma: float = 2.0, *, alpha: float = 1.0, **options):
    """phi(s) = -alpha (1 - p)^gamma s, differentiated through the factor. Options of the public function."""
    return _loss(_given(logits), target, *_focal(gamma, alpha), **options)


def linear_truncated_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, threshold: float | Tensor = 0.9, *,
    linear_bias: Tensor | None = None, **options,
):  # fmt: skip
    """`truncated_cross_entropy` of the logits input linear_weight^T + linear_bias."""
    return _loss(_made(input, linear_weight, linear_bias), target, *_truncated(threshold), **options)


def linear_focal_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, gamma: float = 2.0, *, alpha: float = 1.0,
    linear_bias: Tensor | None = None, **options,
):  # fmt: skip
    """`focal_cross_entropy` of the logits input linear_weight^T + linear_bias."""
    return _loss(_made(input, linear_weight, linear_bias), target, *_focal(gamma, alpha), **options)


def _truncated(threshold):
    if not isinstance(threshold, Tensor):
        return (lambda s: -s), (lambda s: ~(s > s.new_full((), threshold, dtype=torch.float64).log().to(s.dtype)))
    return (lambda s: -s), (lambda s: ~(s > threshold.double().log().to(s.dtype)))


def _focal(gamma, alpha):
    def phi(s):
        if holds(gamma == 0):
            return -alpha * s
        # Below s = -100 the factor is 1 in any dtype; at q = 0 loss and derivative are 0. Both keep autograd finite.
        q = -torch.expm1(s.clamp(min=-100))
        return torch.where(q == 0, 0 * s, -alpha * torch.where(q == 0, 1, q) ** s.new_full((), gamma) * s)

    return phi, lambda s: (torch.full_like(s, alpha) != 0) | s.isnan()


# Where logits come from: functions of the rows that are dead, whose NaN must not reach a gradient as 0 * NaN.


def _given(logits):
    return lambda dead: logits if dead is None else logits.masked_fill(dead[..., None], 0)


def _made(input, weight, bias):
    def logits_of(dead):
        if dead is None:
            return F.linear(input, weight, bias)
        dead = dead[..., None]
        return F.linear(input.masked_fill(dead, 0), weight, bias).masked_fill(dead, 0)

    return logits_of


def _loss(
    logits_of,
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
    return_stats: bool | str = False,
):
    with torch.no_grad():
        logits = logits_of(None)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    target = target.long()  # int32 would take an ignore_index beyond its range for another number
    valid = target != ignore_index
    target, bad = _checked(target, valid, logits.shape[-1])
    row_weight = valid.to(dtype)
    if weight is not None:
        row_weight = row_weight * weight[target].to(dtype)
    if token_weight is not None:
        row_weight = torch.where(valid, row_weight * token_weight.to(dtype), 0)

    def transformed(logits):
        z = logits.to(dtype) * logit_scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def log_prob(log_probs):
        return log_probs.gather(-1, target[..., None]).squeeze(-1).masked_fill(bad, math.nan)

    whole = transformed(logits.detach())
    kept = keep(log_prob(F.log_softmax(whole, dim=-1))) & (row_weight != 0)
    divisor, dead = row_weight.new_ones(()), row_weight == 0
    if reduction == "mean":
        by_kept = isinstance(denominator, str) and denominator == "kept"
        if isinstance(denominator, str):
            divisor = torch.where(kept if by_kept else valid, row_weight, 0).sum()
        else:
            is_tensor = isinstance(denominator, Tensor)
            divisor = denominator.to(dtype) if is_tensor else row_weight.new_full((), denominator)
        dead = dead | (divisor == 0)
        kept = kept if by_kept else kept & ~dead

    z = transformed(logits_of(dead))
    log_probs = F.log_softmax(z, dim=-1)
    loss = (1 - label_smoothing) * phi(log_prob(log_probs))
    if not holds(label_smoothing == 0):
        loss = loss - label_smoothing * log_probs.mean(-1)
    if not holds(z_loss == 0):
        loss = loss + z_loss * z.logsumexp(-1) ** 2
    loss = torch.where(kept & ~dead, row_weight * loss, 0)
    if reduction != "none":
        loss = loss.sum() / divisor.masked_fill(divisor == 0, 1)
    if not return_stats:
        return loss
    entropy = _entropy(whole).masked_fill(~valid, 0) if return_stats == "entropy" else None
    return loss, _stats(whole, target, bad, valid, kept, entropy)


def _checked(target: Tensor, valid: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Targets that can be indexed with, and which of them stand for one that is out of range."""
    bad = valid & ((target < 0) | (target >= V))
    if target.device.type == "cpu" and has_data(target) and bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target must be in [0, {V}) or ignore_index, got {target[bad][0].item()} at position {position}"
        )
    return target.masked_fill(bad | ~valid, 0), bad


def _stats(z: Tensor, target: Tensor, bad: Tensor, valid: Tensor, kept: Tensor, entropy: Tensor | None) -> LossStats:
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
        class_fraction=torch.ones((), dtype=torch.float32, device=z.device),
        entropy=entropy,
    )


def _entropy(z: Tensor) -> Tensor:
    """-sum p log p, in which a class without probability counts 0."""
    log_probs = F.log_softmax(z, dim=-1)
    p = log_probs.exp()
    return -torch.where(p == 0, 0, p * log_probs).sum(-1)
