"""The linear path: lm-head and loss together, with the logits of one chunk of rows in memory at a time.

Each chunk goes through one matmul and the loss, which leaves the gradients of its kept rows, and only those, packed at
the front. They wait there until half a chunk has come together, then take part in the two backward matmuls. With a
share `a` of the rows kept that is 2 N D V (1 + 2 a) multiplications and additions, where all rows would cost 6 N D V;
ignored rows are left out of the forward matmul as well.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .autograd import SECOND_BACKWARD, backend_of, check_target, differentiable, flat, hand_out, scale_
from .stats import COEF, N_FIELDS

GPU_CHUNK_ROWS, GPU_CHUNK_BYTES = 2048, 2**29
CPU_CHUNK_ROWS = 1024


def auto_chunk_size(V: int, itemsize: int, on_cpu: bool) -> int:
    """Rows per chunk for logits of `itemsize` bytes."""
    return CPU_CHUNK_ROWS if on_cpu else max(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // (V * itemsize))


def matmul_dtype(input: Tensor) -> torch.dtype:
    """The dtype that F.linear would multiply in: autocast's, or the input's."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def _supported(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 on a processor on which PyTorch multiplies 16-bit matrices element by element."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return dtype
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return torch.float32
    mkldnn = torch.ops.mkldnn
    fast = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if fast() else torch.float32


