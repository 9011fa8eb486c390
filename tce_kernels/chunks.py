"""The loop of the linear path: chunks of rows, whose logits are in memory only while their gradients are made.

Each chunk goes through one matmul and the loss, which leaves the gradients of its kept rows, and only those, packed at
the front. They wait there until half a chunk has come together, then take part in the two backward matmuls.
"""

import itertools
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .gradients import Gradients
from .head import Head


class _Buffer:
    """Memory of logits: in front the gradients that wait, behind them a chunk."""

    def __init__(self, head: Head, n_rows: int, stride: int, gradients: Gradients | None, most_waiting: int):
        V = len(head.weight)
        memory = head.weight.new_empty(n_rows, stride)
        self.logits, padding = memory[:, :V], memory[:, V:]
        if padding.device.type == "cpu":
            padding.zero_()  # bfloat16 matmuls of some processors read past a row, and count on finding numbers
        self.head, self.gradients, self.most_waiting = head, gradients, most_waiting
        self.n_waiting, self.waiting = 0, []

    def write(self, chunk: Tensor) -> Tensor:
        """The logits [1, n, V] of a chunk of rows [n]."""
        logits = self.logits[self.n_waiting : self.n_waiting + len(chunk)]
        self.head.write_logits(chunk, logits)
        return logits[None]

    def keep(self, kept: Tensor) -> None:
        """The rows [K] whose gradients are now the first of the chunk."""
        if self.gradients is None:
            return
        self.waiting.append(kept)
        self.n_waiting += len(kept)
        if self.n_waiting > self.most_waiting:
            self.empty()

    def empty(self) -> None:
        if self.n_waiting:
            self.gradients.add(self.logits[: self.n_waiting], torch.cat(self.waiting))
            self.n_waiting, self.waiting = 0, []


def through_chunks(
    head: Head, rows: Tensor, chunk_size: int, backend: str, begin: Callable[[Tensor, Tensor], Callable[[], Tensor]],
    gradients: Gradients | None, ahead: int = 0,
) -> None:  # fmt: skip
    """begin(logits [1, n, V], chunk [n]) returns what ends the work on that chunk, a function that returns the rows [K]
    whose gradients it left in the first K rows.

    It is called when the logits of `ahead` more chunks have been made and begun with.
    """
    V = len(head.weight)
    # Fast matmuls need rows that start at multiples of 16 bytes, and Triton proves wide accesses right from strides
    # that are multiples of 16 elements. PyTorch's row operations would copy rows with gaps between them.
    stride = V if backend == "torch" else -(-V // 16) * 16
    most_waiting = (chunk_size - 1) // 2 if gradients else 0
    n_rows = min(len(rows), chunk_size + most_waiting)
    buffers = [_Buffer(head, n_rows, stride, gradients, most_waiting) for _ in range(1 + ahead)]
    begun = deque()

    def end():
        buffer, ends = begun.popleft()
        buffer.keep(ends())

    with torch.autocast(head.input.device.type, enabled=False):  # the dtypes have been chosen
        for chunk, buffer in zip(rows.split(chunk_size), itertools.cycle(buffers), strict=False):
            begun.append((buffer, begin(buffer.write(chunk), chunk)))
            if len(begun) > ahead:
                end()
        while begun:
            end()
        for buffer in buffers:
            buffer.empty()
