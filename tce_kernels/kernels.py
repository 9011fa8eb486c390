"""Triton kernels.

Bytes of device memory per b-byte logit: `row_loss_kernel` b, or `split_sums_kernel` in its place;
`loss_and_dlogits_kernel` 2 b (kept rows are read again, but from registers or from L2; 3 b where the L2 holds next to
none), `dlogits_kernel` 2 b for kept rows and b for dropped ones, written but not read.
"""

import triton
import triton.language as tl

from .sweeps import (
    COEF,
    LEAST,
    LOG2_E,
    LOWEST,
    LSE,
    ROW_MAX,
    SHARD_MAX,
    SHARD_SUM,
    SHARD_SUM_EXP,
    SHARD_TARGET,
    SUM_EXP,
    entropy_of,
    gradient_of,
    in_split,
    lift,
    load_number,
    load_target,
    load_target_u,
    row_gradient,
    row_pointer,
    store_row,
    sum_of_products,
    sweep,
    write_gradient,
    write_target,
    write_zeros,
)


@triton.jit(do_not_specialize=["inner", "N", "ignore_index"])
def split_sums_kernel(
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    sums_ptr,  # [n_splits, F, N] fp32, F = 3 + SMOOTHING + ENTROPY
    stride_logits_outer, stride_logits_inner, inner, N, V, ignore_index, softcap, logit_scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, ENTROPY: tl.constexpr = False,
):  # fmt: skip
    """What `sweep` finds out about one split of one row a program; the first one's has the target's u as well.

    Ignored rows are not read.
    """
    row, split, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = row_pointer(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    live, target = load_target(target_ptr, row, V, ignore_index)
    target_u = load_target_u(row_ptr, target, live & (split == 0), logit_scale, softcap, SOFTCAP)
    row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    entropy = tl.cast(0.0, tl.float32)
    if live:
        row_max, sum_exp, sum_u, entropy = sweep(
            row_ptr, V, logit_scale, softcap, unit * tl.cast(LOG2_E, tl.float32), split, n_splits,
            SOFTCAP, SMOOTHING, ENTROPY, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    N = tl.cast(N, tl.int64)
    F: tl.constexpr = 3 + SMOOTHING + ENTROPY
    sums_ptr += split * F * N + row
    tl.store(sums_ptr + SHARD_MAX * N, row_max)
    tl.store(sums_ptr + SHARD_SUM_EXP * N, sum_exp)
    tl.store(sums_ptr + SHARD_TARGET * N, target_u)
    if SMOOTHING:
        tl.store(sums_ptr + SHARD_SUM * N, sum_u)
    if ENTROPY:
        tl.store(sums_ptr + (F - 1) * N, entropy)


@triton.jit(do_not_specialize=["N", "n_splits", "n_classes", "ignore_index"])
def row_loss_of_sums_kernel(
    sums_ptr,  # [n_splits, F, N] fp32, from split_sums: of splits, or of the ranks that share the classes
    target_ptr,  # [N], of which only ignore_index says something
    row_scale_ptr,  # [N] fp32
    param,  # log(threshold), or focal's gamma: fp32, or a pointer to it
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32; [7, N] with ENTROPY
    N, n_splits,
    n_classes,  # of the whole row: a number, or a pointer to it
    ignore_index, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, ENTROPY: tl.constexpr = False,
):  # fmt: skip
    """Loss and `rows` of one row a program, as from `row_loss_kernel`; a target that is in no split is NaN."""
    row = tl.program_id(0)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    scale = unit * tl.cast(LOG2_E, tl.float32)
    splits = tl.arange(0, BLOCK_SPLITS)
    mask = splits < n_splits
    N = tl.cast(N, tl.int64)
    F: tl.constexpr = 3 + SMOOTHING + ENTROPY
    sums_ptr += splits * F * N + row
    split_max = tl.load(sums_ptr + SHARD_MAX * N, mask=mask, other=LOWEST)
    row_max = tl.max(split_max, 0)
    split_sum_exp = tl.load(sums_ptr + SHARD_SUM_EXP * N, mask=mask, other=0.0)
    split_exp = tl.exp2((split_max - row_max) * scale)
    sum_exp = sum_of_products(split_sum_exp, split_exp)
    split_u = tl.load(sums_ptr + SHARD_TARGET * N, mask=mask, other=float("nan"))
    known = split_u == split_u
    target_u = tl.max(tl.where(known, split_u, -float("inf")), 0)
    target_u = tl.where(tl.max(known.to(tl.int32), 0) > 0, target_u, float("nan"))
    sum_u = 0.0
    if SMOOTHING:
        sum_u = tl.sum(tl.load(sums_ptr + SHARD_SUM * N, mask=mask, other=0.0), 0)
    entropy = 0.0
    if ENTROPY:  # of the splits, each times its share of the row, and of the shares
        share = split_sum_exp * split_exp / sum_exp
        entropy = tl.load(sums_ptr + (F - 1) * N, mask=mask, other=0.0) - tl.log(share)
        entropy = sum_of_products(share, tl.where(share == 0.0, 0.0, entropy))
    store_row(
        loss_ptr, rows_ptr, row, N, load_number(n_classes), target_u, row_max, sum_exp, sum_u,
        tl.load(target_ptr + row) != ignore_index, tl.load(row_scale_ptr + row),
        load_number(param), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING, entropy, ENTROPY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "N", "ignore_index"])
def row_loss_kernel(
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    row_scale_ptr,  # [N] fp32
    param,  # log(threshold), or focal's gamma: fp32, or a pointer to it
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32; [7, N] with ENTROPY
    stride_logits_outer, stride_logits_inner, inner, N, V,
    ignore_index, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, ENTROPY: tl.constexpr = False,
):  # fmt: skip
    """Loss and `rows` of one row a program, from one sweep. Ignored rows are not read."""
    row = tl.program_id(0)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = row_pointer(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    live, target = load_target(target_ptr, row, V, ignore_index)
    target_u = load_target_u(row_ptr, target, live, logit_scale, softcap, SOFTCAP)
    row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
    entropy = tl.cast(0.0, tl.float32)
    if live:
        row_max, sum_exp, sum_u, entropy = sweep(
            row_ptr, V, logit_scale, softcap, unit * tl.cast(LOG2_E, tl.float32), 0, 1,
            SOFTCAP, SMOOTHING, ENTROPY, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    store_row(
        loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, tl.load(row_scale_ptr + row),
        load_number(param), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING, entropy, ENTROPY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "N", "n_classes"])
def dlogits_kernel(
    dlogits_ptr,  # [outer, inner, V]; may be logits
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N]; elsewhere if out of range
    row_grad_ptr,  # [N] fp32: upstream gradient * row_scale
    rows_ptr,  # [6, N] fp32, from row_loss
    stride_dlogits_outer, stride_dlogits_inner, stride_logits_outer, stride_logits_inner, inner, N, V,
    n_classes,  # of the whole row, of which V may be a part: a number, or a pointer to it
    z_loss, label_smoothing, softcap, logit_scale,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Gradient of one split of one row a program. Dropped rows, and rows with upstream gradient 0, are not read."""
    row, split, n_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    row_ptr = row_pointer(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
    dlogits_row_ptr = row_pointer(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
    row_grad = tl.load(row_grad_ptr + row)
    N = tl.cast(N, tl.int64)  # the last fields are up to 5 N away
    coef = tl.load(rows_ptr + COEF * N + row)
    of_exp, of_target, of_ones = row_gradient(
        row_grad, coef, tl.load(rows_ptr + LSE * N + row), tl.load(rows_ptr + SUM_EXP * N + row),
        z_loss, label_smoothing, logit_scale, load_number(n_classes),
    )  # fmt: skip
    _, target = load_target(target_ptr, row, V, -1)
    target = tl.where(in_split(target, row_ptr, V, split, n_splits, PEEL, BLOCK_V, THREADS), target, -1)
    target_u = load_target_u(row_ptr, target, True, logit_scale, softcap, SOFTCAP)
    tl.debug_barrier()  # the gradient may overwrite the target's logit: every thread has read it by now
    if (coef != 0.0) & (row_grad != 0.0):
        write_gradient(
            dlogits_row_ptr, row_ptr, V, target, target_u, tl.load(rows_ptr + ROW_MAX * N + row),
            of_exp, of_target, of_ones, unit * tl.cast(LOG2_E, tl.float32), logit_scale, softcap, split, n_splits,
            SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
        )  # fmt: skip
    else:
        write_zeros(dlogits_row_ptr, V, split, n_splits, PEEL, BLOCK_V, THREADS)


@triton.jit(do_not_specialize=["inner", "N", "ignore_index", "fill"])
def loss_and_dlogits_kernel(
    dlogits_ptr,  # [outer, inner, V]; may be logits
    logits_ptr,  # [outer, inner, V]
    target_ptr,  # [N], N = outer * inner
    row_scale_ptr,  # [N] fp32
    param,  # log(threshold), or focal's gamma: fp32, or a pointer to it
    loss_ptr,  # [N] fp32
    rows_ptr,  # [6, N] fp32; [7, N] with ENTROPY
    stride_dlogits_outer, stride_dlogits_inner, stride_logits_outer, stride_logits_inner, inner, N, V,
    ignore_index, fill, alpha, z_loss, label_smoothing, softcap, logit_scale,
    RULE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PEEL: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, ONE_BLOCK: tl.constexpr, ENTROPY: tl.constexpr = False,
):  # fmt: skip
    """Both of the above for an upstream gradient of 1; each program takes every num_programs-th row.

    A kept row is read a second time, from L2; with ONE_BLOCK (V <= BLOCK_V) it stays in registers instead. Dropped
    rows are filled with zeros, or not written if `fill` is 0.
    """
    unit = tl.cast(softcap if SOFTCAP else logit_scale, tl.float32)
    scale = unit * tl.cast(LOG2_E, tl.float32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        row_ptr = row_pointer(logits_ptr, row, inner, stride_logits_outer, stride_logits_inner)
        dlogits_row_ptr = row_pointer(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
        row_scale = tl.load(row_scale_ptr + row)
        live, target = load_target(target_ptr, row, V, ignore_index)
        target_u = load_target_u(row_ptr, target, live, logit_scale, softcap, SOFTCAP)

        row_max, sum_exp, sum_u = tl.cast(0.0, tl.float32), tl.cast(1.0, tl.float32), tl.cast(0.0, tl.float32)
        entropy = tl.cast(0.0, tl.float32)
        if ONE_BLOCK:
            cols = tl.arange(0, BLOCK_V)
            mask = cols < V
            x = tl.load(row_ptr + cols, mask=cols < tl.where(live, V, 0), other=-float("inf"))
            u = tl.where(mask, lift(x, logit_scale, softcap, SOFTCAP), -float("inf"))
            row_max = tl.maximum(tl.max(u, 0), tl.cast(LOWEST, tl.float32))
            exps = tl.exp2((u - row_max) * scale)
            sum_exp = tl.sum(exps, 0)
            if SMOOTHING:
                sum_u = tl.sum(tl.where(mask, u, 0.0), 0)
            if ENTROPY:
                moment = sum_of_products(tl.maximum((u - row_max) * scale, LEAST), exps)
                entropy = entropy_of(sum_exp, moment / sum_exp)
        elif live:
            row_max, sum_exp, sum_u, entropy = sweep(
                row_ptr, V, logit_scale, softcap, scale, 0, 1,
                SOFTCAP, SMOOTHING, ENTROPY, PEEL, VECTOR, BLOCK_V, THREADS,
            )  # fmt: skip
        lse, coef = store_row(
            loss_ptr, rows_ptr, row, N, V, target_u, row_max, sum_exp, sum_u, live, row_scale,
            load_number(param), alpha, z_loss, label_smoothing, unit, RULE, SMOOTHING, entropy, ENTROPY,
        )  # fmt: skip

        of_exp, of_target, of_ones = row_gradient(
            row_scale, coef, lse, sum_exp, z_loss, label_smoothing, logit_scale, V
        )
        kept = coef != 0.0
        tl.debug_barrier()  # the gradient may overwrite the logits: every thread has read them by now
        if ONE_BLOCK:
            gradient = gradient_of((u - row_max) * scale, u, of_exp, of_ones, SOFTCAP, SMOOTHING)
            gradient = tl.where(kept, gradient, 0.0)
            written = kept | (fill != 0)
            tl.store(dlogits_row_ptr + cols, gradient, mask=cols < tl.where(written, V, 0), cache_modifier=".cs")
            write_target(dlogits_row_ptr, target, target_u, row_max, of_exp, of_target, of_ones, scale, kept, SOFTCAP)
        elif kept:
            write_gradient(
                dlogits_row_ptr, row_ptr, V, target, target_u, row_max, of_exp, of_target, of_ones, scale,
                logit_scale, softcap, 0, 1, SOFTCAP, SMOOTHING, PEEL, VECTOR, BLOCK_V, THREADS,
            )  # fmt: skip
        elif fill != 0:
            write_zeros(dlogits_row_ptr, V, 0, 1, PEEL, BLOCK_V, THREADS)


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
        row_ptr = row_pointer(dlogits_ptr, row, inner, stride_dlogits_outer, stride_dlogits_inner)
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


@triton.jit(do_not_specialize=["n"])
def class_sums_kernel(
    dlogits_ptr,  # [n, V]
    signs_ptr,  # [n] int8
    sums_ptr,  # [n_parts, 2, V] fp32
    stride_dlogits_n, n, V,
    N_ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_V classes over N_ROWS rows a program: over those of sign 1, and those of sign -1. 0 is not read.

    Rows are read with what pads them, so that masks are those of whole vectors.
    """
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    part = tl.program_id(1)
    positive, negative = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for row in range(part * N_ROWS, tl.minimum((part + 1) * N_ROWS, n)):
        sign = tl.load(signs_ptr + row).to(tl.int32)
        if sign != 0:
            row_ptr = dlogits_ptr + tl.cast(row, tl.int64) * stride_dlogits_n
            gradient = tl.load(row_ptr + cols, mask=cols < stride_dlogits_n, other=0.0).to(tl.float32)
            positive += tl.where(sign > 0, gradient, 0.0)
            negative += tl.where(sign < 0, gradient, 0.0)
    part_ptr = sums_ptr + tl.cast(part, tl.int64) * 2 * V
    tl.store(part_ptr + cols, positive, mask=cols < V)
    tl.store(part_ptr + V + cols, negative, mask=cols < V)


@triton.jit
def keep_classes_kernel(
    dlogits_ptr,  # [K, stride_dlogits_k], packed in place: rows with what pads them
    place_ptr,  # [stride_dlogits_k] int32: where a class goes, not beyond where it is; -1: left out; -2: padding
    sums_ptr,  # [K] fp32: of the classes left out
    stride_dlogits_k,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row, which reads each block before it writes over it or what comes before it."""
    row = tl.cast(tl.program_id(0), tl.int64)
    row_ptr = dlogits_ptr + row * stride_dlogits_k
    left_out = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, stride_dlogits_k, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < stride_dlogits_k
        gradient = tl.load(row_ptr + cols, mask=mask, other=0.0)
        place = tl.load(place_ptr + cols, mask=mask, other=-2)
        left_out += tl.where(place == -1, gradient.to(tl.float32), 0.0)
        tl.debug_barrier()
        tl.store(row_ptr + place, gradient, mask=place >= 0)
    tl.store(sums_ptr + row, tl.sum(left_out, 0))


@triton.jit
def add_rows_kernel(
    total_ptr,  # [V, D], added to
    rows_ptr,  # [n] int64, no two the same
    addend_ptr,  # [n, D]
    stride_total_v, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i = tl.cast(tl.program_id(0), tl.int64)
    total_ptr += tl.load(rows_ptr + i) * stride_total_v
    addend_ptr += i * D
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = cols < D
        total, addend = tl.load(total_ptr + cols, mask=mask), tl.load(addend_ptr + cols, mask=mask)
        if total.dtype.primitive_bitwidth < 32:
            total, addend = total.to(tl.float32), addend.to(tl.float32)
        tl.store(total_ptr + cols, total + addend, mask=mask)
