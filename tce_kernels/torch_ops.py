"""The row operations of `kernels` in PyTorch, for the CPU and any device without Triton: cache-sized blocks, in place.

Same functions, same arguments, same `rows`; see `kernels` for the formula. Computes in float32, or in float64 for
float64 logits. Out-of-range targets are the caller's to refuse on a CPU; here they give NaN.
"""

import math

import torch

from .stats import (
    COEF,
    LSE,
    ROW_MAX,
    SHARD_MAX,
    SHARD_SUM,
    SHARD_SUM_EXP,
    SHARD_TARGET,
    SUM_EXP,
    n_fields,
    n_sums,
)

# Logits in a block of rows: few enough that a block stays in reach of the caches from one operation to the next,
# enough that the cost of calling PyTorch does not show. Measured for 1024 x 49152 float32 on two cores of a Xeon with
# 2 MB of L2 each: 2**19 takes a quarter longer, 2**20 a tenth, 2**22 and 2**23 the same.
BLOCK_LOGITS = 2**21
CACHED_LOGITS = 2**19  # of a block that is read twice in a row
TINY = 1e-37


def compute_dtype(dtype):
    """The dtype that losses are computed and returned in: float64 for float64 logits, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def _rule(log_prob, param, form):
    """s = log p_t -> (phi, coef), with coef = -dphi / ds."""
    if param is None:
        param = log_prob.new_full((), form.param_number)
    if form.rule == "truncated":  # param = log(threshold)
        kept = ~(log_prob > param)  # a NaN row is kept, so that NaN reaches the loss
        return torch.where(kept, -log_prob, 0.0), kept.to(log_prob.dtype)
    p, q = log_prob.exp(), -log_prob.expm1()  # param = gamma
    modulation = form.alpha * q**param
    # p s / q tends to -1 as p tends to 1, and p s to 0 as p tends to 0.
    slope = torch.where(p == 0, 0.0, p * log_prob) / q
    slope = torch.where(q == 0, -1.0, slope)
    coef = modulation * (1 - param * slope)
    if form.alpha > 0:  # p < 1, whatever it rounds to: underflow must not look like a dropped row
        coef = torch.where(coef < TINY, TINY, coef)
    return -modulation * log_prob, coef


def _select(tensor, selected):
    """Entries of the first dimension; all of them if `selected` is None."""
    return tensor if selected is None else tensor[selected]


def _blocks(logits, step):
    """Cut logits [outer, inner, V] into blocks [step, V]: pairs of a slice of [N] and the indices of the block."""
    n_outer, n_inner, _ = logits.shape
    for outer in range(n_outer):
        for start in range(0, n_inner, step):
            stop = min(start + step, n_inner)
            yield slice(outer * n_inner + start, outer * n_inner + stop), (outer, slice(start, stop))


class _Block:
    """Rows [R, V] under work: z, and its softmax, in memory that every block of the tensor uses again."""

    def __init__(self, logits, form):
        _, inner, V = logits.shape
        self.form = form
        dtype = compute_dtype(logits.dtype)
        self.as_stored = _is_z(logits, form)
        # z takes as much memory as its softmax, unless it is the logits.
        self.n_rows = max((BLOCK_LOGITS if self.as_stored else BLOCK_LOGITS // 2) // V, 1)
        self.p_memory = torch.empty(min(self.n_rows, inner), V, dtype=dtype, device=logits.device)
        self.z_memory = None if self.as_stored else torch.empty_like(self.p_memory)

    def load(self, x):
        """Logits x [R, V] as stored -> z [R, V], which may be x itself, and memory [R, V] for its softmax."""
        z = x
        if not self.as_stored:
            z = self.z_memory[: len(x)].copy_(x)
            if self.form.logit_scale != 1.0:
                z *= self.form.logit_scale
            if self.form.softcap is not None:
                z.div_(self.form.softcap).tanh_().mul_(self.form.softcap)
        return z, self.p_memory[: len(x)]


def _is_z(logits, form):
    """Whether the logits as stored are already z, in the dtype of the computation."""
    return logits.dtype == compute_dtype(logits.dtype) and form.softcap is None and form.logit_scale == 1.0


def row_factors(row_grad, rows, form):
    """Of each row: row_grad, or 0 if the row is dropped; the factors of its softmax and of its target's one-hot."""
    coef = rows[COEF]
    row_grad = torch.where(coef == 0, 0, row_grad * form.logit_scale)
    of_target = row_grad * coef
    of_p = of_target + 2 * form.z_loss * row_grad * rows[LSE] if form.z_loss else of_target
    return row_grad, of_p, of_target


