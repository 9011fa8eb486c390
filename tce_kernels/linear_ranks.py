"""The linear path where each rank of a group has some of the classes, and all rows or rows of its own.

What the ranks found about the rows of a chunk is gathered while the next chunk is multiplied, and how many rows are
kept gets to the host while the one after it is. All ranks keep the same rows, whose parts of the input's gradient are
summed up, packed, while the next rows are worked on. Where rows are spread over the ranks, those that are not ignored
are gathered first, and the gradients of the kept ones go back last.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .autograd import check_target
from .chunks import NumberOnItsWay, through_chunks
from .gradients import Gradients, gradients_for
from .head import Head, auto_chunk_size
from .options import Chunks, Form
from .shards import Shards, SpreadRows
from .stats import COEF, n_fields


def _chunk_size(chunks: Chunks, n_rows: int, head: Head, shards: Shards) -> int:
    """The same on all ranks."""
    on_cpu, itemsize = head.input.device.type == "cpu", head.dtype.itemsize
    return chunks.chunk_size or auto_chunk_size(n_rows, shards.most_classes, itemsize, on_cpu, over_ranks=True)


def _class_fraction(gradients: Gradients, shards: Shards, chunks: Chunks) -> float:
    """Of all ranks' classes."""
    if float(chunks.gradient_tolerance) == 0 or gradients.n_rows == 0:
        return 1.0
    n_products = shards.gather(torch.tensor(gradients.n_products, device=gradients.head.input.device))
    return int(n_products.sum()) / (gradients.n_rows * shards.n_classes)


def linear_loss(
    head: Head, target: Tensor, row_scale: Tensor, param: Tensor | None, form: Form, chunks: Chunks, backend: str,
    row_operations: ModuleType, needs: Sequence[bool], shards: Shards, rows_spread: bool,
) -> tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [n], rows [F, n], class_fraction and gradients of this rank's rows [n] and classes."""
    live = target != form.ignore_index
    if rows_spread:
        spread = SpreadRows(shards, live)
        target, row_scale = spread.gather(target), spread.gather(row_scale)
        head.input = spread.gather(head.input, head.dtype)
        chosen = torch.arange(len(target), device=target.device)
    else:
        chosen = live.nonzero().squeeze(1)
    if backend == "torch":
        counts = spread.counts if rows_spread else [len(target)]
        for rank, part in enumerate(target.split(counts)):
            of_rank = f" of the rows of rank {rank} that are not ignored" if rows_spread else ""
            check_target(part, shards.n_classes, form.ignore_index, of_rank)
    target, form = shards.local(target, form.ignore_index), form.local()
    loss = row_scale.new_zeros(len(target))
    rows = row_scale.new_zeros(n_fields(form.entropy), len(target))
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_scale, rows, shards, rows_spread)

    write_dlogits = _dlogits_writer(row_operations, target, row_scale, rows, form, shards, gradients)

    def step(logits, chunk):
        gathered = shards.gather_later(row_operations.shard_sums(logits, target[chunk], form))
        yield None  # they travel
        loss[chunk], chunk_rows = row_operations.row_loss_of_sums(
            gathered(), target[chunk], row_scale[chunk], param, form, shards.n_classes
        )
        rows[:, chunk] = chunk_rows
        if not any(needs):
            yield chunk[:0]
            return
        is_kept = chunk_rows[COEF] != 0
        K = NumberOnItsWay(is_kept.sum())
        yield None
        kept = chunk[row_operations.pack(logits[0], is_kept, int(K))]
        write_dlogits(logits[:, : len(kept)], kept)
        yield kept

    chunk_size = _chunk_size(chunks, len(chosen), head, shards)
    if any(needs):
        through_chunks(head, chosen, chunk_size, backend, step, gradients, n_stages=3)
    else:
        through_chunks(head, chosen, chunk_size, backend, step, None, n_stages=2)
    class_fraction = _class_fraction(gradients, shards, chunks)
    dinput, dweight, dbias = gradients.finished()
    if rows_spread:
        if gradients.needs_input:
            dinput = spread.own_sums(dinput, rows[COEF] != 0).to(head.dtype)
        loss, rows = spread.own_rows(loss), spread.own_rows(rows)
    return loss, rows, class_fraction, dinput, dweight, dbias


def _dlogits_writer(row_operations, target, row_grad, rows, form, shards, gradients) -> Callable:
    """A function that writes the gradients [1, K, V] of some rows [K] over their logits."""

    def write_dlogits(logits, kept):
        of_kept = target[kept], row_grad[kept], rows[:, kept]
        row_operations.dlogits(logits, *of_kept, form, logits, shards.n_classes)
        if gradients.count and len(kept):
            gradients.learn(*gradients.count(logits[0], *of_kept).tolist())

    return write_dlogits


def linear_gradients(
    head: Head, target: Tensor, row_grad: Tensor, rows: Tensor, form: Form, chunks: Chunks, backend: str,
    row_operations: ModuleType, needs: Sequence[bool], shards: Shards, rows_spread: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients, from logits made again. Which rows take part is the same on all ranks, whatever the upstream
    gradient of one is."""
    chosen = rows[COEF] != 0
    if rows_spread:
        spread = SpreadRows(shards, chosen & (row_grad != 0))
        target, row_grad = spread.gather(target), spread.gather(row_grad)
        rows = spread.gather(rows.t()).t().contiguous()
        head.input = spread.gather(head.input, head.dtype)
        chosen = torch.ones_like(target, dtype=torch.bool)
    target, form = shards.local(target, form.ignore_index), form.local()
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_grad, rows, shards, rows_spread)
    write_dlogits = _dlogits_writer(row_operations, target, row_grad, rows, form, shards, gradients)

    def step(logits, chunk):
        write_dlogits(logits, chunk)
        yield chunk

    indices = chosen.nonzero().squeeze(1)
    through_chunks(head, indices, _chunk_size(chunks, len(indices), head, shards), backend, step, gradients)
    dinput, dweight, dbias = gradients.finished()
    if rows_spread and gradients.needs_input:
        dinput = spread.own_sums(dinput, chosen).to(head.dtype)
    return dinput, dweight, dbias
