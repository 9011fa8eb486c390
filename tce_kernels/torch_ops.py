"""The row operations of `kernels` in PyTorch, for the CPU and any device without Triton: cache-sized blocks, in place.

Same functions, same arguments, same `rows`; see `kernels` for the formula. Computes in float32, or in float64 for
float64 logits. Out-of-range targets are the caller's to refuse on a CPU; here they give NaN.
"""

import math

import torch

from .stats import COEF, LSE, N_FIELDS

# Logits in a block of rows: few enough that a block stays in reach of the caches from one operation to the next,
# enough that the cost of calling PyTorch does not show. Measured for 1024 x 49152 float32 on two cores of a Xeon with
# 2 MB of L2 each: 2**19 takes a quarter longer, 2**20 a tenth, 2**22 and 2**23 the same.
BLOCK_LOGITS = 2**21
TINY = 1e-37


def compute_dtype(dtype):
    """The dtype that losses are computed and returned in: float64 for float64 logits, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def _rule(log_prob, param, alpha, rule):
    """s = log p_t -> (phi, coef), with coef = -dphi / ds."""
    if rule == "truncated":  # param = log(threshold)
        kept = ~(log_prob > param)  # a NaN row is kept, so that NaN reaches the loss
        return torch.where(kept, -log_prob, 0.0), kept.to(log_prob.dtype)
    p, q = log_prob.exp(), -log_prob.expm1()  # param = gamma
    modulation = alpha * q**param
    # p s / q tends to -1 as p tends to 1, and p s to 0 as p tends to 0.
    slope = torch.where(p == 0, 0.0, p * log_prob) / q
    slope = torch.where(q == 0, -1.0, slope)
    coef = modulation * (1 - param * slope)
    if alpha > 0:  # p < 1, whatever it rounds to: underflow must not look like a dropped row
        coef = torch.where(coef < TINY, TINY, coef)
    return -modulation * log_prob, coef


def _select(tensor, selected):
    """Entries of the last dimension (rows of a block [R, V]: of the first); all of them if `selected` is None."""
    return tensor if selected is None else tensor[..., selected]


def _blocks(logits):
    """Cut logits [outer, inner, V] into blocks [R, V]: pairs of a slice of [N] and the indices of the block."""
    n_outer, n_inner, V = logits.shape
    step = max(BLOCK_LOGITS // V, 1)
    for outer in range(n_outer):
        for start in range(0, n_inner, step):
            stop = min(start + step, n_inner)
            yield slice(outer * n_inner + start, outer * n_inner + stop), (outer, slice(start, stop))


class _Block:
    """Rows [R, V] under work: z, and its softmax, in memory that every block of the tensor uses again."""

    def __init__(self, logits, logit_scale, softcap):
        _, inner, V = logits.shape
        self.logit_scale, self.softcap = logit_scale, softcap
        shape = (min(max(BLOCK_LOGITS // V, 1), inner), V)
        dtype = compute_dtype(logits.dtype)
        self.p_memory = torch.empty(shape, dtype=dtype, device=logits.device)
        self.as_stored = dtype == logits.dtype and softcap is None and logit_scale == 1.0
        self.z_memory = None if self.as_stored else torch.empty_like(self.p_memory)

    def load(self, x):
        """Logits x [R, V] as stored -> z [R, V], which may be x itself."""
        self.z = x
        if not self.as_stored:
            self.z = self.z_memory[: len(x)].copy_(x)
            if self.logit_scale != 1.0:
                self.z *= self.logit_scale
            if self.softcap is not None:
                self.z.div_(self.softcap).tanh_().mul_(self.softcap)
        self.p = torch.softmax(self.z, 1, out=self.p_memory[: len(x)])
        return self.z

    def keep(self, kept, out):
        """Leave only the rows `kept` [K] in the block, on their way to out [K, V] where that saves memory."""
        if len(kept) == len(self.p):
            return
        if self.softcap is not None:  # the gradient needs z as well
            self.p, self.z = self.p[kept], self.z[kept]
        else:
            free = out if out.dtype == self.p.dtype else self.z_memory[: len(kept)]
            self.p = torch.index_select(self.p, 0, kept, out=free)

    def write_gradient(self, out, selected, target, row_grad, rows, z_loss, label_smoothing):
        """Write the gradient to the selected rows of out [R, V], which may be the logits, and zeros to the others."""
        V = out.shape[1]
        coef = rows[COEF]
        row_grad = torch.where(coef == 0, 0, row_grad * self.logit_scale)
        of_target = row_grad * coef
        of_p = of_target + 2 * z_loss * row_grad * rows[LSE] if z_loss else of_target
        if (row_grad == 0).logical_and_(rows[LSE].isfinite().logical_not_()).any():
            self.p[row_grad == 0] = 0  # a row of zero weight that holds NaN: 0 * NaN would stay NaN

        in_place = selected is None and out.dtype == self.p.dtype
        gradient = torch.mul(self.p, of_p[:, None], out=out if in_place else self.p)
        if label_smoothing:
            gradient -= (of_target * label_smoothing / V)[:, None]
            of_target = of_target * (1 - label_smoothing)
        gradient[torch.arange(len(target), device=target.device), target] -= of_target
        if self.softcap is not None:
            gradient *= self.z.div_(self.softcap).square_().neg_().add_(1)
        if selected is not None:
            out.zero_()
            out[selected] = gradient.to(out.dtype)
        elif not in_place:
            out.copy_(gradient)


def _block_loss(block, x, target, row_scale, param, rule, alpha, z_loss, label_smoothing):
    """Loss [R] and rows [6, R] of logits x [R, V], none of them ignored; leaves z and its softmax in the block."""
    V = x.shape[1]
    z = block.load(x)
    row_max = z.amax(1)
    index = target.clamp(0, V - 1)[:, None]
    target_z, target_p = z.gather(1, index).squeeze(1), block.p.gather(1, index).squeeze(1)
    if (target_p > 1e-30).all():
        log_sum = target_z - row_max - target_p.log()
    else:  # the target's p says nothing about the sum: it has underflowed, or is NaN
        log_sum = -block.p.amax(1).log()
    target_z = torch.where((target >= 0) & (target < V), target_z, math.nan)
    lse = row_max + log_sum
    log_prob = target_z - row_max - log_sum
    log_prob = torch.where(log_prob > 0, 0, log_prob)  # rounding above 0 must not drop a row at threshold 1
    phi, coef = _rule(log_prob, param, alpha, rule)
    coef = torch.where(log_prob.isnan(), log_prob, coef)
    coef = torch.where(row_scale == 0, 0, coef)
    if label_smoothing:
        phi = (1 - label_smoothing) * phi + label_smoothing * (lse - z.mean(1))
    if z_loss:
        phi = phi + z_loss * lse * lse
    loss = torch.where(coef == 0, 0, row_scale * phi)
    correct = (target_z == row_max) & ~log_prob.isnan()
    return loss, torch.stack([log_prob, lse, coef, row_max, log_sum.exp(), correct.to(loss.dtype)])


def loss_and_dlogits(
    logits, target, row_scale, param, out, *,
    rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale,
):  # fmt: skip
    """`row_loss`, and `dlogits` to `out` for an upstream gradient of 1, in one pass; no gradient if `out` is None."""
    N = target.numel()
    dtype = compute_dtype(logits.dtype)
    loss = torch.zeros(N, dtype=dtype, device=logits.device)
    rows = torch.zeros(N_FIELDS, N, dtype=dtype, device=logits.device)
    block = _Block(logits, logit_scale, softcap)
    for row, index in _blocks(logits):
        live = target[row] != ignore_index
        selected = None if live.all() else live
        x = logits[index] if selected is None else logits[index][selected]
        block_target, block_scale = _select(target[row], selected), _select(row_scale[row], selected)
        block_loss, block_rows = _block_loss(
            block, x, block_target, block_scale, param, rule, alpha, z_loss, label_smoothing
        )
        loss[row][live], rows[:, row][:, live] = block_loss, block_rows
        if out is not None:
            block.write_gradient(
                out[index], selected, block_target.clamp(0, x.shape[1] - 1), block_scale, block_rows,
                z_loss, label_smoothing,
            )  # fmt: skip
    return loss, rows


def loss_and_kept_dlogits(
    logits, target, row_scale, param, *,
    rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale,
):  # fmt: skip
    """Loss and gradient of the logits [1, n, V], no row of which is ignored, for an upstream gradient of 1, packed.

    Returns loss [n], rows [6, n] and kept [K]: row i < K of the logits now holds the gradient of row kept[i].
    """
    dtype = compute_dtype(logits.dtype)
    n, V = logits.shape[1:]
    loss = torch.empty(n, dtype=dtype, device=logits.device)
    rows = torch.empty(N_FIELDS, n, dtype=dtype, device=logits.device)
    block = _Block(logits, logit_scale, softcap)
    kept_rows, n_kept = [], 0
    for row, index in _blocks(logits):
        loss[row], block_rows = _block_loss(
            block, logits[index], target[row], row_scale[row], param, rule, alpha, z_loss, label_smoothing
        )
        rows[:, row] = block_rows
        kept = (block_rows[COEF] != 0).nonzero().squeeze(1)
        out = logits[0, n_kept : n_kept + len(kept)]  # at most as far as this block, which has been read
        block.keep(kept, out)
        block.write_gradient(
            out, None, target[row][kept].clamp(0, V - 1), row_scale[row][kept], block_rows[:, kept],
            z_loss, label_smoothing,
        )  # fmt: skip
        kept_rows.append(kept + row.start)
        n_kept += len(kept)
    return loss, rows, torch.cat(kept_rows) if kept_rows else target.new_empty(0, dtype=torch.int64)


def row_loss(logits, target, row_scale, param, **options):
    """logits [outer, inner, V], target and row_scale [N], param [] -> loss [N] and rows [6, N]."""
    return loss_and_dlogits(logits, target, row_scale, param, None, **options)


def dlogits(logits, target, row_grad, rows, out, *, z_loss, label_smoothing, softcap, logit_scale):
    """Write the gradient for row_grad [N] = upstream gradient * row_scale to out, which may be the logits."""
    V = logits.shape[2]
    block = _Block(logits, logit_scale, softcap)
    for row, index in _blocks(logits):
        wanted = (rows[COEF, row] != 0) & (row_grad[row] != 0)
        selected = None if wanted.all() else wanted
        block_rows = _select(rows[:, row], selected)
        block.load(logits[index] if selected is None else logits[index][selected])
        block.write_gradient(
            out[index], selected, _select(target[row], selected).clamp(0, V - 1), _select(row_grad[row], selected),
            block_rows, z_loss, label_smoothing,
        )  # fmt: skip


def scale_(dlogits, factor):
    """dlogits *= factor [], unless the factor is 1."""
    if factor != 1:
        dlogits *= factor
