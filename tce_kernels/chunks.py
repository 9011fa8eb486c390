"""The loop of the linear path: chunks of rows, whose logits are in memory only while their gradients are made.

Each chunk goes through one matmul and the loss, which leaves the gradients of its kept rows, and only those, packed at
the front. They wait there until a part of a chunk has come together, then take part in the two backward matmuls.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .gradients import Gradients
from .head import Head


class NumberOnItsWay:
    """A number [] that the host will need: it waits for that alone, not for what the device is asked to do after it."""

    def __init__(self, number: Tensor):
        self.number, self.event = number, None
        if number.is_cuda:
            self.number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
            self.event = torch.cuda.current_stream(number.device).record_event()

    def __int__(self) -> int:
        if self.event is not None:
            self.event.synchronize()
        return int(self.number)


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


Step = Callable[[Tensor, Tensor], Iterator[Tensor | None]]


def through_chunks(
    head: Head, rows: Tensor, chunk_size: int, backend: str, step: Step, gradients: Gradients | None, n_stages: int = 1,
) -> None:  # fmt: skip
    """step(logits [1, n, V], chunk [n]) is the work on a chunk, in stages: None comes at the end of each but the last,
    which gives the rows [K] whose gradients it left in the first K rows.

    Between two stages of one chunk come those of others, and the logits of one more.
    """
    V = len(head.weight)
    # Fast matmuls need rows that start at multiples of 16 bytes, and Triton proves wide accesses right from strides
    # that are multiples of 16 elements. PyTorch's row operations would copy rows with gaps between them.
    stride = V if backend == "torch" else -(-V // 16) * 16
    # A CPU does small matmuls well, and takes long to map memory that nobody has written to.
    parts = 4 if head.input.device.type == "cpu" else 2
    most_waiting = (chunk_size - 1) // parts if gradients else 0
    n_rows = min(len(rows), chunk_size + most_waiting)
    buffers = [_Buffer(head, n_rows, stride, gradients, most_waiting) for _ in range(n_stages)]
    begun = deque()  # at most one chunk per stage, the oldest first

    def advance():
        for buffer, work in reversed([*begun]):
            kept = next(work)
            if kept is not None:
                begun.popleft()
                buffer.keep(kept)

    with torch.autocast(head.input.device.type, enabled=False):  # the dtypes have been chosen
        for chunk, buffer in zip(rows.split(chunk_size), itertools.cycle(buffers), strict=False):
            begun.append((buffer, step(buffer.write(chunk), chunk)))
            advance()
        while begun:
            advance()
        for buffer in buffers:
            buffer.empty()