def _write_gradient(out, selected, p, z, target, row_grad, rows, form, n_classes=None):
    """Write the gradient to the selected rows of out [R, V], which may be the logits, and zeros to the others.

    p, the softmax of those rows, is lost; so is z, which only a softcap needs. With n_classes the rows go on elsewhere,
    p is the exponentials below their maxima, and the target may not be here.
    """
    V = out.shape[1]
    row_grad, of_p, of_target = row_factors(row_grad, rows, form)
    if n_classes is not None:
        of_p = of_p / rows[SUM_EXP]
    in_place = selected is None and out.dtype == p.dtype
    gradient = torch.mul(p, of_p[:, None], out=out if in_place else p)
    if form.label_smoothing:
        gradient -= (of_target * form.label_smoothing / (V if n_classes is None else n_classes))[:, None]
        of_target = of_target * (1 - form.label_smoothing)
    if n_classes is not None:
        of_target = torch.where((target >= 0) & (target < V), of_target, 0)
    gradient[torch.arange(len(target), device=target.device), target.clamp(0, V - 1)] -= of_target
    if form.softcap is not None:
        gradient *= z.div_(form.softcap).square_().neg_().add_(1)
    unseen = (row_grad == 0) & ~rows[LSE].isfinite()
    if unseen.any():  # a row of zero weight that holds NaN: 0 * NaN would stay NaN
        gradient[unseen] = 0
    if selected is not None:
        out.zero_()
        out[selected] = gradient.to(out.dtype)
    elif not in_place:
        out.copy_(gradient)


