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
HUGE = tl.constexpr(2.0**31)
VECTOR_BYTES = tl.constexpr(16)
EDGE_LOGITS_PER_THREAD = tl.constexpr(8)  # of masked blocks, so that little of them is wasted

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
def _load(ptr, eviction_policy: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr):
    """One full block of logits."""
    if VECTOR > 1 and ptr.dtype.element_ty == tl.bfloat16:
        # bfloat16 is the upper half of a float32: words of two are halved in fewer instructions than conversion takes.
        words_ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(words_ptr + tl.arange(0, BLOCK_V // 2), eviction_policy=eviction_policy)
        even, odd = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (BLOCK_V,))
    else:
        return tl.load(ptr + tl.arange(0, BLOCK_V), eviction_policy=eviction_policy)


@triton.jit
def _edge(start, head, body, EDGE_V: tl.constexpr, PEEL: tl.constexpr):
    """Columns of one masked block: what lies before and after the full blocks, as if the two were adjacent."""
    cols = start + tl.arange(0, EDGE_V)
    if PEEL:
        return tl.where(cols < head, cols, cols + body)
    else:
        return cols + body


@triton.jit
def _pivot(max_u, scale):
    """What is subtracted from u * scale in one fused operation: the largest product, if it is a finite number."""
    return tl.maximum(max_u * scale, LOWEST)


@triton.jit
def _fitting(scale, row_max):
    """A scale for exponents (u - row_max) * scale that fused operations get right.

    Those of logits beyond 2^31 or so are 0 or out of exp2's reach with any scale, and exact with a power of two.
    """
    power_of_two = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(row_max * scale) < HUGE, scale, power_of_two)


