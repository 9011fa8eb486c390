"""Triton code for one row of logits, of which the kernels are made.

Every loss here sees a row of logits only through s = log p_t and lse = logsumexp(z), so its gradient is

    dz[j] = row_scale * ((coef + 2 z_loss lse) softmax(z)[j] - coef [j == target]),   coef = -dphi / ds.

A row costs two sweeps: the first finds its maximum and sum of exponentials, the second writes the gradient.
Logits enter as u, with z = unit * u: u = x and unit = logit_scale, or, under a softcap,
u = tanh(logit_scale x / softcap) and unit = softcap. exp(z - max z) is then exp2((u - max u) * unit log2(e)) in
both cases, and a logit scale costs nothing per logit.

The entropy, where it is asked for, comes from the first sweep as well: with exponents e = (z - max z) log2(e), sum S of
2^e and sum M of e 2^e it is ln S - ln 2 M / S. No term of these sums, and no step to a new maximum, changes sign, so
nothing cancels. What has no probability, logits of -inf among it, adds 0.
"""

import triton
import triton.language as tl

from . import stats

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-150.0)  # exponents below it are as good as it: 2 to their power is 0 in float32
LOWEST = tl.constexpr(-3.4028234663852886e38)
TINY = tl.constexpr(1e-37)
HUGE = tl.constexpr(2.0**31)
SIGN_BIT = tl.constexpr(-(2**31))
NEAR_ZERO = tl.constexpr(0.55)
VECTOR_BYTES = tl.constexpr(16)
EDGE_LOGITS_PER_THREAD = tl.constexpr(8)  # of masked blocks, so that little of them is wasted

LOG_PROB, LSE, COEF = tl.constexpr(stats.LOG_PROB), tl.constexpr(stats.LSE), tl.constexpr(stats.COEF)
ROW_MAX, SUM_EXP, CORRECT = tl.constexpr(stats.ROW_MAX), tl.constexpr(stats.SUM_EXP), tl.constexpr(stats.CORRECT)
ROW_ENTROPY = tl.constexpr(stats.ROW_ENTROPY)
SHARD_MAX, SHARD_SUM_EXP = tl.constexpr(stats.SHARD_MAX), tl.constexpr(stats.SHARD_SUM_EXP)
SHARD_TARGET, SHARD_SUM = tl.constexpr(stats.SHARD_TARGET), tl.constexpr(stats.SHARD_SUM)


