"""The linear path: lm-head and loss together, with the logits of one chunk of rows in memory at a time.

Each chunk goes through one matmul and the loss, which leaves the gradients of its kept rows, and only those, packed at
the front. They wait there until half a chunk has come together, then take part in the two backward matmuls. With a
share `a` of the rows kept that is 2 N D V (1 + 2 a) multiplications and additions, where all rows would cost 6 N D V;
ignored rows are left out of the forward matmul as well.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from .autograd import (
    backend_of,
    check_target,
    forward_method,
    hand_out,
    is_memory,
    memory_of,
    operator,
    product,
    refuse_tangent,
)
from .context import graph_is_kept, is_plain
from .gradients import Gradients, GradientsOfHeaviestClasses
from .head import Head, auto_chunk_size, supported
from .layout import flat, rows_of, shaped
from .options import CHUNKS_SCHEMA, Chunks, Form, form_of
from .stats import COEF, N_FIELDS


def _through_chunks(
    head: Head, rows: Tensor, chunk_size: int | None, backend: str, step: Callable[[Tensor, Tensor], Tensor],
    gradients: Gradients | None,
) -> None:  # fmt: skip
    """The loop. step(logits [1, n, V], chunk [n]) returns the rows [K] whose gradients it left in the first K rows."""
    V = len(head.weight)
    if chunk_size is None:
        chunk_size = auto_chunk_size(len(rows), V, head.dtype.itemsize, head.input.device.type == "cpu")
    # Fast matmuls need rows that start at multiples of 16 bytes, and Triton proves wide accesses right from strides
    # that are multiples of 16 elements. PyTorch's row operations would copy rows with gaps between them.
    stride = V if backend == "torch" else -(-V // 16) * 16
    n_waiting, waiting = 0, []
    most_waiting = (chunk_size - 1) // 2 if gradients else 0
    memory = head.weight.new_empty(min(len(rows), chunk_size + most_waiting), stride)
    buffer, padding = memory[:, :V], memory[:, V:]
    if padding.device.type == "cpu":
        padding.zero_()  # bfloat16 matmuls of some processors read past a row, and count on finding numbers
    with torch.autocast(head.input.device.type, enabled=False):  # the dtypes have been chosen
        for chunk in rows.split(chunk_size):
            logits = buffer[n_waiting : n_waiting + len(chunk)]
            head.write_logits(chunk, logits)
            kept = step(logits[None], chunk)
            if gradients is None:
                continue
            waiting.append(kept)
            n_waiting += len(kept)
            if n_waiting > most_waiting:
                gradients.add(buffer[:n_waiting], torch.cat(waiting))
                n_waiting, waiting = 0, []
        if n_waiting:
            gradients.add(buffer[:n_waiting], torch.cat(waiting))


HEAD = "Tensor input, Tensor weight, Tensor? bias, Tensor target"
PLAIN = "{form}, " + CHUNKS_SCHEMA + ", ScalarType dtype, str backend, bool[] needs"
GRADIENTS = "Tensor dinput, Tensor dweight, Tensor dbias"


def _gradients(
    head: Head, needs: Sequence[bool], chunks: Chunks, row_operations, form: Form, row_grad: Tensor, rows: Tensor
) -> Gradients:
    """Exact, or within the tolerance where entries have the sign that it takes."""
    tolerance = float(chunks.gradient_tolerance)
    if tolerance == 0 or form.label_smoothing and form.softcap is not None:
        return Gradients(head, needs, chunks.accumulate_dtype)
    return GradientsOfHeaviestClasses(
        head, needs, chunks.accumulate_dtype, tolerance, row_operations, form, row_grad, rows
    )


def _opened(plain) -> tuple[tuple, Chunks, torch.dtype, str, Sequence[bool]]:
    """The plain values that an operator was called with: those of its form, of its chunks, and the others."""
    n = len(Form._fields)
    *chunks, dtype, backend, needs = plain[n:]
    return plain[:n], Chunks(*chunks), dtype, backend, needs


@operator(
    "linear_loss",
    HEAD + ", Tensor row_scale, Tensor? param, " + PLAIN,
    "Tensor loss, Tensor rows, Tensor class_fraction, " + GRADIENTS,
)
def linear_loss(input, weight, bias, target, row_scale, param, *plain):
    """Loss (...), rows (6, ...), class_fraction [], and the gradients of the sum that are needed of the head's tensors.

    class_fraction: mean share of the classes that took part in the gradients' matmuls.
    """
    form, chunks, dtype, backend, needs = _opened(plain)
    form = form_of(*form)
    if backend == "torch":
        check_target(target, len(weight), form.ignore_index)
    row_operations = backend_of(backend, input)
    head = Head(input, weight, bias, dtype)
    flat_target, flat_scale = flat(target), flat(row_scale)
    loss = row_scale.new_zeros(target.numel())
    rows = row_scale.new_zeros(N_FIELDS, target.numel())
    gradients = _gradients(head, needs, chunks, row_operations, form, flat_scale, rows)

    def row_loss(logits, chunk):
        loss[chunk], rows[:, chunk] = row_operations.row_loss(
            logits, flat_target[chunk], flat_scale[chunk], param, form
        )

    def loss_and_kept_dlogits(logits, chunk):
        loss[chunk], rows[:, chunk], kept, counted = row_operations.loss_and_kept_dlogits(
            logits, flat_target[chunk], flat_scale[chunk], param, form, gradients.count
        )
        if counted:
            gradients.learn(*counted)
        return chunk[kept]

    live = (flat_target != form.ignore_index).nonzero().squeeze(1)
    if any(needs):
        _through_chunks(head, live, chunks.chunk_size, backend, loss_and_kept_dlogits, gradients)
    else:
        _through_chunks(head, live, chunks.chunk_size, backend, row_loss, None)
    class_fraction = torch.full((), gradients.class_fraction(), dtype=torch.float32, device=loss.device)
    of_rows = shaped(loss, target.shape), shaped(rows, (N_FIELDS, *target.shape))
    return *of_rows, class_fraction, *gradients.finished(input.shape)


@linear_loss.register_fake
def _(input, weight, bias, target, row_scale, param, *plain):
    rows = row_scale.new_empty((N_FIELDS, *target.shape))
    class_fraction = row_scale.new_empty((), dtype=torch.float32)
    return row_scale.new_empty(target.shape), rows, class_fraction, *_fake_gradients(input, weight, plain)


@operator(
    "linear_gradients",
    HEAD + ", Tensor row_grad, Tensor rows, " + PLAIN,
    GRADIENTS,
)
def linear_gradients(input, weight, bias, target, row_grad, rows, *plain):
    """The gradients that are needed, from logits made again, for row_grad (...) = upstream gradient * row_scale."""
    form, chunks, dtype, backend, needs = _opened(plain)
    form = form_of(*form)
    row_operations = backend_of(backend, input)
    head = Head(input, weight, bias, dtype)
    flat_target, flat_grad, flat_rows = flat(target), flat(row_grad), rows.reshape(N_FIELDS, -1)
    gradients = _gradients(head, needs, chunks, row_operations, form, flat_grad, flat_rows)

    def dlogits(logits, chunk):
        of_chunk = flat_target[chunk], flat_grad[chunk], flat_rows[:, chunk]
        row_operations.dlogits(logits, *of_chunk, form, logits)
        if gradients.count:
            gradients.learn(*gradients.count(logits[0], *of_chunk).tolist())
        return chunk

    wanted = ((flat_rows[COEF] != 0) & (flat_grad != 0)).nonzero().squeeze(1)
    _through_chunks(head, wanted, chunks.chunk_size, backend, dlogits, gradients)
    return gradients.finished(input.shape)


@linear_gradients.register_fake
def _(input, weight, bias, target, row_grad, rows, *plain):
    return _fake_gradients(input, weight, plain)


def _fake_gradients(input, weight, plain):
    _, chunks, dtype, _, (needs_input, needs_weight, needs_bias) = _opened(plain)
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
    *_, needs = arguments
    (V, D), (*leading, _) = weight_shape, input_shape
    return 2 * math.prod(leading) * D * V * (1 + needs[0] + needs[1])


class LinearLossAndGradients(Function):
    """Sum of the losses [], rows (6, ...), class_fraction [], and the gradients for an upstream gradient of 1.

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
        *_, ctx.backend, ctx.needs, ctx.may_vanish = inputs
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
    """Losses (...), rows (6, ...), class_fraction []; the gradients are made in backward, from logits made again."""

    generate_vmap_rule = True

    @forward_method
    def forward(input, weight, bias, *arguments):
        *arguments, _, _ = arguments
        return linear_loss(input, weight, bias, *arguments, [False] * 3)[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, target, row_scale, _, *ctx.plain, _ = inputs
        _, rows, class_fraction = output
        *_, ctx.needs = ctx.plain
        ctx.mark_non_differentiable(class_fraction)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, target, row_scale, rows)
        ctx.dtypes = _dtypes(inputs, ctx.needs)
        ctx.n_constants = len(inputs) - 3

    @staticmethod
    def backward(ctx, upstream, *_):
        input, weight, bias, target, row_scale, rows = ctx.saved_tensors
        with torch.no_grad():
            gradients = linear_gradients(
                input.detach(), weight.detach(), None if bias is None else bias.detach(), target,
                upstream * row_scale, rows.detach(), *ctx.plain,
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
    """Loss, per row (...) or the sum [] where the gradients are made in forward; rows (6, ...); class_fraction []."""
    tensors = input, weight, bias
    needs = [tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    if not any(needs):
        return linear_loss(*tensors, *arguments, needs)[:3]
    if torch.compiler.is_compiling():
        function = LinearLossAndGradients if in_forward else LinearRowLoss
    else:
        function = _EagerLossAndGradients if in_forward else _EagerRowLoss
    return function.apply(*tensors, *arguments, needs, may_vanish)[:3]
