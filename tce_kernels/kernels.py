"""Triton kernels and their launchers.

Every loss here sees a row of logits only through s = log p_t and lse = logsumexp(z), so its gradient is

    dz[j] = row_scale * ((coef + 2 z_loss lse) softmax(z)[j] - coef [j == target]),   coef = -dphi / ds.

A row costs two sweeps: the first finds its maximum and sum of exponentials, the second writes the gradient.
Logits enter as u, with z = unit * u: u = x and unit = logit_scale, or, under a softcap,
u = tanh(logit_scale x / softcap) and unit = softcap. exp(z - max z) is then exp2((u - max u) * unit log2(e)) in
both cases, and a logit scale costs nothing per logit.

Bytes of device memory per b-byte logit: `row_loss` b; `loss_and_dlogits` 2 b (kept rows are read again, but from
registers or from L2), `dlogits` 2 b for kept rows and b for dropped ones, which are written but not read.
"""

import torch
import triton
import triton.language as tl

from . import stats

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
TINY = tl.constexpr(1e-37)
VECTOR_BYTES = tl.constexpr(16)

LOG_PROB, LSE, COEF = tl.constexpr(stats.LOG_PROB), tl.constexpr(stats.LSE), tl.constexpr(stats.COEF)
ROW_MAX, SUM_EXP, CORRECT = tl.constexpr(stats.ROW_MAX), tl.constexpr(stats.SUM_EXP), tl.constexpr(stats.CORRECT)


