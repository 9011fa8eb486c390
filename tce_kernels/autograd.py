"""Registered operators over the two fast backends, and the autograd functions over the operators.

The operators take logits (..., V) as the user passed them and hold everything per row in the shape of the target (...).
`rows` (F, ...) keeps the numbers per row that backward and the statistics need; `stats` names its fields.

An operator returns what it makes and writes to no argument, so that compilers, checkpointing and hooks may do with it
what they like. Memory is written to only where `context.is_plain` says that nobody would miss it.
"""

import functools
import inspect

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version
from torch.fx.node import has_side_effect
from torch.library import custom_op
from torch.multiprocessing.reductions import StorageWeakRef

from . import torch_ops
from .context import has_data, has_tangent, is_plain
from .layout import flat, rows_like, rows_of, shaped
from .options import FORM_SCHEMA, N_PLAIN, Form, form_of
from .shards import Shards
from .stats import N_FIELDS, n_fields
from .torch_ops import compute_dtype

SECOND_BACKWARD = (
    "the gradient of this loss was made in memory that has been handed out, so it can be differentiated only once. "
    "Pass allow_retain_graph=True to recompute the gradient each time."
)
DOUBLE_BACKWARD = (
    "double backward is not supported by the fast backends: their gradient is not differentiable, neither in reverse "
    "nor in forward mode. Pass backend='reference' for second derivatives."
)


@functools.cache
def _triton_ops():
    try:
        from . import triton_ops  # imported late: the package works where triton is not installed
    except ImportError as error:
        raise ImportError(f"backend='triton' needs the package triton ({error}); pass backend='torch'") from error
    return triton_ops


def backend_of(name: str, logits: Tensor):
    if name == "torch":
        return torch_ops
    triton_ops = _triton_ops()
    if not triton_ops.serves(logits.device):
        raise RuntimeError(
            f"backend='triton' needs logits on a GPU, got {logits.device}: move them there, pass backend='torch', or "
            "set TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return triton_ops


def check_target(target: Tensor, V: int, ignore_index: int, of: str = "") -> None:
    """On a CPU, where looking is free, a bad target is an error; elsewhere its row becomes NaN."""
    if target.device.type != "cpu" or not has_data(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= V))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"target must be in [0, {V}) or ignore_index ({ignore_index}), "
            f"got {target[position].item()} at position {list(position)}{of}"
        )


# The end of a schema: where classes are spread over ranks, what those have (`Shards`) and their group.
RANKS = "Tensor? sizes=None, str? group=None"
# And of those that make `rows`: whether with the entropy.
ENTROPY = ", bool entropy=False"


def operator(name: str, arguments: str, returns: str, communicates: bool = False):
    """Register an operator that writes to no argument, from a schema whose options are those of a `Form`.

    Its name here stands for the function itself where the tensors are plain: the way through torch.library costs 20 us.
    communicates: a compiler must not leave it out where one rank has no use for the result, say for having no rows.
    """
    schema = f"({arguments.format(form=FORM_SCHEMA)}) -> ({returns})"
    n_tensors = arguments.removesuffix(ENTROPY).removesuffix(RANKS).count("Tensor")  # which come first

    def decorate(function):
        registered = custom_op(f"tce_kernels::{name}", mutates_args=(), schema=schema)(function)
        if communicates:
            has_side_effect(getattr(torch.ops.tce_kernels, name).default)

        @functools.wraps(function)
        def call(*arguments):
            return (function if is_plain(*arguments[:n_tensors]) else registered)(*arguments)

        call.register_fake = registered.register_fake
        return call

    return decorate


def _opened(plain) -> tuple:
    """What an operator was called with besides tensors: its form, backend, and sizes and group, if it has them."""
    of_form, backend, rest = plain[:N_PLAIN], plain[N_PLAIN], plain[N_PLAIN + 1 :]
    sizes, group, entropy = (*rest, *(None, None, False)[len(rest) :])  # PyTorch leaves out what is as by default
    return (*of_form, entropy), backend, sizes, group  # numbers as they came: they may be symbolic


