"""Tensors that lie in memory in every way that PyTorch has, with memory around them that nobody may read."""

import math
from dataclasses import dataclass

import numpy as np
import torch

POISON = -7777  # of integer memory that is not part of a tensor; floating-point memory holds NaN there


@dataclass
class Laid:
    """A tensor and the memory around it."""

    memory: torch.Tensor
    size: tuple
    stride: tuple
    offset: int
    kind: str

    @property
    def tensor(self):
        return self.memory.as_strided(self.size, self.stride, self.offset)


LAYOUTS = {
    "contiguous": 8, "unaligned": 3, "padded": 3, "sliced": 3, "transposed": 2, "expanded": 1, "odd size 1": 1,
    "overlapping": 0.7, "three strides": 0.5, "classes apart": 0.3,
}  # fmt: skip


def lay(values, draw, kind, zeros=False):
    """Put a contiguous tensor into memory of its own as `kind` says, as far as its shape allows.

    What is around it is poison, or zeros.
    """
    shape = list(values.shape)
    n = len(shape)
    order, pads, step, offset = list(range(n)), [0] * n, 1, 0
    expanded = None
    if kind == "unaligned":
        offset = draw.randint(1, 7)
    elif kind == "padded" and n > 1:
        pads[-1] = draw.choice([1, 3, 8, 16])
    elif kind == "sliced" and n > 1:
        pads[-2] = draw.randint(1, 2)
    elif kind == "transposed" and n > 2:
        order[0], order[1] = 1, 0
        pads[0] = draw.choice([0, 1])
    elif kind == "features apart" and n > 1:
        draw.shuffle(order)
    elif kind == "three strides":
        pads = [draw.randint(0, 2) for _ in shape]
    elif kind == "classes apart" and n:
        step = 2
    elif kind == "expanded" and n > 1:
        expanded = draw.randrange(n - 1)
        if shape[expanded]:
            values = values.narrow(expanded, 0, 1)
    elif kind == "every second" and n:
        step = 2
    stride, running = [0] * n, step
    for dim in reversed(order):
        stride[dim] = running if dim != expanded else 0
        if dim != expanded:
            running *= max(shape[dim] + pads[dim], 1)
    if kind == "overlapping" and n > 1 and shape[0] > 1:
        stride[0] = max(stride[0] - draw.randint(1, max(stride[0] // 2, 1)), 0)  # as in windows of a sequence
    if kind == "odd size 1":
        stride = [draw.choice([1, 7, 10**6]) if size == 1 else by for size, by in zip(shape, stride, strict=True)]
    if kind == "expanded" and 0 in shape and draw.chance(0.5):
        stride = [0] * n  # as numpy leaves them where there is nothing to step over
    extent = offset + sum((size - 1) * by for size, by in zip(shape, stride, strict=True) if size > 1) + 1
    extent += draw.randint(0, 5)
    poison = 0 if zeros else math.nan if values.is_floating_point() else POISON
    memory = torch.full((extent if 0 not in shape else offset + 1,), poison, dtype=values.dtype)
    if values.numel():
        places = torch.arange(len(memory)).as_strided(values.shape, stride, offset)
        memory[places.reshape(-1)] = values.reshape(-1)
    return Laid(memory, tuple(shape), tuple(stride), offset, kind)


def two_strides_describe(laid):
    """Whether the rows of logits (..., V) are [outer, inner] with one stride each, and their classes adjacent."""
    *shape, V = laid.size
    if 0 in shape:
        return True
    if V > 1 and laid.stride[-1] != 1:
        return False
    at = sum((np.indices(shape)[i] * by for i, by in enumerate(laid.stride[:-1])), np.zeros(shape, int)).reshape(-1)
    n, index = len(at), np.arange(len(at))
    for inner in (size for size in range(1, n + 1) if n % size == 0):
        by_inner = at[1] - at[0] if inner > 1 else 0
        by_outer = at[inner] - at[0] if inner < n else 0
        if (at - at[0] == index // inner * by_outer + index % inner * by_inner).all():
            return True
    return False


def rows_overlap(laid):
    at = torch.arange(len(laid.memory)).as_strided(laid.size, laid.stride, laid.offset)
    return at.unique().numel() < at.numel()