@triton.jit
def _row(ptr, row, inner, stride_outer, stride_inner):
    """Pointer to a row of an [outer, inner, V] tensor, with 64-bit offsets (the division stays in 32 bits)."""
    outer = tl.cast(row // inner, tl.int64)
    return ptr + outer * stride_outer + tl.cast(row % inner, tl.int64) * stride_inner


@triton.jit
def _lift(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Logit x as stored -> u in float32, with z = unit * u."""
    u = x.to(tl.float32)
    if SOFTCAP:
        # tanh from exp, since tl has none: exact at both infinities, and NaN passes.
        u = 1.0 - 2.0 / (1.0 + tl.exp(u * (2.0 * logit_scale / softcap)))
    return u


@triton.jit
def _rule(log_prob, param, alpha, RULE: tl.constexpr):
    """s = log p_t -> (phi, coef), with coef = -dphi / ds. The only place that knows which loss this is."""
    tl.static_assert(RULE == "truncated" or RULE == "focal")
    if RULE == "truncated":  # param = log(threshold)
        # `>` sits on the dropped side, so that a NaN row is kept and reaches the loss.
        dropped = log_prob > param
        phi = tl.where(dropped, 0.0, -log_prob)
        coef = tl.where(dropped, 0.0, 1.0)
    else:  # param = gamma
        p = tl.exp(log_prob)
        # q = 1 - p without the cancellation next to p = 1.
        s = log_prob
        series = -s * (1.0 + s / 2.0 * (1.0 + s / 3.0 * (1.0 + s / 4.0 * (1.0 + s / 5.0))))
        q = tl.where(s > -0.05, series, 1.0 - p)
        modulation = tl.where(param == 0.0, 1.0, tl.exp2(param * tl.log2(q)))
        # p s / q tends to -1 as p tends to 1, and p s to 0 as p tends to 0.
        slope = tl.where(q == 0.0, -1.0, tl.where(p == 0.0, 0.0, p * s) / q)
        phi = -alpha * modulation * s
        coef = alpha * modulation * (1.0 - param * slope)
        # p < 1, whatever it rounds to: underflow must not look like a dropped row.
        coef = tl.where((coef < TINY) & (alpha > 0.0), TINY, coef)
    return phi, coef


@triton.jit
def _peel(row_ptr, V, BLOCK_V: tl.constexpr, PEEL: tl.constexpr):
    """Columns before the row's first 16-byte boundary, and columns in full blocks from there on."""
    if PEEL:
        item_bytes: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        past = (row_ptr.to(tl.int64, bitcast=True) & (VECTOR_BYTES - 1)).to(tl.int32)
        head = ((VECTOR_BYTES - past) & (VECTOR_BYTES - 1)) // item_bytes
        head = tl.where(head < V, head, V)
    else:
        head = 0
    return head, (V - head) // BLOCK_V * BLOCK_V


@triton.jit
def _body(row_ptr, head, PEEL: tl.constexpr):
    """Pointer to the row's first full block."""
    ptr = row_ptr + head
    if PEEL:
        ptr = tl.multiple_of(ptr, VECTOR_BYTES)
    return ptr


@triton.jit
def _edge(start, head, body, BLOCK_V: tl.constexpr, PEEL: tl.constexpr):
    """Columns of one masked block: what lies before and after the full blocks, as if the two were adjacent."""
    cols = start + tl.arange(0, BLOCK_V)
    if PEEL:
        return tl.where(cols < head, cols, cols + body)
    else:
        return cols + body


@triton.jit
def _accumulate(row_max, sum_exp, sum_u, u, mask, scale, SMOOTHING: tl.constexpr):
    """Take one block of u into the running maximum and the [BLOCK_V] vectors of sums."""
    new_max = tl.maximum(row_max, tl.max(u, 0))
    sum_exp = sum_exp * tl.exp2((row_max - new_max) * scale) + tl.exp2((u - new_max) * scale)
    if SMOOTHING:
        sum_u += tl.where(mask, u, 0.0)
    return new_max, sum_exp, sum_u


@triton.jit
def _sweep(
    row_ptr, V, logit_scale, softcap, scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maximum of u, sum of exp2((u - maximum) scale) and sum of u (label smoothing only) over one row."""
    # A finite start: nothing becomes NaN where a whole block is -inf, and a whole row of -inf still does.
    row_max = tl.cast(LOWEST, tl.float32)
    sum_exp = tl.zeros([BLOCK_V], tl.float32)
    sum_u = tl.zeros([BLOCK_V], tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    for start in range(0, body, BLOCK_V):
        # The row is wanted again for the gradient: let it stay in L2.
        x = tl.load(body_ptr + start + lanes, eviction_policy="evict_last")
        u = _lift(x, logit_scale, softcap, SOFTCAP)
        row_max, sum_exp, sum_u = _accumulate(row_max, sum_exp, sum_u, u, True, scale, SMOOTHING)
    for start in range(0, V - body, BLOCK_V):
        cols = _edge(start, head, body, BLOCK_V, PEEL)
        mask = cols < V
        x = tl.load(row_ptr + cols, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        u = tl.where(mask, _lift(x, logit_scale, softcap, SOFTCAP), -float("inf"))
        row_max, sum_exp, sum_u = _accumulate(row_max, sum_exp, sum_u, u, mask, scale, SMOOTHING)
    return row_max, tl.sum(sum_exp, 0), tl.sum(sum_u, 0)


@triton.jit
def _store_row(
    loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, row_scale,
    param, alpha, z_loss, label_smoothing, unit, RULE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Apply the rule to one row and store its loss and its `rows`; zeros if it is not live (ignored)."""
    log_sum = tl.log(sum_exp)
    lse = unit * row_max + log_sum
    log_prob = unit * (target_u - row_max) - log_sum
    # Rounding above 0 must not drop a row at threshold 1. NaN passes.
    log_prob = tl.where(log_prob > 0.0, 0.0, log_prob)
    phi, coef = _rule(log_prob, param, alpha, RULE)
    # A NaN row, or a target out of range, is NaN in the gradient too.
    coef = tl.where(log_prob == log_prob, coef, log_prob)
    if SMOOTHING:
        uniform = unit * (row_max - sum_u / V) + log_sum  # lse - mean(z)
        phi = (1.0 - label_smoothing) * phi + label_smoothing * uniform
    phi += z_loss * lse * lse

    coef = tl.where(live & (row_scale != 0.0), coef, 0.0)
    correct = (target_u == row_max) & (log_prob == log_prob)
    tl.store(loss_ptr + row, tl.where(coef == 0.0, 0.0, row_scale * phi))
    tl.store(rows_ptr + LOG_PROB * N + row, tl.where(live, log_prob, 0.0))
    tl.store(rows_ptr + LSE * N + row, tl.where(live, lse, 0.0))
    tl.store(rows_ptr + COEF * N + row, coef)
    tl.store(rows_ptr + ROW_MAX * N + row, tl.where(live, row_max, 0.0))
    tl.store(rows_ptr + SUM_EXP * N + row, tl.where(live, sum_exp, 0.0))
    tl.store(rows_ptr + CORRECT * N + row, tl.where(live & correct, 1.0, 0.0))
    return lse, coef


@triton.jit
def _row_gradient(row_grad, coef, lse, sum_exp, z_loss, label_smoothing, logit_scale, V):
    """Factors of exp2((u - max u) scale), of the target's one-hot and of ones in the row's gradient."""
    row_grad *= logit_scale
    return (
        row_grad * (coef + 2.0 * z_loss * lse) / sum_exp,
        row_grad * coef * (1.0 - label_smoothing),
        row_grad * coef * label_smoothing / V,
    )


@triton.jit
def _gradient(
    u, cols, target, row_max, of_exp, of_target, of_ones, scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to the logits as stored, one block; the only place with the formula."""
    gradient = of_exp * tl.exp2((u - row_max) * scale)
    if SMOOTHING:
        gradient -= of_ones
    gradient = tl.where(cols == target, gradient - of_target, gradient)
    if SOFTCAP:
        gradient *= 1.0 - u * u
    return gradient


@triton.jit
def _write_gradient(
    dlogits_ptr, row_ptr, V, target, row_max, of_exp, of_target, of_ones, kept, logit_scale, softcap, scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one row; zeros, without reading the row, if it is not kept."""
    lanes = tl.arange(0, BLOCK_V)
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    body_dlogits_ptr = _body(dlogits_ptr, head, PEEL)
    for start in range(0, body, BLOCK_V):
        gradient = tl.zeros([BLOCK_V], tl.float32)
        if kept:
            x = tl.load(body_ptr + start + lanes, eviction_policy="evict_first")
            u = _lift(x, logit_scale, softcap, SOFTCAP)
            gradient = _gradient(
                u, start + lanes, target - head, row_max, of_exp, of_target, of_ones, scale, SOFTCAP, SMOOTHING
            )
        # Streaming stores leave the L2 to the logits of the rows in flight.
        tl.store(body_dlogits_ptr + start + lanes, gradient, cache_modifier=".cs")
    for start in range(0, V - body, BLOCK_V):
        cols = _edge(start, head, body, BLOCK_V, PEEL)
        mask = cols < V
        gradient = tl.zeros([BLOCK_V], tl.float32)
        if kept:
            x = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            u = _lift(x, logit_scale, softcap, SOFTCAP)
            gradient = _gradient(u, cols, target, row_max, of_exp, of_target, of_ones, scale, SOFTCAP, SMOOTHING)
        tl.store(dlogits_ptr + cols, gradient, mask=mask, cache_modifier=".cs")


@triton.jit
def _target(target_ptr, row_ptr, row, V, ignore_index, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Whether the row is live (not ignored), its target column (-1 if out of range) and the target's u (then NaN)."""
    target = tl.load(target_ptr + row)
    live = target != ignore_index
    in_range = (target >= 0) & (target < V)
    x = tl.load(row_ptr + target, mask=live & in_range, other=float("nan"))
    return live, tl.where(in_range, target, -1).to(tl.int32), _lift(x, logit_scale, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["inner", "N", "ignore_index"])
def row_loss_kernel(
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    row_scale_ptr,  # [N] fp32
    param_ptr,  # [] fp32: log(threshold), or focal's gamma
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32
    stride_logits_outer, stride_logits_inner, inner, N, V,
    ignore_index, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss and `rows` of one row a program, from one sweep. Ignored rows are not read."""
    row = tl.program_id(0)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    live, target, target_u = _target(target_ptr, row_ptr, row, V, ignore_index, logit_scale, softcap, SOFTCAP)
    row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    if live:
        row_max, sum_exp, sum_u = _sweep(
            row_ptr, V, logit_scale, softcap, unit * tl.cast(LOG2_E, tl.float32), SOFTCAP, SMOOTHING, PEEL, BLOCK_V
        )
    _store_row(
        loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, tl.load(row_scale_ptr + row),
        tl.load(param_ptr), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "N"])
def dlogits_kernel(
    dlogits_ptr,  # [outer, inner, V]; may be logits
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N]
    row_grad_ptr,  # [N] fp32: upstream gradient * row_scale
    rows_ptr,  # [6, N] fp32, from row_loss
    stride_dlogits_outer, stride_dlogits_inner, stride_logits_outer, stride_logits_inner, inner, N, V,
    z_loss, label_smoothing, softcap, logit_scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of one row a program. Dropped rows, and rows whose upstream gradient is 0, are not read."""
    row = tl.program_id(0)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    dlogits_row_ptr = _row(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
    row_grad = tl.load(row_grad_ptr + row)
    coef = tl.load(rows_ptr + COEF * N + row)
    of_exp, of_target, of_ones = _row_gradient(
        row_grad, coef, tl.load(rows_ptr + LSE * N + row), tl.load(rows_ptr + SUM_EXP * N + row),
        z_loss, label_smoothing, logit_scale, V,
    )  # fmt: skip
    _write_gradient(
        dlogits_row_ptr, row_ptr, V, tl.load(target_ptr + row).to(tl.int32), tl.load(rows_ptr + ROW_MAX * N + row),
        of_exp, of_target, of_ones, (coef != 0.0) & (row_grad != 0.0), logit_scale, softcap,
        unit * tl.cast(LOG2_E, tl.float32), SOFTCAP, SMOOTHING, PEEL, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "N", "ignore_index", "fill"])
def loss_and_dlogits_kernel(
    dlogits_ptr,  # [outer, inner, V]; may be logits
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    row_scale_ptr,  # [N] fp32
    param_ptr,  # [] fp32: log(threshold), or focal's gamma
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32
    stride_dlogits_outer, stride_dlogits_inner, stride_logits_outer, stride_logits_inner, inner, N, V,
    ignore_index, fill, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Both of the above for an upstream gradient of 1; each program takes every num_programs-th row.

    A kept row is read a second time, from L2; with ONE_BLOCK (V <= BLOCK_V) it stays in registers instead. Dropped
    rows are filled with zeros, or not written if `fill` is 0.
    """
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    scale = unit * tl.cast(LOG2_E, tl.float32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
        dlogits_row_ptr = _row(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
        row_scale = tl.load(row_scale_ptr + row)
        live, target, target_u = _target(target_ptr, row_ptr, row, V, ignore_index, logit_scale, softcap, SOFTCAP)

        row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
        if ONE_BLOCK:
            cols = tl.arange(0, BLOCK_V)
            mask = cols < V
            x = tl.load(row_ptr + cols, mask=cols < tl.where(live, V, 0), other=-float("inf"))
            u = tl.where(mask, _lift(x, logit_scale, softcap, SOFTCAP), -float("inf"))
            row_max = tl.maximum(tl.max(u, 0), tl.cast(LOWEST, tl.float32))
            sum_exp = tl.sum(tl.exp2((u - row_max) * scale), 0)
            if SMOOTHING:
                sum_u = tl.sum(tl.where(mask, u, 0.0), 0)
        elif live:
            row_max, sum_exp, sum_u = _sweep(row_ptr, V, logit_scale, softcap, scale, SOFTCAP, SMOOTHING, PEEL, BLOCK_V)
        lse, coef = _store_row(
            loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, row_scale,
            tl.load(param_ptr), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING,
        )  # fmt: skip

        of_exp, of_target, of_ones = _row_gradient(
            row_scale, coef, lse, sum_exp, z_loss, label_smoothing, logit_scale, V
        )
        written = (coef != 0.0) | (fill != 0)
        if ONE_BLOCK:
            gradient = _gradient(u, cols, target, row_max, of_exp, of_target, of_ones, scale, SOFTCAP, SMOOTHING)
            gradient = tl.where(coef != 0.0, gradient, 0.0)
            tl.store(dlogits_row_ptr + cols, gradient, mask=cols < tl.where(written, V, 0), cache_modifier=".cs")
        elif written:
            _write_gradient(
                dlogits_row_ptr, row_ptr, V, target, row_max, of_exp, of_target, of_ones, coef != 0.0,
                logit_scale, softcap, scale, SOFTCAP, SMOOTHING, PEEL, BLOCK_V,
            )  # fmt: skip


@triton.jit
def scale_kernel(
    dlogits_ptr,  # [outer, inner, V], scaled in place
    factor_ptr,  # [] fp32
    stride_dlogits_outer, stride_dlogits_inner, inner, V,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row; memory is not touched when the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        row = tl.program_id(0)
        row_ptr = _row(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < V
            gradient = tl.load(row_ptr + cols, mask=mask)
            tl.store(row_ptr + cols, gradient.to(tl.float32) * factor, mask=mask)


@triton.jit
def move_rows_kernel(
    rows_ptr,  # [n, stride_rows_n]: rows with what pads them
    source_ptr,  # [K] int64
    stride_rows_n,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program i copies row source[i] over row i. No row may be both read and written, so rows that stay are skipped."""
    row = tl.cast(tl.program_id(0), tl.int64)
    source = tl.load(source_ptr + row)
    if source != row:
        for start in range(0, stride_rows_n, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < stride_rows_n
            x = tl.load(rows_ptr + source * stride_rows_n + cols, mask=mask)
            tl.store(rows_ptr + row * stride_rows_n + cols, x, mask=mask)


# 16 logits a thread: they, their addresses and their partial sums fit in its registers. Not tuned on a GPU yet.
BLOCK_V = 8192
N_THREADS = 512


def serves(device):
    """Whether the kernels run on tensors of this device: a GPU, or what Triton's interpreter or driver stands for."""
    if device.type == "cuda" or not isinstance(row_loss_kernel, triton.JITFunction):
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # no driver at all
        return False


def _launch_options():
    """Compiler options. Fusion is pinned because Triton 3.10 turns it off by default."""
    if torch.version.hip:
        return {"num_warps": N_THREADS // 64, "enable_fp_fusion": True}
    # All the registers that 512 threads can have: left alone, ptxas aims at 64 and spills a few to get there.
    return {"num_warps": N_THREADS // 32, "enable_fp_fusion": True, "maxnreg": 128}


def _device_figures(device):
    """Multiprocessors, and bytes of cache that the rows in flight may fill: three quarters of the L2."""
    if device.type != "cuda":  # the interpreter: so few that every program takes several rows
        return 1, 2**20
    properties = torch.cuda.get_device_properties(device)
    # AMD's compute units share the Infinity Cache (256 MB on MI300), which torch does not report.
    cache_bytes = 256 * 2**20 if torch.version.hip else properties.L2_cache_size
    return properties.multi_processor_count, cache_bytes * 3 // 4


def _n_programs(logits):
    """Programs of `loss_and_dlogits_kernel`: no more rows in flight than the cache holds at once."""
    outer, inner, V = logits.shape
    multiprocessors, cache_bytes = _device_figures(logits.device)
    rows_in_cache = cache_bytes // (V * logits.element_size())
    return min(outer * inner, max(rows_in_cache, 1), multiprocessors * (2048 // N_THREADS))


def _strides(rows):
    """Strides of the two row dimensions; 0 where there is a single row, whose stride says nothing about alignment."""
    return [stride if size > 1 else 0 for stride, size in zip(rows.stride()[:2], rows.shape[:2], strict=True)]


def _access(*tensors):
    """How to read and write rows 16 bytes at a time: constexpr flags for [outer, inner, V] tensors used side by side.

    Triton does so by itself where it can prove that rows are aligned: pointer and strides are multiples of 16. Other
    rows are peeled, if all tensors are off the 16-byte boundaries by the same bytes. What is left goes one by one, in
    smaller blocks, since every address then takes registers of its own.
    """
    V = tensors[0].shape[2]
    starts = [(tensor.data_ptr(), *_strides(tensor)) for tensor in tensors]
    item = tensors[0].element_size()
    offsets = {(ptr % 16, outer * item % 16, inner * item % 16) for ptr, outer, inner in starts}
    provable = all(number % 16 == 0 for start in starts for number in start)
    return {
        "PEEL": len(offsets) == 1 and not provable and V > BLOCK_V,
        "BLOCK_V": BLOCK_V if len(offsets) == 1 or V <= BLOCK_V else BLOCK_V // 4,
    }


def _flags(softcap, label_smoothing):
    return {"SOFTCAP": softcap is not None, "SMOOTHING": label_smoothing != 0.0}


def row_loss(
    logits, target, row_scale, param, *, rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale
):
    """logits [outer, inner, V], target and row_scale [N], param [] -> loss [N] and rows [6, N], both float32."""
    outer, inner, V = logits.shape
    N = outer * inner
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    rows = torch.empty(stats.N_FIELDS, N, dtype=torch.float32, device=logits.device)
    if N:
        with _device(logits):
            row_loss_kernel[(N,)](
                logits, target, row_scale, param, loss, rows, *_strides(logits), inner, N, V,
                ignore_index, alpha, z_loss, label_smoothing, softcap or 1.0, logit_scale,
                RULE=rule, **_access(logits), **_flags(softcap, label_smoothing), **_launch_options(),
            )  # fmt: skip
    return loss, rows


def dlogits(logits, target, row_grad, rows, out, *, z_loss, label_smoothing, softcap, logit_scale):
    """Write the gradient for row_grad [N] = upstream gradient * row_scale to out, which may be the logits."""
    outer, inner, V = logits.shape
    N = outer * inner
    if N:
        with _device(logits):
            dlogits_kernel[(N,)](
                out, logits, target, row_grad, rows, *_strides(out), *_strides(logits), inner, N, V,
                z_loss, label_smoothing, softcap or 1.0, logit_scale,
                **_access(logits, out), **_flags(softcap, label_smoothing), **_launch_options(),
            )  # fmt: skip


def loss_and_dlogits(
    logits, target, row_scale, param, out, *,
    rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale, fill=True,
):  # fmt: skip
    """`row_loss`, and `dlogits` for an upstream gradient of 1, in one launch.

    Without `fill` the dropped rows of `out` stay as they were; with it they become zeros.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    rows = torch.empty(stats.N_FIELDS, N, dtype=torch.float32, device=logits.device)
    if N:
        with _device(logits):
            loss_and_dlogits_kernel[(_n_programs(logits),)](
                out, logits, target, row_scale, param, loss, rows, *_strides(out), *_strides(logits), inner, N, V,
                ignore_index, int(fill), alpha, z_loss, label_smoothing, softcap or 1.0, logit_scale,
                RULE=rule, **_access(logits, out), ONE_BLOCK=V <= BLOCK_V,
                **_flags(softcap, label_smoothing), **_launch_options(),
            )  # fmt: skip
    return loss, rows


def loss_and_kept_dlogits(logits, target, row_scale, param, **options):
    """`loss_and_dlogits` over the logits [1, n, V] of a buffer of rows, no row of which is ignored, packed.

    Returns loss [n], rows [6, n] and kept [K]: row i < K of the logits now holds the gradient of row kept[i].
    """
    loss, rows = loss_and_dlogits(logits, target, row_scale, param, logits, fill=False, **options)
    is_kept = rows[stats.COEF] != 0
    kept = is_kept.nonzero().squeeze(1)  # here the host waits, to learn K
    K = len(kept)
    if K in (0, len(is_kept)):
        return loss, rows, kept
    # The first K rows have as many gaps as there are kept rows behind them: gap h takes the h-th from the end.
    gap = is_kept[:K].logical_not().cumsum(0)
    source = torch.where(is_kept[:K], torch.arange(K, device=gap.device), kept[-gap])
    with _device(logits):
        move_rows_kernel[(K,)](logits, source, logits.stride(1), BLOCK_V=BLOCK_V, **_launch_options())
    return loss, rows, source


def scale_(dlogits, factor):
    """dlogits [outer, inner, V] *= factor []; device memory is not touched if the factor is 1."""
    outer, inner, V = dlogits.shape
    if outer * inner:
        with _device(dlogits):
            scale_kernel[(outer * inner,)](
                dlogits, factor, *_strides(dlogits), inner, V, BLOCK_V=BLOCK_V, **_launch_options()
            )


def _device(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)