def flat_rows(rows: Tensor) -> Tensor:
    """What backward needs of rows (F, ...): [6, N], without the entropy."""
    return rows[:N_FIELDS].reshape(N_FIELDS, -1)


def _write_dlogits(logits, target, row_grad, rows, form: Form, backend, sizes, group, out) -> None:
    x, n_classes = rows_of(logits), None
    if group is not None:
        shards = Shards(group, sizes)
        target, form, n_classes = shards.local(target, form.ignore_index), form.local(), shards.n_classes
    backend_of(backend, logits).dlogits(
        x, flat(target), flat(row_grad), flat_rows(rows), form, rows_like(x, out), n_classes
    )


def _write_loss_and_dlogits(logits, target, row_scale, param, form: Form, backend, out) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        check_target(target, logits.shape[-1], form.ignore_index)
    x = rows_of(logits)
    loss, rows = backend_of(backend, logits).loss_and_dlogits(
        x, flat(target), flat(row_scale), param, form, rows_like(x, out)
    )
    return loss.sum(), shaped(rows, (len(rows), *target.shape))


def _empty_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_rows(logits: Tensor, target: Tensor, entropy: bool) -> Tensor:
    return logits.new_empty((n_fields(entropy), *target.shape), dtype=compute_dtype(logits.dtype))


@operator(
    "row_loss",
    "Tensor logits, Tensor target, Tensor row_scale, Tensor? param, {form}, str backend, " + RANKS + ENTROPY,
    "Tensor loss, Tensor rows",
)
def row_loss(logits, target, row_scale, param, *plain):
    """Loss (...) and rows (F, ...), from one read of the logits; with a group, of all its ranks' logits."""
    form, backend, sizes, group = _opened(plain)
    form, x, flat_scale = form_of(*form), rows_of(logits), flat(row_scale)
    row_operations = backend_of(backend, logits)
    shards = None if group is None else Shards(group, sizes)
    if backend == "torch":
        check_target(target, logits.shape[-1] if group is None else shards.n_classes, form.ignore_index)
    if group is None:
        loss, rows = row_operations.row_loss(x, flat(target), flat_scale, param, form)
    else:
        local, form = flat(shards.local(target, form.ignore_index)), form.local()
        sums = shards.gather(row_operations.shard_sums(x, local, form))
        loss, rows = row_operations.row_loss_of_sums(sums, local, flat_scale, param, form, shards.n_classes)
    return shaped(loss, target.shape), shaped(rows, (len(rows), *target.shape))


@row_loss.register_fake
def _(logits, target, row_scale, param, *plain):
    loss = logits.new_empty(target.shape, dtype=compute_dtype(logits.dtype))
    return loss, _fake_rows(logits, target, _opened(plain)[0][-1])


@operator(
    "dlogits",
    "Tensor logits, Tensor target, Tensor row_grad, Tensor rows, {form}, str backend, " + RANKS,
    "Tensor dlogits",
)
def dlogits(logits, target, row_grad, rows, *plain):
    """Gradient (..., V) for row_grad (...) = upstream gradient * row_scale."""
    form, backend, sizes, group = _opened(plain)
    out = _empty_like(logits)
    _write_dlogits(logits, target, row_grad, rows, form_of(*form), backend, sizes, group, out)
    return out


@dlogits.register_fake
def _(logits, *_):
    return _empty_like(logits)


@operator(
    "loss_and_dlogits",
    "Tensor logits, Tensor target, Tensor row_scale, Tensor? param, {form}, str backend" + ENTROPY,
    "Tensor loss, Tensor rows, Tensor dlogits",
)
def loss_and_dlogits(logits, target, row_scale, param, *plain):
    """Sum of the losses [], rows (F, ...), and the gradient (..., V) for an upstream gradient of 1, in one pass."""
    out = _empty_like(logits)
    return *_write_loss_and_dlogits(logits, target, row_scale, param, *_of_one_process(plain), out), out


