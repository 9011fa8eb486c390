"""The linear path where each rank of a group has some of the classes, and all rows or rows of its own.

What the ranks found about the rows of a chunk is gathered while the next chunk is multiplied. All ranks keep the same
rows, whose parts of the input's gradient are summed up, packed, while the next rows are worked on. Where rows are
spread over the ranks, those that are not ignored are gathered first, and the gradients of the kept ones go back last.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .autograd import check_target
from .chunks import through_chunks
from .gradients import gradients_for
from .head import Head, auto_chunk_size
from .options import Chunks, Form
from .shards import Shards, SpreadRows
from .stats import COEF, N_FIELDS


def _chunk_size(chunks: Chunks, n_rows: int, head: Head, shards: Shards) -> int:
    """The same on all ranks."""
    on_cpu, itemsize = head.input.device.type == "cpu", head.dtype.itemsize
    return chunks.chunk_size or auto_chunk_size(n_rows, shards.most_classes, itemsize, on_cpu, over_ranks=True)


def linear_loss(
    head: Head, target: Tensor, row_scale: Tensor, param: Tensor | None, shards: Shards, form: Form, chunks: Chunks,
    backend: str, row_operations: ModuleType, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, float, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [n], rows [6, n], class_fraction and gradients of this rank's rows [n] and classes."""
    live, spread = target != form.ignore_index, None
    if chunks.rows == "sharded":
        spread = SpreadRows(shards, live)
        target, row_scale = spread.gather(target), spread.gather(row_scale)
        head.input = spread.gather(head.input, head.dtype)
        live = torch.ones_like(target, dtype=torch.bool)
    if backend == "torch":
        check_target(target, shards.n_classes, form.ignore_index)
    target, form = shards.local(target, form.ignore_index), form.local()
    loss = row_scale.new_zeros(len(target))
    rows = row_scale.new_zeros(N_FIELDS, len(target))
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_scale, rows, shards)

    def begin(logits, chunk):
        gathered = shards.gather_later(row_operations.shard_sums(logits, target[chunk], form))

        def end():
            loss[chunk], chunk_rows = row_operations.row_loss_of_sums(
                gathered(), target[chunk], row_scale[chunk], param, form, shards.n_classes
            )
            rows[:, chunk] = chunk_rows
            if not any(needs):
                return None
            is_kept = chunk_rows[COEF] != 0
            K = int(is_kept.sum())
            kept = chunk[row_operations.pack(logits[0], is_kept, K)]
            return _write_dlogits(logits[:, :K], kept)

        return end

    def _write_dlogits(logits, kept):
        of_kept = target[kept], row_scale[kept], rows[:, kept]
        row_operations.dlogits(logits, *of_kept, form, logits, shards.n_classes)
        if gradients.count and len(kept):
            gradients.learn(*gradients.count(logits[0], *of_kept).tolist())
        return kept

    wanted = live.nonzero().squeeze(1)
    chunk_size = _chunk_size(chunks, len(wanted), head, shards)
    through_chunks(head, wanted, chunk_size, backend, begin, gradients if any(needs) else None, ahead=1)
    class_fraction = gradients.class_fraction()
    dinput, dweight, dbias = gradients.finished()
    if spread is None:
        return loss, rows, class_fraction, dinput, dweight, dbias
    if gradients.needs_input:
        dinput = spread.own_sums(dinput, rows[COEF] != 0).to(head.dtype)
    return spread.own_rows(loss), spread.own_rows(rows), class_fraction, dinput, dweight, dbias


def linear_gradients(
    head: Head, target: Tensor, row_grad: Tensor, rows: Tensor, shards: Shards, form: Form, chunks: Chunks,
    backend: str, row_operations: ModuleType, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients, from logits made again. Which rows take part is the same on all ranks, whatever the upstream
    gradient of one is."""
    wanted, spread = rows[COEF] != 0, None
    if chunks.rows == "sharded":
        spread = SpreadRows(shards, wanted & (row_grad != 0))
        target, row_grad = spread.gather(target), spread.gather(row_grad)
        rows = spread.gather(rows.t()).t()
        head.input = spread.gather(head.input, head.dtype)
        wanted = torch.ones_like(target, dtype=torch.bool)
    target, form = shards.local(target, form.ignore_index), form.local()
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_grad, rows, shards)

    def begin(logits, chunk):
        def end():
            of_chunk = target[chunk], row_grad[chunk], rows[:, chunk]
            row_operations.dlogits(logits, *of_chunk, form, logits, shards.n_classes)
            if gradients.count:
                gradients.learn(*gradients.count(logits[0], *of_chunk).tolist())
            return chunk

        return end

    indices = wanted.nonzero().squeeze(1)
    through_chunks(head, indices, _chunk_size(chunks, len(indices), head, shards), backend, begin, gradients)
    dinput, dweight, dbias = gradients.finished()
    if spread is not None and gradients.needs_input:
        dinput = spread.own_sums(dinput, wanted).to(head.dtype)
    return dinput, dweight, dbias