@triton.jit
def _accumulate(max_u, sum_exp, sum_u, u, mask, scale, SMOOTHING: tl.constexpr, VECTOR: tl.constexpr):
    """Take one block of u into the maxima and sums [THREADS], one a thread, so that none waits for another."""
    parts: tl.constexpr = (u.shape[0] // (max_u.shape[0] * VECTOR), max_u.shape[0], VECTOR)
    new_max = tl.maximum(max_u, tl.max(tl.max(tl.reshape(u, parts), 2), 0))
    pivot = _pivot(new_max, scale)
    exps = tl.exp2(tl.fma(tl.reshape(u, parts), scale, -pivot[None, :, None]))
    sum_exp = sum_exp * tl.exp2(_pivot(max_u, scale) - pivot) + tl.sum(tl.sum(exps, 2), 0)
    if SMOOTHING:
        sum_u += tl.sum(tl.sum(tl.reshape(tl.where(mask, u, 0.0), parts), 2), 0)
    return new_max, sum_exp, sum_u


@triton.jit
def _sweep_at(
    row_ptr, V, logit_scale, softcap, scale, split, n_splits, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """`_sweep` for a scale that is known to fit, or of which the result shows that it does not."""
    # A finite start: nothing becomes NaN where a whole block is -inf, and a whole row of -inf still does.
    max_u = tl.full([THREADS], LOWEST, tl.float32)
    sum_exp = tl.zeros([THREADS], tl.float32)
    sum_u = tl.zeros([THREADS], tl.float32)
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    for start in range(split * BLOCK_V, body, n_splits * BLOCK_V):
        # The row is wanted again for the gradient: let it stay in L2.
        u = _lift(_load(body_ptr + start, "evict_last", VECTOR, BLOCK_V), logit_scale, softcap, SOFTCAP)
        max_u, sum_exp, sum_u = _accumulate(max_u, sum_exp, sum_u, u, True, scale, SMOOTHING, VECTOR)
    for start in range(split * EDGE_V, V - body, n_splits * EDGE_V):
        cols = _edge(start, head, body, EDGE_V, PEEL)
        mask = cols < V
        x = tl.load(row_ptr + cols, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        u = _lift(x, logit_scale, softcap, SOFTCAP)
        if SOFTCAP:
            u = tl.where(mask, u, -float("inf"))
        max_u, sum_exp, sum_u = _accumulate(max_u, sum_exp, sum_u, u, mask, scale, SMOOTHING, 1 if PEEL else VECTOR)
    row_max = tl.max(max_u, 0)
    pivot = _pivot(row_max, scale)
    sum_exp = tl.sum(sum_exp * tl.exp2(_pivot(max_u, scale) - pivot), 0)
    if SMOOTHING:
        row_sum = tl.sum(sum_u, 0)
    else:
        row_sum = 0.0
    # From the rounded pivot to the maximum; exactly 1 if that is all there is.
    return row_max, tl.div_rn(sum_exp, tl.exp2(tl.fma(row_max, scale, -pivot))), row_sum


@triton.jit
def _sweep(
    row_ptr, V, logit_scale, softcap, scale, split, n_splits, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Maximum of u, sum of exp2((u - maximum) scale) and sum of u (label smoothing only) over one split of a row."""
    row_max, sum_exp, sum_u = _sweep_at(
        row_ptr, V, logit_scale, softcap, scale, split, n_splits,
        SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
    )  # fmt: skip
    fitting = _fitting(scale, row_max)
    if fitting != scale:
        row_max, sum_exp, sum_u = _sweep_at(
            row_ptr, V, logit_scale, softcap, fitting, split, n_splits,
            SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    return row_max, sum_exp, sum_u


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
def _gradient(exponent, u, of_exp, of_ones, SOFTCAP: tl.constexpr, ONES: tl.constexpr):
    """Gradient with respect to the logits as stored; the only place with the formula."""
    gradient = of_exp * tl.exp2(exponent)
    if ONES:
        gradient -= of_ones
    if SOFTCAP:
        gradient *= 1.0 - u * u
    return gradient


@triton.jit
def _write_target(
    dlogits_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, mask, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the target's logit over that of any other, which the row's threads have left there."""
    tl.debug_barrier()
    gradient = _gradient((target_u - row_max) * scale, target_u, of_exp, of_target + of_ones, SOFTCAP, True)
    tl.store(dlogits_ptr + target, gradient, mask=mask & (target >= 0))


@triton.jit
def _write_gradient(
    dlogits_ptr, row_ptr, V, target, target_u, row_max, of_exp, of_target, of_ones, scale, logit_scale, softcap,
    split, n_splits, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one split of a row."""
    fitting = _fitting(scale, row_max)
    pivot = _pivot(row_max, fitting)
    of_fused_exp = of_exp / tl.exp2(tl.fma(row_max, fitting, -pivot))  # from the maximum to the rounded pivot
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    body_dlogits_ptr = _body(dlogits_ptr, head, PEEL)
    for start in range(split * BLOCK_V, body, n_splits * BLOCK_V):
        u = _lift(_load(body_ptr + start, "evict_first", VECTOR, BLOCK_V), logit_scale, softcap, SOFTCAP)
        gradient = _gradient(tl.fma(u, fitting, -pivot), u, of_fused_exp, of_ones, SOFTCAP, SMOOTHING)
        # Streaming stores leave the L2 to the logits of the rows in flight.
        tl.store(body_dlogits_ptr + start + tl.arange(0, BLOCK_V), gradient, cache_modifier=".cs")
    for start in range(split * EDGE_V, V - body, n_splits * EDGE_V):
        cols = _edge(start, head, body, EDGE_V, PEEL)
        mask = cols < V
        x = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        u = _lift(x, logit_scale, softcap, SOFTCAP)
        gradient = _gradient(tl.fma(u, fitting, -pivot), u, of_fused_exp, of_ones, SOFTCAP, SMOOTHING)
        tl.store(dlogits_ptr + cols, gradient, mask=mask, cache_modifier=".cs")
    _write_target(dlogits_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, True, SOFTCAP)


@triton.jit
def _write_zeros(
    dlogits_ptr, V, split, n_splits, PEEL: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write the zeros of one split of a dropped row."""
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(dlogits_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(dlogits_ptr, head, PEEL)
    for start in range(split * BLOCK_V, body, n_splits * BLOCK_V):
        tl.store(body_ptr + start + tl.arange(0, BLOCK_V), tl.zeros([BLOCK_V], tl.float32), cache_modifier=".cs")
    for start in range(split * EDGE_V, V - body, n_splits * EDGE_V):
        cols = _edge(start, head, body, EDGE_V, PEEL)
        tl.store(dlogits_ptr + cols, tl.zeros([EDGE_V], tl.float32), mask=cols < V, cache_modifier=".cs")


@triton.jit
def _target(target_ptr, row, V, ignore_index):
    """Whether the row is live (not ignored), and its target column, -1 if that is out of range."""
    target = tl.load(target_ptr + row)
    in_range = (target >= 0) & (target < V)
    return target != ignore_index, tl.where(in_range, target, -1).to(tl.int32)


@triton.jit
def _target_u(row_ptr, target, wanted, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """u of the target; NaN if it is -1 or not wanted."""
    x = tl.load(row_ptr + target, mask=wanted & (target >= 0), other=float("nan"))
    return _lift(x, logit_scale, softcap, SOFTCAP)


@triton.jit
def _in_split(
    target, row_ptr, V, split, n_splits, PEEL: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Whether it is this split of the row that holds the target."""
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    in_body = (target >= head) & (target < head + body)
    edge = tl.where(target < head, target, target - body)
    return tl.where(in_body, (target - head) // BLOCK_V, edge // EDGE_V) % n_splits == split


@triton.jit(do_not_specialize=["inner", "N", "ignore_index"])
def split_sums_kernel(
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    split_sums_ptr,  # [3, N, n_splits] fp32
    stride_logits_outer, stride_logits_inner, inner, N, V, ignore_index, softcap, logit_scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What `_sweep` finds out about one split of one row a program. Ignored rows are not read."""
    row, split, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    if tl.load(target_ptr + row) != ignore_index:
        row_max, sum_exp, sum_u = _sweep(
            row_ptr, V, logit_scale, softcap, unit * tl.cast(LOG2_E, tl.float32), split, n_splits,
            SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    sums_ptr = split_sums_ptr + row * n_splits + split
    tl.store(sums_ptr, row_max)
    tl.store(sums_ptr + N * n_splits, sum_exp)
    tl.store(sums_ptr + 2 * N * n_splits, sum_u)


@triton.jit(do_not_specialize=["inner", "N", "ignore_index"])
def row_loss_kernel(
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    row_scale_ptr,  # [N] fp32
    param_ptr,  # [] fp32: log(threshold), or focal's gamma
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32
    split_sums_ptr,  # [3, N, N_SPLITS] fp32, or nothing if N_SPLITS is 1
    stride_logits_outer, stride_logits_inner, inner, N, V,
    ignore_index, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, N_SPLITS: tl.constexpr,
):  # fmt: skip
    """Loss and `rows` of one row a program, from one sweep or from what its splits found. Ignored rows are not read."""
    row = tl.program_id(0)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    scale = unit * tl.cast(LOG2_E, tl.float32)
    row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    live, target = _target(target_ptr, row, V, ignore_index)
    target_u = _target_u(row_ptr, target, live, logit_scale, softcap, SOFTCAP)
    row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    if N_SPLITS > 1:
        sums_ptr = split_sums_ptr + row * N_SPLITS + tl.arange(0, N_SPLITS)
        split_max = tl.load(sums_ptr)
        row_max = tl.max(split_max, 0)
        sum_exp = tl.sum(tl.load(sums_ptr + N * N_SPLITS) * tl.exp2((split_max - row_max) * scale), 0)
        sum_u = tl.sum(tl.load(sums_ptr + 2 * N * N_SPLITS), 0)
    elif live:
        row_max, sum_exp, sum_u = _sweep(
            row_ptr, V, logit_scale, softcap, scale, 0, 1,
            SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
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
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Gradient of one split of one row a program. Dropped rows, and rows with upstream gradient 0, are not read."""
    row, split, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = _row(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    dlogits_row_ptr = _row(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
    row_grad = tl.load(row_grad_ptr + row)
    coef = tl.load(rows_ptr + COEF * N + row)
    of_exp, of_target, of_ones = _row_gradient(
        row_grad, coef, tl.load(rows_ptr + LSE * N + row), tl.load(rows_ptr + SUM_EXP * N + row),
        z_loss, label_smoothing, logit_scale, V,
    )  # fmt: skip
    _, target = _target(target_ptr, row, V, -1)
    target = tl.where(_in_split(target, row_ptr, V, split, n_splits, PEEL, BLOCK_V, THREADS), target, -1)
    target_u = _target_u(row_ptr, target, True, logit_scale, softcap, SOFTCAP)
    tl.debug_barrier()  # the gradient may overwrite the target's logit: every thread has read it by now
    if (coef != 0.0) & (row_grad != 0.0):
        _write_gradient(
            dlogits_row_ptr, row_ptr, V, target, target_u, tl.load(rows_ptr + ROW_MAX * N + row),
            of_exp, of_target, of_ones, unit * tl.cast(LOG2_E, tl.float32), logit_scale, softcap, split, n_splits,
            SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    else:
        _write_zeros(dlogits_row_ptr, V, split, n_splits, PEEL, BLOCK_V, THREADS)


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
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, ONE_BLOCK: tl.constexpr,
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
        live, target = _target(target_ptr, row, V, ignore_index)
        target_u = _target_u(row_ptr, target, live, logit_scale, softcap, SOFTCAP)

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
            row_max, sum_exp, sum_u = _sweep(
                row_ptr, V, logit_scale, softcap, scale, 0, 1,
                SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
            )  # fmt: skip
        lse, coef = _store_row(
            loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, row_scale,
            tl.load(param_ptr), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING,
        )  # fmt: skip

        of_exp, of_target, of_ones = _row_gradient(
            row_scale, coef, lse, sum_exp, z_loss, label_smoothing, logit_scale, V
        )
        kept = coef != 0.0
        if ONE_BLOCK:
            gradient = _gradient((u - row_max) * scale, u, of_exp, of_ones, SOFTCAP, SMOOTHING)
            gradient = tl.where(kept, gradient, 0.0)
            written = kept | (fill != 0)
            tl.store(dlogits_row_ptr + cols, gradient, mask=cols < tl.where(written, V, 0), cache_modifier=".cs")
            _write_target(dlogits_row_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, kept, SOFTCAP)
        elif kept:
            _write_gradient(
                dlogits_row_ptr, row_ptr, V, target, target_u, row_max, of_exp, of_target, of_ones, scale,
                logit_scale, softcap, 0, 1, SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
            )  # fmt: skip
        elif fill != 0:
            _write_zeros(dlogits_row_ptr, V, 0, 1, PEEL, BLOCK_V, THREADS)


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


WARP = 32  # threads
LOGITS_PER_THREAD = 32
COPY_V, COPY_WARPS = 4096, 4


def serves(device):
    """Whether the kernels run on tensors of this device: a GPU, or what Triton's interpreter or driver stands for."""
    if device.type == "cuda" or not isinstance(row_loss_kernel, triton.JITFunction):
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # no driver at all
        return False


def _launch_options(n_warps):
    """Compiler options. Fusion is pinned because Triton 3.10 turns it off by default."""
    if torch.version.hip:  # warps of 64 threads
        return {"num_warps": n_warps // 2, "enable_fp_fusion": True}
    # What 512 threads can have: left alone, ptxas aims at fewer and spills to get there.
    return {"num_warps": n_warps, "enable_fp_fusion": True, "maxnreg": 128}


def _device_figures(device):
    """Multiprocessors, and bytes of the cache that they share."""
    if device.type != "cuda":  # the interpreter: so small that splits, and programs that take several rows, come up
        return 2, 2**18
    properties = torch.cuda.get_device_properties(device)
    # AMD's compute units share the Infinity Cache (256 MB on MI300), which torch does not report.
    return properties.multi_processor_count, 256 * 2**20 if torch.version.hip else properties.L2_cache_size


def _rows_in_flight(logits):
    """Rows that three quarters of the cache hold at once, so that the second read of a row hits."""
    _, cache_bytes = _device_figures(logits.device)
    return cache_bytes * 3 // 4 // (logits.shape[2] * logits.element_size())


def _n_warps(logits):
    """Warps a row: as few as keep memory busy, since a row's reductions cost the same however many logits they sum up.

    Each thread has LOGITS_PER_THREAD logits on their way at a time: 64 bytes of a 16-bit type, 2 KB a warp. A
    multiprocessor of an H100 is due 14.5 bytes a cycle, which take about 1000 cycles to come: 8 warps or so have to ask
    for them, in all the rows that are in flight there. That is 2 warps a row at V = 32000, 4 at 50257, 8 at 128256
    and 151936 and 16 at 262144, on an A100 too.
    """
    rows_per_multiprocessor = _rows_in_flight(logits) / _device_figures(logits.device)[0]
    return next((n for n in (2, 4, 8) if n * rows_per_multiprocessor >= 7.5), 16)


def _n_programs(logits):
    """Programs of `loss_and_dlogits_kernel`: the rows in flight, the same number on every multiprocessor."""
    outer, inner, _ = logits.shape
    n_multiprocessors, _ = _device_figures(logits.device)
    rows = max(_rows_in_flight(logits), 1)
    if rows > n_multiprocessors:
        rows -= rows % n_multiprocessors
    return min(outer * inner, rows, n_multiprocessors * 64 // _n_warps(logits))


def _n_splits(logits):
    """Programs that share a row, a power of two: more than one where there are fewer rows than multiprocessors."""
    outer, inner, V = logits.shape
    n_multiprocessors, _ = _device_figures(logits.device)
    if outer * inner >= n_multiprocessors:
        return 1
    most = min(2 * n_multiprocessors // (outer * inner), V // (WARP * _n_warps(logits) * LOGITS_PER_THREAD))
    return 2 ** (max(most, 1).bit_length() - 1)


def _strides(rows):
    """Strides of the two row dimensions; 0 where there is a single row, whose stride says nothing about alignment."""
    return [stride if size > 1 else 0 for stride, size in zip(rows.stride()[:2], rows.shape[:2], strict=True)]


def _blocks(*tensors):
    """Constexprs and compiler options: how to read and write the rows of [outer, inner, V] tensors used side by side.

    16 bytes at a time. Triton does so by itself where it can prove that rows are aligned: pointer and strides are
    multiples of 16. Other rows are peeled, if all tensors are off the 16-byte boundaries by the same bytes. What is
    left goes one by one, in smaller blocks, since every address then takes registers of its own.
    """
    V, item = tensors[0].shape[2], tensors[0].element_size()
    starts = [(tensor.data_ptr(), *_strides(tensor)) for tensor in tensors]
    offsets = {(ptr % 16, outer * item % 16, inner * item % 16) for ptr, outer, inner in starts}
    provable = all(number % 16 == 0 for start in starts for number in start)
    n_warps = _n_warps(tensors[0])
    block = WARP * n_warps * LOGITS_PER_THREAD
    wide = provable or len(offsets) == 1 and V > block
    return {
        "PEEL": wide and not provable,
        "VECTOR": 16 // item if wide else 1,
        "BLOCK_V": block if wide else block // 4,
        "THREADS": WARP * n_warps,
        **_launch_options(n_warps),
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
        n_splits = _n_splits(logits)
        split_sums = torch.empty(3 * N * n_splits if n_splits > 1 else 0, dtype=torch.float32, device=logits.device)
        options = {**_blocks(logits), **_flags(softcap, label_smoothing)}
        with _device(logits):
            if n_splits > 1:
                split_sums_kernel[(N, n_splits)](
                    logits, target, split_sums, *_strides(logits), inner, N, V,
                    ignore_index, softcap or 1.0, logit_scale, **options,
                )  # fmt: skip
            row_loss_kernel[(N,)](
                logits, target, row_scale, param, loss, rows, split_sums, *_strides(logits), inner, N, V,
                ignore_index, alpha, z_loss, label_smoothing, softcap or 1.0, logit_scale,
                RULE=rule, N_SPLITS=n_splits, **options,
            )  # fmt: skip
    return loss, rows


def dlogits(logits, target, row_grad, rows, out, *, z_loss, label_smoothing, softcap, logit_scale):
    """Write the gradient for row_grad [N] = upstream gradient * row_scale to out, which may be the logits."""
    outer, inner, V = logits.shape
    N = outer * inner
    if N:
        with _device(logits):
            dlogits_kernel[(N, _n_splits(logits))](
                out, logits, target, row_grad, rows, *_strides(out), *_strides(logits), inner, N, V,
                z_loss, label_smoothing, softcap or 1.0, logit_scale,
                **_blocks(logits, out), **_flags(softcap, label_smoothing),
            )  # fmt: skip


def loss_and_dlogits(
    logits, target, row_scale, param, out, *,
    rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale, fill=True,
):  # fmt: skip
    """`row_loss`, and `dlogits` for an upstream gradient of 1, in one launch if there are rows enough for that.

    Without `fill` the dropped rows of `out` may stay as they were; with it they become zeros.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    common = dict(z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale)
    if N and _n_splits(logits) > 1 and N <= _rows_in_flight(logits):
        loss, rows = row_loss(
            logits, target, row_scale, param, rule=rule, alpha=alpha, ignore_index=ignore_index, **common
        )
        dlogits(logits, target, row_scale, rows, out, **common)
        return loss, rows
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    rows = torch.empty(stats.N_FIELDS, N, dtype=torch.float32, device=logits.device)
    if N:
        options = _blocks(logits, out)
        with _device(logits):
            loss_and_dlogits_kernel[(_n_programs(logits),)](
                out, logits, target, row_scale, param, loss, rows, *_strides(out), *_strides(logits), inner, N, V,
                ignore_index, int(fill), alpha, z_loss, label_smoothing, softcap or 1.0, logit_scale,
                RULE=rule, ONE_BLOCK=V <= options["BLOCK_V"],
                **options, **_flags(softcap, label_smoothing),
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
        move_rows_kernel[(K,)](logits, source, logits.stride(1), BLOCK_V=COPY_V, **_launch_options(COPY_WARPS))
    return loss, rows, source


def scale_(dlogits, factor):
    """dlogits [outer, inner, V] *= factor []; device memory is not touched if the factor is 1."""
    outer, inner, V = dlogits.shape
    if outer * inner:
        with _device(dlogits):
            scale_kernel[(outer * inner,)](
                dlogits, factor, *_strides(dlogits), inner, V, BLOCK_V=COPY_V, **_launch_options(COPY_WARPS)
            )


def _device(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)
