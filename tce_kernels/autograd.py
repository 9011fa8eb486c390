"""Registered operators over the two fast backends, and the autograd functions over the operators.

The operators take logits (..., V) as the user passed them and hold everything per row in the shape of the target (...).
`rows` (6, ...) keeps the numbers per row that backward and the statistics need; `stats` names its fields.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from . import torch_ops
from .stats import N_FIELDS
from .torch_ops import compute_dtype

SECOND_BACKWARD = (
    "the gradient of this loss was made in place and has been handed out, or the logits were modified since: "
    "it can be differentiated only once. Pass allow_retain_graph=True to recompute the gradient each time."
)
DOUBLE_BACKWARD = (
    "double backward is not supported by backend={!r}: its gradient is not differentiable. "
    "Pass backend='reference' for second derivatives."
)


def backend_of(name: str, logits: Tensor):
    if name == "torch":
        return torch_ops
    try:
        from . import triton_ops  # imported late: the package works where triton is not installed
    except ImportError as error:
        raise ImportError(f"backend='triton' needs the package triton ({error}); pass backend='torch'") from error
    if not triton_ops.serves(logits.device):
        raise RuntimeError(
            f"backend='triton' needs logits on a GPU, got {logits.device}: move them there, pass backend='torch', or "
            "set TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return triton_ops


def as_rows(logits: Tensor) -> Tensor | None:
    """View logits (..., V) as [outer, inner, V]; None if two strides cannot describe its rows.

    Two, because logits[:, :-1] of a (B, T, V) tensor must not be copied.
    """
    *leading, V = logits.shape
    merged = []  # (size, stride), outermost first; neighbours that one stride describes become one
    for size, stride in zip(leading, logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    if 0 in leading:
        merged = [(0, 0)]
    if len(merged) > 2 or (V > 1 and logits.stride(-1) != 1):
        return None
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(merged)) + merged
    return logits.as_strided((outer, inner, V), (stride_outer, stride_inner, 1))


def _as_rows_of(logits: Tensor, out: Tensor) -> Tensor:
    """View a gradient as `as_rows` views its logits: it is contiguous, or it is the logits."""
    return out.view(as_rows(logits).shape) if out.is_contiguous() else as_rows(out)


def flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1)


def check_target(target: Tensor, V: int, ignore_index: int) -> None:
    """On a CPU, where looking is free, a bad target is an error; elsewhere its row becomes NaN."""
    if target.device.type != "cpu":
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= V))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"target must be in [0, {V}) or ignore_index ({ignore_index}), "
            f"got {target[position].item()} at position {list(position)}"
        )


@custom_op("tce_kernels::row_loss", mutates_args=())
def row_loss(
    logits: Tensor, target: Tensor, row_scale: Tensor, param: Tensor, rule: str, alpha: float, ignore_index: int,
    z_loss: float, label_smoothing: float, softcap: float | None, logit_scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (...) and rows (6, ...), from one read of the logits."""
    if backend == "torch":
        check_target(target, logits.shape[-1], ignore_index)
    loss, rows = backend_of(backend, logits).row_loss(
        as_rows(logits), flat(target), flat(row_scale), param, rule=rule, alpha=alpha, ignore_index=ignore_index,
        z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    return loss.view(target.shape), rows.view(N_FIELDS, *target.shape)


@row_loss.register_fake
def _(logits, target, *_):
    dtype = compute_dtype(logits.dtype)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((N_FIELDS, *target.shape), dtype=dtype)


@custom_op("tce_kernels::dlogits", mutates_args={"out"})
def dlogits(
    logits: Tensor, target: Tensor, row_grad: Tensor, rows: Tensor, out: Tensor,
    z_loss: float, label_smoothing: float, softcap: float | None, logit_scale: float, backend: str,
) -> None:  # fmt: skip
    """Gradient (..., V) for row_grad (...) = upstream gradient * row_scale, to out, which may be the logits."""
    backend_of(backend, logits).dlogits(
        as_rows(logits), flat(target), flat(row_grad), rows.reshape(N_FIELDS, -1), _as_rows_of(logits, out),
        z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip


@custom_op("tce_kernels::loss_and_dlogits", mutates_args={"out"})
def loss_and_dlogits(
    logits: Tensor, target: Tensor, row_scale: Tensor, param: Tensor, out: Tensor, rule: str, alpha: float,
    ignore_index: int, z_loss: float, label_smoothing: float, softcap: float | None, logit_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum of the losses [] and rows (6, ...), and the gradient to out for an upstream gradient of 1, in one pass."""
    if backend == "torch":
        check_target(target, logits.shape[-1], ignore_index)
    loss, rows = backend_of(backend, logits).loss_and_dlogits(
        as_rows(logits), flat(target), flat(row_scale), param, _as_rows_of(logits, out), rule=rule, alpha=alpha,
        ignore_index=ignore_index, z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap,
        logit_scale=logit_scale,
    )  # fmt: skip
    return loss.sum(), rows.view(N_FIELDS, *target.shape)


@loss_and_dlogits.register_fake
def _(logits, target, *_):
    dtype = compute_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((N_FIELDS, *target.shape), dtype=dtype)


@custom_op("tce_kernels::scale_", mutates_args={"dlogits"})
def scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """dlogits (..., V) *= factor []; memory is not touched if the factor is 1."""
    backend_of(backend, dlogits).scale_(as_rows(dlogits), factor)


class _Anchor(torch.autograd.Function):
    """Tensors -> a tensor without elements that is connected to them, yet does not keep their memory."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.n_tensors = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.n_tensors


class _RefuseDoubleBackward(torch.autograd.Function):
    """Identity on a gradient; the anchor leads whoever differentiates the gradient here."""

    @staticmethod
    def forward(ctx, gradient, anchor, backend):
        ctx.backend = backend
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(DOUBLE_BACKWARD.format(ctx.backend))


def hand_out(gradient: Tensor, anchor: Tensor | None, backend: str) -> Tensor:
    """A gradient that says so if somebody differentiates it; a compiled graph refuses that by itself."""
    if anchor is not None and torch.is_grad_enabled():
        return _RefuseDoubleBackward.apply(gradient, anchor, backend)
    return gradient


def _empty_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def differentiable(function, tensors: tuple[Tensor | None, ...], *arguments):
    """function.apply(*tensors, anchor, *arguments): the tensors are what it may have to differentiate."""
    present = [tensor for tensor in tensors if tensor is not None]
    anchor = None if torch.compiler.is_compiling() else _Anchor.apply(*present)
    return function.apply(*tensors, anchor, *arguments)


class LossAndGradient(torch.autograd.Function):
    """Sum of the losses [] and rows (6, ...); the gradient is made in forward."""

    @staticmethod
    def forward(
        ctx, logits, anchor, target, row_scale, param, rule, alpha, ignore_index, z_loss, label_smoothing, softcap,
        logit_scale, backend, inplace,
    ):  # fmt: skip
        out = logits.detach() if inplace else _empty_like(logits)
        loss, rows = loss_and_dlogits(
            logits.detach(), target, row_scale, param, out, rule, alpha, ignore_index, z_loss, label_smoothing,
            softcap, logit_scale, backend,
        )  # fmt: skip
        ctx.save_for_backward(out, anchor)
        ctx.backend = backend
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        try:
            out, anchor = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(SECOND_BACKWARD) from error
        with torch.no_grad():
            scale_(out, grad_loss, ctx.backend)
        return hand_out(out, anchor, ctx.backend), *[None] * 13


class RowLoss(torch.autograd.Function):
    """Losses (...) and rows (6, ...); the gradient is made in backward from the logits."""

    @staticmethod
    def forward(
        ctx, logits, anchor, target, row_scale, param, rule, alpha, ignore_index, z_loss, label_smoothing, softcap,
        logit_scale, backend, inplace,
    ):  # fmt: skip
        loss, rows = row_loss(
            logits, target, row_scale, param, rule, alpha, ignore_index, z_loss, label_smoothing, softcap,
            logit_scale, backend,
        )  # fmt: skip
        ctx.save_for_backward(logits, target, row_scale, rows, anchor)
        ctx.options = z_loss, label_smoothing, softcap, logit_scale, backend
        ctx.inplace = inplace
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        try:
            logits, target, row_scale, rows, anchor = ctx.saved_tensors
        except RuntimeError as error:
            if ctx.inplace:
                raise RuntimeError(SECOND_BACKWARD) from error
            raise
        with torch.no_grad():
            logits = logits.detach()
            out = logits if ctx.inplace else _empty_like(logits)
            dlogits(logits, target, grad_loss * row_scale, rows, out, *ctx.options)
        return hand_out(out, anchor, ctx.options[-1]), *[None] * 13


def loss_and_rows(logits: Tensor, *arguments, in_forward: bool, inplace: bool):
    """Loss and rows: per row (...), or their sum [] where the gradient is made in forward."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return row_loss(logits, *arguments)
    return differentiable(LossAndGradient if in_forward else RowLoss, (logits,), *arguments, inplace)
