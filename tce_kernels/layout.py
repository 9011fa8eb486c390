"""Rows of tensors of any shape: how memory is viewed, and whether rows share it."""

import math

import torch
from torch import Tensor


def as_rows(logits: Tensor) -> Tensor | None:
    """View logits (..., V) as [outer, inner, V]; None if two strides cannot describe its rows.

    Two, because logits[:, :-1] of a (B, T, V) tensor must not be copied.
    """
    *leading, V = logits.shape
    if logits.is_contiguous():
        return logits.view(1, math.prod(leading), V)
    merged = []  # (size, stride), outermost first; neighbours that one stride describes become one
    for size, stride in zip(leading, logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    if len(merged) > 2 or (V > 1 and logits.stride(-1) != 1):
        return None
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(merged)) + merged
    return logits.as_strided((outer, inner, V), (stride_outer, stride_inner, 1))


def rows_of(logits: Tensor) -> Tensor:
    """`as_rows`, or an error that says what to do."""
    rows = as_rows(logits)
    if rows is None:
        raise ValueError(
            "logits must have contiguous classes (stride 1) and rows that two strides describe, got shape "
            f"{list(logits.shape)} with strides {list(logits.stride())}; pass logits.contiguous(), which copies them"
        )
    return rows


def rows_like(rows: Tensor, out: Tensor) -> Tensor:
    """View a gradient as `rows` views its logits: it is contiguous, or it is the logits."""
    return out.view(rows.shape) if out.is_contiguous() else rows_of(out)


def are_disjoint(logits: Tensor) -> bool:
    """Whether no two rows overlap."""
    *shape, extent = logits.shape
    *strides, _ = logits.stride()
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride < extent:
            return False
        extent = stride * (size - 1) + extent
    return True


def flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1) if tensor.dim() != 1 else tensor.contiguous()


def shaped(tensor: Tensor, shape) -> Tensor:
    """A new tensor in another shape that takes over its memory, and no view: what leaves an operator may be changed."""
    return tensor if tensor.shape == shape else torch.ops.aten._unsafe_view(tensor, shape)