@functools.cache
def _adds_inside(dtype: torch.dtype, total_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matmul in `dtype` can add to a total of another dtype, tried out once, the result included."""
    if device.type != "cuda":
        return False
    matrix = torch.full((16, 16), 0.5, dtype=dtype, device=device)
    total = torch.full((16, 16), torch.nan, dtype=total_dtype, device=device)
    try:
        for beta in (0, 1):
            torch.addmm(total, matrix.t(), matrix, beta=beta, out_dtype=total_dtype, out=total)
    except (RuntimeError, TypeError):  # this device, or this version of torch, has no such matmul
        return False
    return bool((total == 8).all())


class _Head:
    """The linear map from input [N, D] to logits [N, V], in the dtype of the matmuls."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.dtype = _supported(dtype, input.device)
        self.input = input.reshape(-1, input.shape[-1])
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def inputs(self, rows: Tensor) -> Tensor:
        return self.input[rows].to(self.dtype)

    def write_logits(self, rows: Tensor, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(self.inputs(rows), self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, self.inputs(rows), self.weight.t(), out=out)


class _Gradients:
    """Gradients of input [N, D], weight [V, D] and bias [V], those that are needed; the others stay empty."""

    def __init__(self, head: _Head, needs: Sequence[bool], accumulate_dtype: torch.dtype):
        self.head = head
        self.needs_input, self.needs_weight, self.needs_bias = needs
        V = len(head.weight)
        total_dtype = torch.promote_types(accumulate_dtype, head.dtype)
        self.input = torch.zeros_like(head.input if self.needs_input else head.input[:0], dtype=head.dtype)
        self.weight = torch.empty_like(
            head.weight if self.needs_weight else head.weight[:0],
            dtype=total_dtype, memory_format=torch.contiguous_format,
        )  # fmt: skip
        self.bias = head.weight.new_zeros(V if self.needs_bias else 0, dtype=total_dtype)
        self.beta = 0  # the first product is written, not added, so the weight's total starts uninitialised

    def add(self, dlogits: Tensor, rows: Tensor) -> None:
        """Take in the gradients of the logits [K, V] of some rows [K]."""
        if self.needs_input:
            self.input[rows] = torch.mm(dlogits, self.head.weight)
        if self.needs_weight:
            self._add_to_weight(dlogits.t(), self.head.inputs(rows))
            self.beta = 1
        if self.needs_bias:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def _add_to_weight(self, dlogits: Tensor, x: Tensor) -> None:
        total = self.weight
        if total.dtype == x.dtype:
            total.addmm_(dlogits, x, beta=self.beta)
        elif _adds_inside(x.dtype, total.dtype, x.device):
            torch.addmm(total, dlogits, x, beta=self.beta, out_dtype=total.dtype, out=total)
        else:  # products rounded to the 16 bits of the matmul, of a few classes at a time
            for some, some_dlogits in zip(total.split(4096), dlogits.split(4096), strict=True):
                product = torch.mm(some_dlogits, x)
                some.copy_(product) if self.beta == 0 else some.add_(product)

    def finished(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        if self.beta == 0:
            self.weight.zero_()
        return self.input.view(shape if self.needs_input else 0), self.weight, self.bias


def _through_chunks(
    head: _Head, rows: Tensor, chunk_size: int | None, backend: str, step: Callable[[Tensor, Tensor], Tensor],
    gradients: _Gradients | None,
) -> None:  # fmt: skip
    """The loop. step(logits [1, n, V], chunk [n]) returns the rows [K] whose gradients it left in the first K rows."""
    V = len(head.weight)
    if chunk_size is None:
        chunk_size = auto_chunk_size(V, head.dtype.itemsize, head.input.device.type == "cpu")
    # Fast matmuls need rows that start at multiples of 16 bytes, and Triton proves wide accesses right from strides
    # that are multiples of 16 elements. PyTorch's row operations would copy rows with gaps between them.
    stride = V if backend == "torch" else -(-V // 16) * 16
    n_waiting, waiting = 0, []
    most_waiting = (chunk_size - 1) // 2 if gradients else 0
    buffer = head.weight.new_empty(min(len(rows), chunk_size + most_waiting), stride)[:, :V]
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


@custom_op("tce_kernels::linear_loss", mutates_args=())
def linear_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_scale: Tensor, param: Tensor, rule: str,
    alpha: float, ignore_index: int, z_loss: float, label_smoothing: float, softcap: float | None,
    logit_scale: float, backend: str, chunk_size: int | None, dtype: torch.dtype, accumulate_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss (...), rows (6, ...), and the gradients of the sum that are needed (those of input, weight and bias)."""
    if backend == "torch":
        check_target(target, len(weight), ignore_index)
    options = dict(
        rule=rule, alpha=alpha, ignore_index=ignore_index, z_loss=z_loss, label_smoothing=label_smoothing,
        softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    row_operations = backend_of(backend, input)
    head = _Head(input, weight, bias, dtype)
    gradients = _Gradients(head, needs, accumulate_dtype)
    flat_target, flat_scale = flat(target), flat(row_scale)
    loss = row_scale.new_zeros(target.numel())
    rows = row_scale.new_zeros(N_FIELDS, target.numel())

    def row_loss(logits, chunk):
        loss[chunk], rows[:, chunk] = row_operations.row_loss(
            logits, flat_target[chunk], flat_scale[chunk], param, **options
        )

    def loss_and_kept_dlogits(logits, chunk):
        loss[chunk], rows[:, chunk], kept = row_operations.loss_and_kept_dlogits(
            logits, flat_target[chunk], flat_scale[chunk], param, **options
        )
        return chunk[kept]

    live = (flat_target != ignore_index).nonzero().squeeze(1)
    if any(needs):
        _through_chunks(head, live, chunk_size, backend, loss_and_kept_dlogits, gradients)
    else:
        _through_chunks(head, live, chunk_size, backend, row_loss, None)
    return loss.view(target.shape), rows.view(N_FIELDS, *target.shape), *gradients.finished(input.shape)


@linear_loss.register_fake
def _(input, weight, bias, target, row_scale, *options):
    *_, dtype, accumulate_dtype, needs = options
    rows = row_scale.new_empty((N_FIELDS, *target.shape))
    return row_scale.new_empty(target.shape), rows, *_fake_gradients(input, weight, dtype, accumulate_dtype, needs)


@custom_op("tce_kernels::linear_gradients", mutates_args=())
def linear_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_grad: Tensor, rows: Tensor, z_loss: float,
    label_smoothing: float, softcap: float | None, logit_scale: float, backend: str, chunk_size: int | None,
    dtype: torch.dtype, accumulate_dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that are needed, from logits made again, for row_grad (...) = upstream gradient * row_scale."""
    options = dict(z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale)
    row_operations = backend_of(backend, input)
    head = _Head(input, weight, bias, dtype)
    gradients = _Gradients(head, needs, accumulate_dtype)
    flat_target, flat_grad, flat_rows = flat(target), flat(row_grad), rows.reshape(N_FIELDS, -1)

    def dlogits(logits, chunk):
        chunk_rows = flat_rows[:, chunk]
        row_operations.dlogits(logits, flat_target[chunk], flat_grad[chunk], chunk_rows, logits, **options)
        return chunk

    wanted = ((flat_rows[COEF] != 0) & (flat_grad != 0)).nonzero().squeeze(1)
    _through_chunks(head, wanted, chunk_size, backend, dlogits, gradients)
    return gradients.finished(input.shape)


@linear_gradients.register_fake
def _(input, weight, bias, target, row_grad, rows, *options):
    *_, dtype, accumulate_dtype, needs = options
    return _fake_gradients(input, weight, dtype, accumulate_dtype, needs)


def _fake_gradients(input, weight, dtype, accumulate_dtype, needs):
    needs_input, needs_weight, needs_bias = needs
    V, D = weight.shape
    dtype = _supported(dtype, input.device)
    total_dtype = torch.promote_types(accumulate_dtype, dtype)
    return (
        input.new_empty(input.shape if needs_input else (0,), dtype=dtype),
        weight.new_empty((V, D) if needs_weight else (0, D), dtype=total_dtype),
        weight.new_empty((V,) if needs_bias else (0,), dtype=total_dtype),
    )


def _hand_out(gradients, needs, dtypes, anchor, backend):
    return [
        hand_out(gradient.to(dtype), anchor, backend) if needed else None
        for gradient, needed, dtype in zip(gradients, needs, dtypes, strict=True)
    ]


class LinearLossAndGradients(torch.autograd.Function):
    """Sum of the losses [] and rows (6, ...); the gradients are made in forward, scaled and cast in backward."""

    @staticmethod
    def forward(ctx, input, weight, bias, anchor, *arguments):
        *_, ctx.backend, _chunk_size, _dtype, _accumulate_dtype, ctx.needs = arguments
        loss, rows, *gradients = linear_loss(input, weight, bias, *arguments)
        ctx.save_for_backward(*gradients, anchor)
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.n_arguments = len(arguments)
        ctx.mark_non_differentiable(rows)
        return loss.sum(), rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        try:
            *gradients, anchor = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(SECOND_BACKWARD) from error
        with torch.no_grad():
            for gradient, needed in zip(gradients, ctx.needs, strict=True):
                if needed:
                    scale_(gradient, grad_loss, ctx.backend)
        return *_hand_out(gradients, ctx.needs, ctx.dtypes, anchor, ctx.backend), *[None] * (1 + ctx.n_arguments)


class LinearRowLoss(torch.autograd.Function):
    """Losses (...) and rows (6, ...); the gradients are made in backward, from logits that are made again."""

    @staticmethod
    def forward(ctx, input, weight, bias, anchor, *arguments):
        target, row_scale, _param, _rule, _alpha, _ignore_index, *ctx.options, ctx.needs = arguments
        loss, rows, *_ = linear_loss(input, weight, bias, *arguments[:-1], [False] * 3)
        ctx.save_for_backward(input, weight, bias, target, row_scale, rows, anchor)
        ctx.n_arguments = len(arguments)
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    def backward(ctx, grad_loss, _):
        input, weight, bias, target, row_scale, rows, anchor = ctx.saved_tensors
        with torch.no_grad():
            gradients = linear_gradients(
                input.detach(), weight.detach(), None if bias is None else bias.detach(), target,
                grad_loss * row_scale, rows, *ctx.options, ctx.needs,
            )  # fmt: skip
        dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        *_, backend, _chunk_size, _dtype, _accumulate_dtype = ctx.options
        return *_hand_out(gradients, ctx.needs, dtypes, anchor, backend), *[None] * (1 + ctx.n_arguments)


def loss_and_rows(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments, in_forward: bool):
    """Loss and rows: per row (...), or their sum [] where the gradients are made in forward."""
    tensors = input, weight, bias
    needs = [tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    if not any(needs):
        loss, rows, *_ = linear_loss(*tensors, *arguments, needs)
        return loss, rows
    return differentiable(LinearLossAndGradients if in_forward else LinearRowLoss, tensors, *arguments, needs)
