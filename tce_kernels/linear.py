"""The linear path: lm-head and loss together, with the logits of one chunk of rows in memory at a time.

With a share `a` of the rows kept that is 2 N D V (1 + 2 a) multiplications and additions, where all rows would cost
6 N D V; ignored rows are left out of the forward matmul as well.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from . import linear_ranks
from .autograd import (
    ENTROPY,
    RANKS,
    backend_of,
    check_target,
    flat_rows,
    forward_method,
    hand_out,
    is_memory,
    memory_of,
    operator,
    product,
    refuse_tangent,
)
from .chunks import through_chunks
from .context import graph_is_kept, is_plain
from .gradients import gradients_for
from .head import Head, auto_chunk_size, supported
from .layout import flat, rows_of, shaped
from .options import CHUNKS_SCHEMA, N_PLAIN, Chunks, form_of
from .shards import Shards
from .stats import COEF, n_fields

HEAD = "Tensor input, Tensor weight, Tensor? bias, Tensor target"
PLAIN = "{form}, " + CHUNKS_SCHEMA + ", ScalarType dtype, str backend, bool[] needs, bool rows_spread=False, " + RANKS
GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias"


def _opened(plain) -> tuple:
    """What an operator was called with besides tensors: its form, chunks, dtype, backend, needs, rows_spread, sizes and
    group."""
    m = N_PLAIN + len(Chunks._fields)
    rest = plain[m + 3 :]
    *of_ranks, entropy = (*rest, *(False, None, None, False)[len(rest) :])  # PyTorch leaves out what is as by default
    return (*plain[:N_PLAIN], entropy), Chunks(*plain[N_PLAIN:m]), *plain[m : m + 3], *of_ranks


def _chunk_size(chunks: Chunks, n_rows: int, head: Head) -> int:
    on_cpu = head.input.device.type == "cpu"
    return chunks.chunk_size or auto_chunk_size(n_rows, len(head.weight), head.dtype.itemsize, on_cpu)


@operator(
    "linear_loss",
    HEAD + ", Tensor row_scale, Tensor? param, " + PLAIN + ENTROPY,
    "Tensor loss, Tensor rows, Tensor class_fraction, " + GRADIENTS,
    communicates=True,
)
def linear_loss(input, weight, bias, target, row_scale, param, *plain):
    """Loss (...), rows (F, ...), class_fraction [], and the gradients of the sum that are needed of the head's tensors.

    class_fraction: mean share of the classes that took part in the gradients' matmuls.
    """
    form, chunks, dtype, backend, needs, rows_spread, sizes, group = _opened(plain)
    form = form_of(*form)
    row_operations = backend_of(backend, input)
    head = Head(input, weight, bias, dtype)
    flat_target, flat_scale = flat(target), flat(row_scale)
    if group is not None:
        loss, rows, class_fraction, *gradients = linear_ranks.linear_loss(
            head, flat_target, flat_scale, param, form, chunks, backend, row_operations, needs,
            Shards(group, sizes), rows_spread,
        )  # fmt: skip
    else:
        if backend == "torch":
            check_target(target, len(weight), form.ignore_index)
        loss, rows, class_fraction, *gradients = _linear_loss(
            head, flat_target, flat_scale, param, form, chunks, backend, row_operations, needs
        )
    dinput, dweight, dbias = gradients
    class_fraction = torch.full((), class_fraction, dtype=torch.float32, device=loss.device)
    return (
        shaped(loss, target.shape), shaped(rows, (len(rows), *target.shape)), class_fraction,
        shaped(dinput, input.shape if needs[0] else (0,)), dweight, dbias,
    )  # fmt: skip


def _linear_loss(head, target, row_scale, param, form, chunks, backend, row_operations, needs):
    """Loss [N], rows [F, N], class_fraction, gradients, where all classes are here."""
    loss = row_scale.new_zeros(len(target))
    rows = row_scale.new_zeros(n_fields(form.entropy), len(target))
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_scale, rows)

    def row_loss(logits, chunk):
        loss[chunk], rows[:, chunk] = row_operations.row_loss(logits, target[chunk], row_scale[chunk], param, form)
        yield chunk[:0]

    def loss_and_kept_dlogits(logits, chunk):
        loss[chunk], rows[:, chunk], kept, counted = row_operations.loss_and_kept_dlogits(
            logits, target[chunk], row_scale[chunk], param, form, gradients.count
        )
        if counted:
            gradients.learn(*counted)
        yield chunk[kept]

    live = (target != form.ignore_index).nonzero().squeeze(1)
    chunk_size = _chunk_size(chunks, len(live), head)
    if any(needs):
        through_chunks(head, live, chunk_size, backend, loss_and_kept_dlogits, gradients)
    else:
        through_chunks(head, live, chunk_size, backend, row_loss, None)
    return loss, rows, gradients.class_fraction(), *gradients.finished()


@linear_loss.register_fake
def _(input, weight, bias, target, row_scale, param, *plain):
    rows = row_scale.new_empty((n_fields(_opened(plain)[0][-1]), *target.shape))
    class_fraction = row_scale.new_empty((), dtype=torch.float32)
    return row_scale.new_empty(target.shape), rows, class_fraction, *_fake_gradients(input, weight, plain)


@operator(
    "linear_gradients",
    HEAD + ", Tensor row_grad, Tensor rows, " + PLAIN,
    GRADIENTS,
    communicates=True,
)
def linear_gradients(input, weight, bias, target, row_grad, rows, *plain):
    """The gradients that are needed, from logits made again, for row_grad (...) = upstream gradient * row_scale."""
    form, chunks, dtype, backend, needs, rows_spread, sizes, group = _opened(plain)
    form = form_of(*form)
    row_operations = backend_of(backend, input)
    head = Head(input, weight, bias, dtype)
    of_rows = flat(target), flat(row_grad), flat_rows(rows)
    if group is not None:
        dinput, dweight, dbias = linear_ranks.linear_gradients(
            head, *of_rows, form, chunks, backend, row_operations, needs, Shards(group, sizes), rows_spread
        )
    else:
        dinput, dweight, dbias = _linear_gradients(head, *of_rows, form, chunks, backend, row_operations, needs)
    return shaped(dinput, input.shape if needs[0] else (0,)), dweight, dbias


def _linear_gradients(head, target, row_grad, rows, form, chunks, backend, row_operations, needs):
    """The gradients where all classes are here."""
    gradients = gradients_for(head, needs, chunks, row_operations, form, row_grad, rows)

    def dlogits(logits, chunk):
        of_chunk = target[chunk], row_grad[chunk], rows[:, chunk]
        row_operations.dlogits(logits, *of_chunk, form, logits)
        if gradients.count:
            gradients.learn(*gradients.count(logits[0], *of_chunk).tolist())
        yield chunk

    wanted = ((rows[COEF] != 0) & (row_grad != 0)).nonzero().squeeze(1)
    through_chunks(head, wanted, _chunk_size(chunks, len(wanted), head), backend, dlogits, gradients)
    return gradients.finished()


@linear_gradients.register_fake
def _(input, weight, bias, target, row_grad, rows, *plain):
    return _fake_gradients(input, weight, plain)


def _fake_gradients(input, weight, plain):
    _, chunks, dtype, _, (needs_input, needs_weight, needs_bias), *_ = _opened(plain)
    dtype = supported(dtype, input.device)
    total_dtype = torch.promote_types(chunks.accumulate_dtype, dtype)
    return (
        input.new_empty(input.shape if needs_input else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=total_dtype),
        weight.new_empty((len(weight),) if needs_bias else (0,), dtype=total_dtype),
    )


# As if no row were dropped: a bound, since how many are is not known from shapes.
@register_flop_formula([torch.ops.tce_kernels.linear_loss, torch.ops.tce_kernels.linear_gradients])
def _flops(input_shape, weight_shape, *arguments, out_shape=None, **_) -> int:
    needs = _opened(arguments[4:])[4]  # behind target, row_scale and param, or row_grad and rows
    (V, D), (*leading, _) = weight_shape, input_shape
    return 2 * math.prod(leading) * D * V * (1 + needs[0] + needs[1])


class LinearLossAndGradients(Function):
    """Sum of the losses [], rows (F, ...), class_fraction [], and the gradients for an upstream gradient of 1.

    `may_vanish`: the upstream gradient may be the 0 of a mean over nothing, which undoes NaN as well.
    """

    generate_vmap_rule = True

    @forward_method
    def forward(input, weight, bias, *arguments):
        *arguments, _ = arguments
        loss, *others = linear_loss(input, weight, bias, *arguments)
        return loss.sum(), *others

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.backend, ctx.needs, _, _, _, _, ctx.may_vanish = inputs
        _, rows, class_fraction, *gradients = output
        ctx.mark_non_differentiable(class_fraction, *gradients)
        ctx.set_materialize_grads(False)
        needed = [gradient for gradient, needed in zip(gradients, ctx.needs, strict=True) if needed]
        ctx.save_for_backward(rows, *needed)
        ctx.memories = [memory_of(gradient) for gradient in needed]
        ctx.dtypes = _dtypes(inputs, ctx.needs)
        ctx.n_constants = len(inputs) - 3

    @staticmethod
    def backward(ctx, upstream, *_):
        rows, *gradients = ctx.saved_tensors
        with torch.no_grad():
            if ctx.may_vanish:
                gradients = [torch.where(upstream == 0, 0, gradient) for gradient in gradients]
            gradients = [
                _scaled(gradient, upstream, dtype, memory, ctx.backend)
                for gradient, dtype, memory in zip(gradients, ctx.dtypes, ctx.memories, strict=True)
            ]
        return *_in_place_of_needed(gradients, ctx.needs, rows, upstream), *[None] * ctx.n_constants


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, memory, backend: str) -> Tensor:
    """gradient * factor [] in `dtype`; in place where nobody can ask for the gradient again."""
    # On a CPU, where a factor of 1 costs nothing, scaling and conversion are quicker one after the other.
    one_by_one = gradient.dtype == dtype or gradient.device.type == "cpu" and gradient.dtype.itemsize >= 4
    if one_by_one and is_plain(factor) and is_memory(memory, gradient) and not graph_is_kept():
        backend_of(backend, gradient).scale_(rows_of(gradient), factor)
        return gradient.to(dtype)
    return product(gradient, factor, dtype)


class LinearRowLoss(Function):
    """Losses (...), rows (F, ...), class_fraction []; the gradients are made in backward, from logits made again."""

    generate_vmap_rule = True

    @forward_method
    def forward(input, weight, bias, *arguments):
        *arguments, _, rows_spread, sizes, group, entropy, _ = arguments
        return linear_loss(input, weight, bias, *arguments, [False] * 3, rows_spread, sizes, group, entropy)[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, target, row_scale, _, *ctx.plain, sizes, ctx.group, _, _ = inputs
        _, rows, class_fraction = output
        *_, ctx.needs, _ = ctx.plain
        ctx.mark_non_differentiable(class_fraction)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, target, row_scale, rows, sizes)
        ctx.dtypes = _dtypes(inputs, ctx.needs)
        ctx.n_constants = len(inputs) - 3

    @staticmethod
    def backward(ctx, upstream, *_):
        input, weight, bias, target, row_scale, rows, sizes = ctx.saved_tensors
        with torch.no_grad():
            gradients = linear_gradients(
                input.detach(), weight.detach(), None if bias is None else bias.detach(), target,
                upstream * row_scale, rows.detach(), *ctx.plain, sizes, ctx.group,
            )  # fmt: skip
            gradients = [gradient for gradient, needed in zip(gradients, ctx.needs, strict=True) if needed]
            gradients = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *_in_place_of_needed(gradients, ctx.needs, rows, upstream), *[None] * ctx.n_constants


def _dtypes(inputs, needs):
    return [tensor.dtype for tensor, needed in zip(inputs[:3], needs, strict=True) if needed]


def _in_place_of_needed(gradients, needs, rows, upstream):
    """The gradients that are needed, handed out, and None for the others."""
    gradients = iter(gradients)
    return [hand_out(next(gradients), rows, upstream) if needed else None for needed in needs]


# torch.compile takes no function with a `jvp` of its own. Forward mode goes another way (functional.linear_loss) unless
# it goes through the gradient.
class _EagerLossAndGradients(LinearLossAndGradients):
    jvp = staticmethod(refuse_tangent)


class _EagerRowLoss(LinearRowLoss):
    jvp = staticmethod(refuse_tangent)


def loss_and_rows(
    input: Tensor, weight: Tensor, bias: Tensor | None, *arguments, in_forward: bool, may_vanish: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, per row (...) or the sum [] where the gradients are made in forward; rows (F, ...); class_fraction []."""
    *_, needs, _, _, _, _ = arguments
    if not any(needs):
        return linear_loss(input, weight, bias, *arguments)[:3]
    if torch.compiler.is_compiling():
        function = LinearLossAndGradients if in_forward else LinearRowLoss
    else:
        function = _EagerLossAndGradients if in_forward else _EagerRowLoss
    return function.apply(input, weight, bias, *arguments, may_vanish)[:3]
