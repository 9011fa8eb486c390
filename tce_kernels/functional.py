"""The public losses: documentation, checks, the choice of backend and path, reduction."""

import math

import torch
from torch import Tensor

from . import autograd, checks, reference, stats
from .stats import LossStats


def truncated_cross_entropy(
    logits: Tensor,
    target: Tensor,
    threshold: float | Tensor = 0.9,
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
    inplace: bool = False,
    allow_retain_graph: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy that drops the tokens whose target the model already predicts with confidence.

        loss[n] = -log p[n]  if p[n] <= threshold  else  0,        p[n] = softmax(z[n])[target[n]]
        z = logit_scale * logits, then softcap * tanh(z / softcap) if softcap is given

    A dropped row (truncated, ignored or of zero weight) adds exactly 0 to the loss and has a gradient of exact zeros.
    The comparison is made in float32 whatever the dtype of the logits; the mask carries no gradient.

    Args:
        logits: (..., V) float16, bfloat16, float32 (or float64, not on Triton). Classes contiguous; rows may be
            strided, as logits[:, :-1] is.
        target: (...) int32 or int64, in [0, V) or `ignore_index`. A bad target is an IndexError on a CPU; on a GPU,
            where looking would synchronise, its row's loss and gradient are NaN.
        threshold: in (0, 1]; 1 is plain cross-entropy. A 0-d tensor on the device of the logits changes without a
            recompilation; its range is not checked.
        weight: (V,) one weight per class, or None for ones.
        token_weight: (...) one weight per token, or None for ones.
        ignore_index: rows with this target are left out, and not even read.
        reduction: "mean", "sum", or "none" for one loss per token.
        denominator: what "mean" divides by. "valid": the rows that are not ignored, truncated ones included, as in the
            paper; "kept": the rows that are left; with weights, the sum of the weights of those rows. Or a number or
            0-d tensor, such as the token count of an accumulated batch. A denominator of 0 gives a loss of 0.
        label_smoothing: in [0, 1], for the rows that are kept. Not together with `weight`.
        z_loss: adds z_loss * logsumexp(z)^2 to the rows that are kept.
        softcap: soft limit of the logits, or None.
        logit_scale: factor of the logits, the inverse of a temperature.
        inplace: backward's gradient takes the memory of the logits, whose values are then lost: during the forward
            call where the gradient is made there, otherwise in backward. No effect where nothing requires grad, or
            on the reference.
        allow_retain_graph: keep the logits and recompute the gradient at each backward. Without it, a second backward
            through a mean or sum raises an error.
        return_stats: also return `LossStats`, from the same pass.
        backend: "triton", "torch" or "reference", which never fall back, or "auto": triton for logits on a GPU,
            torch otherwise. Second derivatives and torch.func.grad need "reference".

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) with reduction="none"; with return_stats=True
        (loss, LossStats). The gradient has the dtype of the logits and is rounded once; for a bfloat16 mean or sum
        whose upstream gradient is not a power of 2, twice.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or does not go with
            another one. IndexError: a bad target on a CPU. RuntimeError: the backend cannot run on this device; a
            second or a double backward (raised by backward). ImportError: triton was asked for and is not installed.

    Source: the truncated cross-entropy of ForTIFAI, arXiv:2509.08972, section 2.3.
    """
    options = dict(
        weight=weight, token_weight=token_weight, ignore_index=ignore_index, reduction=reduction,
        denominator=denominator, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, return_stats=return_stats,
    )  # fmt: skip
    placing = dict(inplace=inplace, allow_retain_graph=allow_retain_graph)
    checks.check_threshold(threshold)
    backend = _checked_backend(logits, target, threshold, backend, **options, **placing)
    if backend == "reference":
        return reference.truncated_cross_entropy(logits, target, threshold, **options)
    param = threshold if isinstance(threshold, Tensor) else float(threshold)
    return _loss(logits, target, "truncated", param, 1.0, backend, **options, **placing)


def focal_cross_entropy(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    *,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: str | float | Tensor = "valid",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    allow_retain_graph: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]:
    """Focal loss on classes: cross-entropy weighed down where the model is confident.

        loss[n] = -alpha (1 - p[n])^gamma log p[n],        p[n] = softmax(z[n])[target[n]]

    The factor is differentiated too. Gradients are finite at p = 1 for every gamma; a row is dropped where it is 0.

    Args:
        gamma: exponent, a finite number >= 0; 0 is alpha times cross-entropy.
        alpha: factor, a finite number >= 0.
        label_smoothing: must be 0: smoothing a focal loss has no agreed meaning.
        The others, and what is returned and raised: as in `truncated_cross_entropy`.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5; as compared with in arXiv:2509.08972, appendix A.
    """
    options = dict(
        weight=weight, token_weight=token_weight, ignore_index=ignore_index, reduction=reduction,
        denominator=denominator, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        logit_scale=logit_scale, return_stats=return_stats,
    )  # fmt: skip
    placing = dict(inplace=inplace, allow_retain_graph=allow_retain_graph)
    checks.check_focal(gamma, alpha, label_smoothing)
    backend = _checked_backend(logits, target, None, backend, **options, **placing)
    if backend == "reference":
        return reference.focal_cross_entropy(logits, target, gamma, alpha=alpha, **options)
    return _loss(logits, target, "focal", float(gamma), float(alpha), backend, **options, **placing)


def _checked_backend(
    logits, target, threshold, backend, *, weight, token_weight, denominator, inplace, **options
) -> str:
    """Check everything; the backend that `backend` stands for."""
    checks.check_options(
        weight=weight, token_weight=token_weight, denominator=denominator, inplace=inplace, backend=backend, **options
    )
    if backend == "auto":
        backend = "triton" if isinstance(logits, Tensor) and logits.is_cuda else "torch"
    checks.check_tensors(
        logits, target, threshold,
        weight=weight, token_weight=token_weight, denominator=denominator, inplace=inplace, backend=backend,
    )  # fmt: skip
    return backend


def _loss(
    logits, target, rule, param, alpha, backend, *, weight, token_weight, ignore_index, reduction, denominator,
    label_smoothing, z_loss, softcap, logit_scale, return_stats, inplace, allow_retain_graph,
):  # fmt: skip
    dtype = autograd.compute_dtype(logits.dtype)
    if rule == "truncated":
        param = param.detach().double().log() if isinstance(param, Tensor) else math.log(param)
    param = param.to(dtype) if isinstance(param, Tensor) else torch.full((), param, dtype=dtype, device=logits.device)

    valid = target != ignore_index
    row_scale = _row_weight(valid, target, weight, token_weight, logits.shape[-1], dtype)
    divide_last = reduction == "mean" and isinstance(denominator, str) and denominator == "kept"
    if reduction == "mean" and not divide_last:
        total = row_scale.sum() if isinstance(denominator, str) else denominator
        row_scale = row_scale * _inverse(total, row_scale)

    arguments = (
        logits, target, row_scale, param, rule, alpha, ignore_index, float(z_loss), float(label_smoothing),
        None if softcap is None else float(softcap), float(logit_scale), backend,
    )  # fmt: skip
    # float16 gradients of a mean would underflow before a gradient scaler gets to multiply them, so their rounding
    # waits for backward and the upstream gradient.
    in_forward = reduction != "none" and not divide_last and not allow_retain_graph and logits.dtype != torch.float16
    if not (torch.is_grad_enabled() and logits.requires_grad):
        loss, rows = autograd.row_loss(*arguments)
    else:
        function = autograd.LossAndGradient if in_forward else autograd.RowLoss
        loss, rows = autograd.differentiable(function, *arguments, inplace)

    if reduction != "none":
        loss = loss.sum()
    if divide_last:
        loss = loss * _inverse((row_scale * (rows[stats.COEF] != 0)).sum(), row_scale)
    return (loss, stats.from_rows(rows, valid)) if return_stats else loss


def _row_weight(valid, target, weight, token_weight, V, dtype):
    row_weight = valid.to(dtype)
    if weight is not None:
        row_weight = row_weight * weight.to(dtype)[target.clamp(0, V - 1)]
    if token_weight is not None:
        row_weight = torch.where(valid, row_weight * token_weight.to(dtype), 0)
    return row_weight


def _inverse(total, like):
    """1 / total, a number or 0-d tensor; 0 for 0."""
    total = torch.as_tensor(total, dtype=like.dtype)
    return torch.where(total == 0, 0, 1 / total)