def _of_one_process(plain) -> tuple:
    """Form and backend, from the plain values of form, backend and, unless PyTorch has left it out, entropy."""
    return form_of(*plain[:N_PLAIN], *plain[N_PLAIN + 1 :]), plain[N_PLAIN]


@loss_and_dlogits.register_fake
def _(logits, target, row_scale, param, *plain):
    loss = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    entropy = any(plain[N_PLAIN + 1 :])
    return loss, _fake_rows(logits, target, entropy), _empty_like(logits)


def refuse_tangent(ctx, *_):
    raise RuntimeError(DOUBLE_BACKWARD)


def forward_method(function):
    """A static `forward` whose signature is known: PyTorch would inspect it at each call, which takes 20 us."""
    function.__signature__ = inspect.signature(function)
    return staticmethod(function)


class _RefuseDerivative(Function):
    """Identity on what has no derivative with respect to the tensors that it is tied to: asking for one is an error."""

    generate_vmap_rule = True

    @forward_method
    def forward(tensor, *ties):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, upstream):
        _, *ties_need = ctx.needs_input_grad
        if any(ties_need):
            raise RuntimeError(DOUBLE_BACKWARD)
        return upstream, *[None] * len(ties_need)

    jvp = staticmethod(refuse_tangent)


def hand_out(gradient: Tensor, rows: Tensor, upstream: Tensor) -> Tensor:
    """A gradient that says so if somebody differentiates it; a compiled graph refuses that by itself.

    `rows` came out of the same node as the loss, so through it the graph leads to whatever the loss depends on.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RefuseDerivative.apply(gradient, rows, upstream)
    return gradient


def memory_of(tensor: Tensor) -> StorageWeakRef | None:
    """What the memory of a tensor is known by, even when it has been freed and its address taken by other memory."""
    return StorageWeakRef(tensor.untyped_storage()) if is_plain(tensor) else None


def is_memory(memory: StorageWeakRef | None, tensor: Tensor) -> bool:
    """Whether a tensor has the memory of before: what a hook brings back may belong to the hook."""
    return memory is not None and is_plain(tensor) and StorageWeakRef(tensor.untyped_storage()) == memory


def product(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor [], in float32 at least, rounded once to `dtype`."""
    if is_plain(gradient, factor) and gradient.is_cuda and gradient.dtype == compute_dtype(gradient.dtype):
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))  # one kernel, no copy between
    return (gradient.to(compute_dtype(gradient.dtype)) * factor).to(dtype)


class LossAndGradient(Function):
    """Sum of the losses [], rows (F, ...), and the gradient for an upstream gradient of 1, made in forward.

    With `inplace` the gradient takes the place of the logits; there is no third output then. `has_tangent`: forward
    mode goes through the logits.
    """

    generate_vmap_rule = True

    @forward_method
    def forward(logits, target, row_scale, param, *plain):
        *plain, inplace, _ = plain
        if not inplace:
            return loss_and_dlogits(logits, target, row_scale, param, *plain)
        out = logits.detach()
        loss, rows = _write_loss_and_dlogits(out, target, row_scale, param, *_of_one_process(plain), out)
        increment_version(out)
        return loss, rows, None

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.backend, _, inplace, ctx.has_tangent = inputs
        _, rows, gradient = output
        if inplace:
            gradient = inputs[0].detach()  # as it is no more what made it, autograd is not to see it as such
        else:
            ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, rows)
        ctx.save_for_forward(gradient, rows)
        ctx.memory, ctx.handed_out = memory_of(gradient), False
        ctx.n_constants = len(inputs) - 1

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, *[None] * ctx.n_constants
        if ctx.handed_out:
            raise RuntimeError(SECOND_BACKWARD)
        if ctx.has_tangent:
            raise RuntimeError(DOUBLE_BACKWARD)
        gradient, rows = ctx.saved_tensors
        with torch.no_grad():
            gradient = gradient.detach()
            if is_plain(upstream) and is_memory(ctx.memory, gradient):
                ctx.handed_out = True
                backend_of(ctx.backend, gradient).scale_(rows_of(gradient), upstream)
                increment_version(gradient)
            else:
                gradient = product(gradient, upstream, gradient.dtype)
        return hand_out(gradient, rows, upstream), *[None] * ctx.n_constants