def _softmax(z, p, entropy):
    """Write the softmax of z [R, V] to p, which may be z. Returns maxima of z [R] and, if asked for, entropies [R]."""
    row_max, row_entropy = z.new_empty(len(z)), z.new_empty(len(z) if entropy else 0)
    step = max(CACHED_LOGITS // z.shape[1], 1)
    for start in range(0, len(z), step):
        some = slice(start, start + step)
        torch.amax(z[some], 1, out=row_max[some])
        torch.softmax(z[some], 1, out=p[some])
        if entropy:
            torch.sum(torch.special.entr(p[some]), 1, out=row_entropy[some])
    return row_max, row_entropy if entropy else None


def _losses(z, p, target, row_scale, param, form):
    """Loss [R] and rows [F, R] of z [R, V], none ignored; its softmax goes to p, which may be z, then lost."""
    V = z.shape[1]
    index = target.clamp(0, V - 1)[:, None]
    target_z = z.gather(1, index).squeeze(1)
    mean_z = z.mean(1) if form.label_smoothing else None
    row_max, row_entropy = _softmax(z, p, form.entropy)
    target_p = p.gather(1, index).squeeze(1)
    log_sum = target_z - row_max - target_p.log()
    underflowed = ~(target_p > 1e-30)  # or NaN: there the target's p says nothing about the sum
    if underflowed.any():
        log_sum[underflowed] = -p[underflowed].amax(1).log()
    target_z = torch.where((target >= 0) & (target < V), target_z, math.nan)
    return _apply_rule(target_z, row_max, log_sum, log_sum.exp(), mean_z, row_entropy, row_scale, param, form)


def _apply_rule(target_z, row_max, log_sum, sum_exp, mean_z, row_entropy, row_scale, param, form):
    """Loss [R] and rows [F, R] from what is known of each row."""
    lse = torch.where(row_max == -math.inf, row_max, row_max + log_sum)
    log_prob = target_z - row_max - log_sum
    log_prob = torch.where(log_prob > 0, 0, log_prob)  # rounding above 0 must not drop a row at threshold 1
    phi, coef = _rule(log_prob, param, form)
    coef = torch.where(log_prob.isnan(), log_prob, coef)
    coef = torch.where(row_scale == 0, 0, coef)
    if form.label_smoothing:
        phi = (1 - form.label_smoothing) * phi + form.label_smoothing * (lse - mean_z)
    if form.z_loss:
        phi = phi + form.z_loss * lse * lse
    loss = torch.where(coef == 0, 0, row_scale * phi)
    correct = (target_z == row_max) & ~log_prob.isnan()
    fields = [log_prob, lse, coef, row_max, sum_exp, correct.to(loss.dtype)]
    return loss, torch.stack(fields if row_entropy is None else [*fields, row_entropy])


def loss_and_dlogits(logits, target, row_scale, param, form, out):
    """`row_loss`, and `dlogits` to `out` for an upstream gradient of 1, in one pass; no gradient if `out` is None."""
    N = target.numel()
    dtype = compute_dtype(logits.dtype)
    loss = torch.zeros(N, dtype=dtype, device=logits.device)
    rows = torch.zeros(n_fields(form.entropy), N, dtype=dtype, device=logits.device)
    block = _Block(logits, form)
    for row, index in _blocks(logits, block.n_rows):
        live = target[row] != form.ignore_index
        selected = None if live.all() else live
        z, p = block.load(_select(logits[index], selected))
        block_target, block_scale = _select(target[row], selected), _select(row_scale[row], selected)
        loss[row][live], block_rows = _losses(z, p, block_target, block_scale, param, form)
        rows[:, row][:, live] = block_rows
        if out is not None:
            _write_gradient(out[index], selected, p, z, block_target, block_scale, block_rows, form)
    return loss, rows


def row_loss(logits, target, row_scale, param, form):
    """logits [outer, inner, V], target and row_scale [N], param [] or None (the form's): loss [N] and rows [F, N]."""
    return loss_and_dlogits(logits, target, row_scale, param, form, None)


def shard_sums(logits, target, form):
    """What is known here of rows that go on elsewhere, `sums` [F, N]; a target may be elsewhere too."""
    V = logits.shape[2]
    dtype = compute_dtype(logits.dtype)
    n = n_sums(form.label_smoothing != 0, form.entropy)
    sums = torch.zeros(n, target.numel(), dtype=dtype, device=logits.device)
    sums[SHARD_MAX], sums[SHARD_TARGET] = -math.inf, math.nan
    if V == 0:
        return sums
    block = _Block(logits, form)
    for row, index in _blocks(logits, block.n_rows):
        live = target[row] != form.ignore_index
        z, p = block.load(_select(logits[index], None if live.all() else live))
        block_target = target[row][live]
        target_z = z.gather(1, block_target.clamp(0, V - 1)[:, None]).squeeze(1)
        here = (block_target >= 0) & (block_target < V)
        of_target = [torch.where(here, target_z, math.nan)]
        if form.label_smoothing:
            of_target.append(z.sum(1))
        row_max, row_entropy = _softmax(z, p, form.entropy)
        of_block = [row_max, torch.where(row_max == -math.inf, 0, p.amax(1).reciprocal()), *of_target]
        if form.entropy:
            of_block.append(row_entropy)
        sums[:, row][:, live] = torch.stack(of_block)
    return sums


def row_loss_of_sums(sums, target, row_scale, param, form, n_classes):
    """`row_loss` of rows of n_classes in parts, from the `sums` [p, F, N] of all of them."""
    part_max, part_sum_exp, part_target = sums[:, SHARD_MAX], sums[:, SHARD_SUM_EXP], sums[:, SHARD_TARGET]
    row_max = part_max.amax(0)
    part_sum_exp = torch.where(part_sum_exp == 0, 0, part_sum_exp * (part_max - row_max).exp())
    sum_exp = part_sum_exp.sum(0)
    row_entropy = None
    if form.entropy:  # of the parts, each times its share of the row, and of the shares
        share = part_sum_exp / sum_exp
        row_entropy = torch.where(share == 0, 0, share * sums[:, -1] + torch.special.entr(share)).sum(0)
    elsewhere = part_target.isnan()
    target_z = torch.where(elsewhere.all(0), math.nan, torch.where(elsewhere, 0, part_target).sum(0))
    mean_z = sums[:, SHARD_SUM].sum(0) / n_classes if form.label_smoothing else None
    loss, rows = _apply_rule(target_z, row_max, sum_exp.log(), sum_exp, mean_z, row_entropy, row_scale, param, form)
    live = target != form.ignore_index
    return torch.where(live, loss, 0), torch.where(live, rows, 0)


def dlogits(logits, target, row_grad, rows, form, out, n_classes=None):
    """Write the gradient for row_grad [N] = upstream gradient * row_scale to out, which may be the logits.

    n_classes: of rows that go on elsewhere, as do their maxima and sums in `rows`.
    """
    if logits.shape[2] == 0:
        return
    block = _Block(logits, form)
    for row, index in _blocks(logits, block.n_rows):
        wanted = (rows[COEF, row] != 0) & (row_grad[row] != 0)
        selected = None if wanted.all() else wanted
        z, p = block.load(_select(logits[index], selected))
        block_rows = rows[:, row] if selected is None else rows[:, row][:, selected]
        if n_classes is None:
            torch.softmax(z, 1, out=p)
        else:
            torch.sub(z, block_rows[ROW_MAX, :, None], out=p).exp_()
        _write_gradient(
            out[index], selected, p, z, _select(target[row], selected), _select(row_grad[row], selected), block_rows,
            form, n_classes,
        )  # fmt: skip


def loss_and_kept_dlogits(logits, target, row_scale, param, form, count=None):
    """Loss and gradient of the logits [1, n, V], no row of which is ignored, for an upstream gradient of 1, packed.

    Returns loss [n], rows [F, n], kept [K]: row i < K of the logits now holds the gradient of row kept[i]; and, as
    numbers, what count(dlogits, target, row_scale, rows) has found out about those rows, if it is given.
    """
    x = logits[0]
    # The softmax takes the place of its logits: on a CPU it is made row by row, each read before it is written.
    in_place = x.device.type == "cpu" and _is_z(x, form)
    if in_place:
        loss, rows = _losses(x, x, target, row_scale, param, form)
    else:
        loss, rows = row_loss(logits, target, row_scale, param, form)
    kept = _pack(x, (rows[COEF] != 0).nonzero().squeeze(1))
    packed, of_kept = x[: len(kept)], (target[kept], row_scale[kept], rows[:, kept])
    if in_place:
        _write_gradient(packed, None, packed, None, *of_kept, form)
    else:
        dlogits(packed[None], *of_kept, form, packed[None])
    return loss, rows, kept, count(packed, *of_kept).tolist() if count else []


def pack(x, is_kept, K):
    """Move the K rows of x [n, V] that are kept, bool [n], into its first K; returns which row each of those was."""
    return _pack(x, is_kept.nonzero().squeeze(1))


def _pack(x, kept):
    """The same of rows kept [K] by number."""
    K = len(kept)
    n_staying = int((kept < K).sum())
    taken = torch.zeros(K, dtype=torch.bool, device=x.device).index_fill_(0, kept[:n_staying], True)
    order, gaps = torch.arange(K, device=x.device), taken.logical_not().nonzero().squeeze(1)
    order[gaps] = kept[n_staying:]
    step = max(BLOCK_LOGITS // max(x.shape[1], 1), 1)
    memory = x.new_empty(min(step, len(gaps)), x.shape[1])
    for some in gaps.split(step):
        x.index_copy_(0, some, torch.index_select(x, 0, order[some], out=memory[: len(some)]))
    return order


def class_sums(dlogits, groups):
    """Sums of dlogits [n, V] over each group of its rows, bool [2, n], to [2, V] in float32 at least."""
    n, V = dlogits.shape
    groups = groups.to(compute_dtype(dlogits.dtype))
    sums = groups.new_zeros(len(groups), V)
    step = n if dlogits.dtype == sums.dtype else max(BLOCK_LOGITS // V, 1)
    for some, some_groups in zip(dlogits.split(step), groups.split(step, dim=1), strict=True):
        some = some.to(sums.dtype)
        for of_group, group in zip(sums, some_groups, strict=True):
            if group.any():
                of_group.addmv_(some.t(), group)
    return sums


def keep_classes(dlogits, classes):
    """Move some classes [n], in ascending order, to the front of each row of dlogits [K, V].

    Returns the sums [K] of the rows over the other classes, in float32 at least.
    """
    K, V = dlogits.shape
    n = len(classes)
    step = max(BLOCK_LOGITS // V, 1)
    others = torch.ones(V, dtype=compute_dtype(dlogits.dtype), device=dlogits.device).index_fill_(0, classes, 0)
    sums = others.new_empty(K)
    memory = dlogits.new_empty(min(step, K), n)
    for some, some_sums in zip(dlogits.split(step), sums.split(step), strict=True):
        torch.mv(some.to(sums.dtype), others, out=some_sums)
        some[:, :n] = torch.gather(some, 1, classes.expand(len(some), n), out=memory[: len(some)])
    return sums


def add_rows(total, rows, addend):
    """total[rows] += addend, for rows [n] that differ and addend [n, D] in the dtype of the total."""
    total.index_add_(0, rows, addend)


def scale_(dlogits, factor):
    """dlogits *= factor [], unless the factor is 1."""
    if factor != 1:
        dlogits *= factor