@triton.jit
def row_pointer(ptr, row, inner, stride_outer, stride_inner):
    """Pointer to a row of an [outer, inner, V] tensor, with 64-bit offsets (the division stays in 32 bits)."""
    outer = tl.cast(row // inner, tl.int64)
    return ptr + outer * stride_outer + tl.cast(row % inner, tl.int64) * stride_inner


@triton.jit
def lift(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Logit x as stored -> u in float32, with z = unit * u."""
    u = x.to(tl.float32)
    if SOFTCAP:
        # tanh, which tl has not: within a few eps relative to itself, exact at both infinities; NaN passes. Fusion is
        # spelled out, so that the target's u has the same bits as among the row's others.
        y = u * tl.div_rn(tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32))
        far = tl.fma(1.0 / (1.0 + tl.exp2(tl.abs(y) * (2.0 * LOG2_E))), -2.0, 1.0)
        sign = y.to(tl.int32, bitcast=True) & SIGN_BIT
        far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        # Next to 0 that cancels, and unit would bring the error to light. There y + y^3 Q(y^2), with the cubic Q of
        # the least relative error, 4e-8, up to NEAR_ZERO.
        w = y * y
        q = tl.fma(tl.fma(tl.fma(w, 0.016437582, -0.052671814), w, 0.13320725), w, -0.33332947)
        u = tl.where(tl.abs(y) < NEAR_ZERO, tl.fma(q * w, y, y), far)
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
        # By way of an integer: on AMD what is known of a sum of pointer and offset is forgotten.
        address = ptr.to(tl.int64, bitcast=True) & -VECTOR_BYTES
        ptr = tl.multiple_of(address.to(row_ptr.dtype, bitcast=True), VECTOR_BYTES)
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
    """What is subtracted from u * scale in one fused operation: the largest product, unless it is below -HUGE."""
    return tl.maximum(max_u * scale, -HUGE)


@triton.jit
def _fused(scale, row_max):
    """(scale, pivot) for exponents u * scale - pivot <= 0 in one fused operation, right for every maximum.

    Beyond HUGE the product's rounding is out of exp2's reach. The other logits are then at least 2^-24 of the maximum
    behind, out of reach as well, and stay so with the power of two that brings it to 2^30, which rounds no product.
    """
    power_of_two = (~row_max.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**29
    scale = tl.where(tl.abs(row_max * scale) < HUGE, scale, power_of_two)
    return scale, row_max * scale


@triton.jit
def moment_of(exponent, exp):
    """exponent exp, with exp = 2^exponent; 0 where that is 0. NaN of the exponent is in exp as well."""
    return tl.maximum(exponent, LEAST) * exp


@triton.jit
def _moved(moment, sum_exp, step):
    """Sum of (e + step) 2^e, from those of e 2^e and 2^e; its factor 2^step is the caller's."""
    return tl.fma(tl.maximum(step, LEAST), sum_exp, moment)


@triton.jit
def entropy_of(sum_exp, mean):
    """Entropy of the distribution with this sum of 2^e and this mean of e. NaN passes."""
    entropy = tl.log(sum_exp) - mean * LN_2
    return tl.where(entropy < 0.0, 0.0, entropy)


@triton.jit
def _accumulate(
    max_u, sum_exp, sum_u, moment, u, mask, scale,
    FITS: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Take one block of u into the maxima and sums [THREADS], one a thread, so that none waits for another."""
    parts: tl.constexpr = (u.shape[0] // (max_u.shape[0] * VECTOR), max_u.shape[0], VECTOR)
    new_max = tl.maximum(max_u, tl.max(tl.max(tl.reshape(u, parts), 2), 0))
    if FITS:
        pivot = _pivot(new_max, scale)
        exponents = tl.fma(tl.reshape(u, parts), scale, -pivot[None, :, None])
        exps = tl.exp2(exponents)
        step = _pivot(max_u, scale) - pivot
    else:
        exponents = (tl.reshape(u, parts) - new_max[None, :, None]) * scale
        exps = tl.exp2(exponents)
        step = (max_u - new_max) * scale
    if ENTROPY:
        moment = _moved(moment, sum_exp, step) * tl.exp2(step)
        moment += tl.sum(tl.sum(moment_of(exponents, exps), 2), 0)
    sum_exp *= tl.exp2(step)
    sum_exp += tl.sum(tl.sum(exps, 2), 0)
    if SMOOTHING:
        sum_u += tl.sum(tl.sum(tl.reshape(tl.where(mask, u, 0.0), parts), 2), 0)
    return new_max, sum_exp, sum_u, moment


@triton.jit
def sum_of_products(x, y):
    """The same in every lane: the compiler would fuse a product with the first addition, which lanes do in turn."""
    return tl.sum(tl.fma(x, y, tl.zeros_like(x)), 0)


@triton.jit
def _sweep(
    row_ptr, V, logit_scale, softcap, scale, split, n_splits,
    FITS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """`sweep` for a maximum that fits, or of which the result shows that it does not; otherwise for any maximum."""
    # A finite start: nothing becomes NaN where a whole block is -inf, and a whole row of -inf still does.
    max_u = tl.full([THREADS], LOWEST, tl.float32)
    sum_exp = tl.zeros([THREADS], tl.float32)
    sum_u = tl.zeros([THREADS], tl.float32)
    moment = tl.zeros([THREADS], tl.float32)
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    for start in range(split * BLOCK_V, body, n_splits * BLOCK_V):
        # The row is wanted again for the gradient: let it stay in L2.
        u = lift(_load(body_ptr + start, "evict_last", VECTOR, BLOCK_V), logit_scale, softcap, SOFTCAP)
        max_u, sum_exp, sum_u, moment = _accumulate(
            max_u, sum_exp, sum_u, moment, u, True, scale, FITS, SMOOTHING, ENTROPY, VECTOR
        )
    for start in range(split * EDGE_V, V - body, n_splits * EDGE_V):
        cols = _edge(start, head, body, EDGE_V, PEEL)
        mask = cols < V
        x = tl.load(row_ptr + cols, mask=mask, other=-float("inf"), eviction_policy="evict_last")
        u = lift(x, logit_scale, softcap, SOFTCAP)
        if SOFTCAP:
            u = tl.where(mask, u, -float("inf"))
        max_u, sum_exp, sum_u, moment = _accumulate(
            max_u, sum_exp, sum_u, moment, u, mask, scale, FITS, SMOOTHING, ENTROPY, 1 if PEEL else VECTOR
        )
    row_max = tl.max(max_u, 0)
    if FITS:
        pivot = _pivot(row_max, scale)
        step = _pivot(max_u, scale) - pivot
    else:
        step = (max_u - row_max) * scale
    entropy = 0.0
    if ENTROPY:
        row_moment = sum_of_products(_moved(moment, sum_exp, step), tl.exp2(step))
    sum_exp = sum_of_products(sum_exp, tl.exp2(step))
    if ENTROPY:
        mean = row_moment / sum_exp
    if FITS:
        # From the rounded pivot to the maximum; exactly 1 if that is all there is.
        rounding = tl.fma(row_max, scale, -pivot)
        sum_exp = tl.div_rn(sum_exp, tl.exp2(rounding))
        if ENTROPY:
            mean -= rounding
    if ENTROPY:
        entropy = entropy_of(sum_exp, mean)
    if SMOOTHING:
        row_sum = tl.sum(sum_u, 0)
    else:
        row_sum = 0.0
    return row_max, sum_exp, row_sum, entropy


@triton.jit
def sweep(
    row_ptr, V, logit_scale, softcap, scale, split, n_splits,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Maximum of u, sum of exp2((u - maximum) scale), sum of u (label smoothing only) and entropy (ENTROPY only) of one
    split of a row.

    The sum is 0, the entropy NaN and the maximum LOWEST where there is no column, or nothing but -inf.
    """
    row_max, sum_exp, sum_u, entropy = _sweep(
        row_ptr, V, logit_scale, softcap, scale, split, n_splits, True,
        SOFTCAP, SMOOTHING, ENTROPY, PEEL, VECTOR, BLOCK_V, THREADS,
    )  # fmt: skip
    if tl.abs(row_max * scale) >= HUGE:  # the fused product's rounding is out of exp2's reach
        row_max, sum_exp, sum_u, entropy = _sweep(
            row_ptr, V, logit_scale, softcap, scale, split, n_splits, False,
            SOFTCAP, SMOOTHING, ENTROPY, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    return row_max, sum_exp, sum_u, entropy


@triton.jit
def store_row(
    loss_ptr, rows_ptr, row, N, n_classes, target_u, row_max, sum_exp, sum_u, live, row_scale,
    param, alpha, z_loss, label_smoothing, unit, RULE: tl.constexpr, SMOOTHING: tl.constexpr,
    entropy=0.0, ENTROPY: tl.constexpr = False,
):  # fmt: skip
    """Apply the rule to one row and store its loss and its `rows`; zeros if it is not live (ignored)."""
    N = tl.cast(N, tl.int64)  # the last fields are up to 5 N away
    log_sum = tl.log(sum_exp)
    lse = unit * row_max + log_sum
    log_prob = unit * (target_u - row_max) - log_sum
    # Rounding above 0 must not drop a row at threshold 1. NaN passes.
    log_prob = tl.where(log_prob > 0.0, 0.0, log_prob)
    phi, coef = _rule(log_prob, param, alpha, RULE)
    # A NaN row, or a target out of range, is NaN in the gradient too.
    coef = tl.where(log_prob == log_prob, coef, log_prob)
    if SMOOTHING:
        uniform = unit * (row_max - sum_u / n_classes) + log_sum  # lse - mean(z)
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
    if ENTROPY:
        tl.store(rows_ptr + ROW_ENTROPY * N + row, tl.where(live, entropy, 0.0))
    return lse, coef


@triton.jit
def row_gradient(row_grad, coef, lse, sum_exp, z_loss, label_smoothing, logit_scale, n_classes):
    """Factors of exp2((u - max u) scale), of the target's one-hot and of ones in the row's gradient."""
    row_grad *= logit_scale
    return (
        row_grad * (coef + 2.0 * z_loss * lse) / sum_exp,
        row_grad * coef * (1.0 - label_smoothing),
        row_grad * coef * label_smoothing / n_classes,
    )


@triton.jit
def gradient_of(exponent, u, of_exp, of_ones, SOFTCAP: tl.constexpr, ONES: tl.constexpr):
    """Gradient with respect to the logits as stored; the only place with the formula."""
    gradient = of_exp * tl.exp2(exponent)
    if ONES:
        gradient -= of_ones
    if SOFTCAP:
        gradient *= 1.0 - u * u
    return gradient


@triton.jit
def write_target(
    dlogits_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, mask, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the target's logit over that of any other, which the row's threads have left there."""
    tl.debug_barrier()
    gradient = gradient_of((target_u - row_max) * scale, target_u, of_exp, of_target + of_ones, SOFTCAP, True)
    tl.store(dlogits_ptr + target, gradient, mask=mask & (target >= 0))


@triton.jit
def write_gradient(
    dlogits_ptr, row_ptr, V, target, target_u, row_max, of_exp, of_target, of_ones, scale, logit_scale, softcap,
    split, n_splits, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one split of a row."""
    fused_scale, pivot = _fused(scale, row_max)
    of_fused_exp = of_exp * tl.exp2(tl.fma(row_max, -fused_scale, pivot))  # from the maximum to the rounded pivot
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    body_ptr = _body(row_ptr, head, PEEL)
    body_dlogits_ptr = _body(dlogits_ptr, head, PEEL)
    for start in range(split * BLOCK_V, body, n_splits * BLOCK_V):
        u = lift(_load(body_ptr + start, "evict_first", VECTOR, BLOCK_V), logit_scale, softcap, SOFTCAP)
        gradient = gradient_of(tl.fma(u, fused_scale, -pivot), u, of_fused_exp, of_ones, SOFTCAP, SMOOTHING)
        # Streaming stores leave the L2 to the logits of the rows in flight.
        tl.store(body_dlogits_ptr + start + tl.arange(0, BLOCK_V), gradient, cache_modifier=".cs")
    for start in range(split * EDGE_V, V - body, n_splits * EDGE_V):
        cols = _edge(start, head, body, EDGE_V, PEEL)
        mask = cols < V
        x = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        u = lift(x, logit_scale, softcap, SOFTCAP)
        gradient = gradient_of(tl.fma(u, fused_scale, -pivot), u, of_fused_exp, of_ones, SOFTCAP, SMOOTHING)
        tl.store(dlogits_ptr + cols, gradient, mask=mask, cache_modifier=".cs")
    write_target(dlogits_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, True, SOFTCAP)


@triton.jit
def write_zeros(
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
def load_number(number):
    """In float32 a number that was given by value or, where only the device knows it, in memory."""
    number = tl.to_tensor(number)  # the interpreter leaves numbers as they are
    if number.dtype.is_ptr():
        number = tl.load(number)
    return tl.cast(number, tl.float32)


@triton.jit
def load_target(target_ptr, row, V, ignore_index):
    """Whether the row is live (not ignored), and its target column, -1 if that is out of range."""
    target = tl.load(target_ptr + row)
    in_range = (target >= 0) & (target < V)
    return target != ignore_index, tl.where(in_range, target, -1).to(tl.int32)


@triton.jit
def load_target_u(row_ptr, target, wanted, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """u of the target; NaN if it is -1 or not wanted."""
    x = tl.load(row_ptr + target, mask=wanted & (target >= 0), other=float("nan"))
    return lift(x, logit_scale, softcap, SOFTCAP)


@triton.jit
def in_split(
    target, row_ptr, V, split, n_splits, PEEL: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Whether it is this split of the row that holds the target."""
    EDGE_V: tl.constexpr = EDGE_LOGITS_PER_THREAD * THREADS
    head, body = _peel(row_ptr, V, BLOCK_V, PEEL)
    in_body = (target >= head) & (target < head + body)
    edge = tl.where(target < head, target, target - body)
    return tl.where(in_body, (target - head) // BLOCK_V, edge // EDGE_V) % n_splits == split