class RowLoss(Function):
    """Losses (...) and rows (F, ...); the gradient is made in backward from the logits."""

    generate_vmap_rule = True

    @forward_method
    def forward(logits, target, row_scale, param, *plain):
        *plain, _, _ = plain
        return row_loss(logits, target, row_scale, param, *plain)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, row_scale, _, *ctx.plain, sizes, ctx.group, _, ctx.inplace, ctx.has_tangent = inputs
        _, rows = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, row_scale, rows, sizes)
        ctx.save_for_forward(logits, target, row_scale, rows, sizes)
        ctx.memory, ctx.handed_out = memory_of(logits) if ctx.inplace else None, False
        ctx.n_constants = len(inputs) - 1

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return None, *[None] * ctx.n_constants
        if ctx.handed_out:
            raise RuntimeError(SECOND_BACKWARD)
        if ctx.has_tangent:
            raise RuntimeError(DOUBLE_BACKWARD)
        logits, target, row_scale, rows, sizes = ctx.saved_tensors
        with torch.no_grad():
            logits, row_grad = logits.detach(), upstream * row_scale
            if ctx.inplace and is_plain(row_grad) and is_memory(ctx.memory, logits):
                ctx.handed_out = True
                *form, backend = ctx.plain
                _write_dlogits(logits, target, row_grad, rows, form_of(*form), backend, sizes, ctx.group, logits)
                increment_version(logits)
                gradient = logits
            else:
                gradient = dlogits(logits, target, row_grad, rows, *ctx.plain, sizes, ctx.group)
        return hand_out(gradient, rows, upstream), *[None] * ctx.n_constants


def _along(gradient: Tensor, tangent: Tensor) -> Tensor:
    """How much each row's loss changes (...), for gradient and tangent (..., V)."""
    dtype = compute_dtype(gradient.dtype)
    return (gradient.to(dtype) * tangent.to(dtype)).sum(-1)


# torch.compile takes no function with a `jvp` of its own, so forward mode is added for eager calls.
class LossAndGradientWithTangent(LossAndGradient):
    @staticmethod
    def jvp(ctx, tangent, *_):
        gradient, rows = ctx.saved_tensors
        return _RefuseDerivative.apply(_along(gradient, tangent).sum(), rows), torch.zeros_like(rows), None


class RowLossWithTangent(RowLoss):
    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, target, row_scale, rows, sizes = ctx.saved_tensors
        gradient = dlogits(logits.detach(), target, row_scale, rows.detach(), *ctx.plain, sizes, ctx.group)
        return _RefuseDerivative.apply(_along(gradient, tangent), rows), torch.zeros_like(rows)


def loss_and_rows(logits: Tensor, *arguments, in_forward: bool, inplace: bool) -> tuple[Tensor, Tensor]:
    """Loss and rows: per row (...), or their sum [] where the gradient is made in forward.

    With a group the gradient waits for backward: what the other ranks find comes between the two reads anyway.
    """
    *of_one_process, _, group, entropy = arguments
    tangent = has_tangent(logits)
    if not tangent and not (torch.is_grad_enabled() and logits.requires_grad):
        return row_loss(logits, *arguments)
    if torch.compiler.is_compiling():
        # The gradient in backward, which costs 6 bytes per 2-byte logit: made in forward it would be scaled in a pass
        # of its own, which costs 8.
        return RowLoss.apply(logits, *arguments, False, False)
    if in_forward and group is None:
        function, arguments = LossAndGradientWithTangent, (*of_one_process, entropy)
    else:
        function = RowLossWithTangent
    plain = is_plain(logits, *arguments[:3])
    # Without functional transforms `Function.apply` does no more than bind its arguments, which takes 10 us.
    apply = super(Function, function).apply if plain else function.apply
    loss, rows, *_ = apply(logits, *arguments, inplace and plain and not tangent, tangent)
    return loss, rows
