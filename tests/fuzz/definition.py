"""The losses written out in float64 numpy, loss and gradient by hand, each number with a bound on what may differ.

Nothing here comes from the package, and no gradient from autograd. A row has transformed logits z, target t,
lse = log sum_j exp(z_j), s = z_t - lse and p = exp(z - lse); a rule turns s into phi(s) and coef = -phi'(s):

    loss = row_scale * (phi(s) + z_loss lse^2)        dz_j = row_scale * ((coef + 2 z_loss lse) p_j - coef w_j)

with w = (1 - e) onehot(t) + e / V under label smoothing e. The bounds are first-order worst cases of the arithmetic in
the dtype of the computation (`eps`), carried along as intervals: every function that is not linear is evaluated at both
ends. The constants count roundings, and are given where they are used.
"""

from typing import NamedTuple

import numpy as np

TINY = 1e-36  # below it float32 has few digits left, and the package gives coefficients a floor of 1e-37


class Rule(NamedTuple):
    """threshold of the truncated loss, or None and the focal loss's gamma and alpha."""

    threshold: float | None = None
    gamma: float = 0.0
    alpha: float = 1.0


class Rows(NamedTuple):
    """Per row [N], or per logit [N, V]; `e_x` bounds the error of x."""

    bad: np.ndarray  # NaN in the loss: NaN or +inf among the logits, nothing but -inf, a target out of range
    target: np.ndarray
    z: np.ndarray
    e_z: np.ndarray
    slope: np.ndarray  # dz / dx
    e_slope: np.ndarray
    p: np.ndarray
    e_p: np.ndarray
    s: np.ndarray
    e_s: np.ndarray
    lse: np.ndarray
    e_lse: np.ndarray


def summation(n, eps):
    """Relative error of a sum of n positive terms: rounded products or exponentials, in 8 or more partial sums."""
    return eps * (8 + n / 16)


def _log_sum(d):
    """log sum_j exp(d_j) of rows that hold a number."""
    top = d.max(1)
    return top + np.log(np.exp(d - top[:, None]).sum(1))


def softmax_rows(x, e_x, target, eps, logit_scale=1.0, softcap=None) -> Rows:
    """Everything that does not depend on the rule, of logits x [N, V] that are off by e_x [N, V] to begin with."""
    n, V = x.shape
    index = np.arange(n)
    in_range = (target >= 0) & (target < V)
    target = np.where(in_range, target, 0)
    z, slope, e_slope = logit_scale * x, np.full_like(x, logit_scale), np.zeros_like(x)
    e_z = logit_scale * e_x
    if logit_scale != 1:
        e_z = e_z + eps * np.abs(z) + TINY  # the factor rounded, and the product
    if softcap is not None:
        # y = x * factor / cap, all rounded: 2 eps; tanh: 2 ulp; times the cap, rounded too: eps.
        y = z / softcap
        off = np.where(np.isfinite(y), e_z / softcap + 1.5 * eps * np.abs(y), 0)
        t = np.tanh(y)
        e_t = np.maximum(np.tanh(y + off) - t, t - np.tanh(y - off)) + 2 * eps * np.abs(t)
        z, e_z = softcap * t, softcap * (e_t + eps * np.abs(t)) + TINY
        slope, e_slope = logit_scale * (1 - t * t), logit_scale * (2 * np.abs(t) * e_t + e_t**2 + 2 * eps)
    e_z = np.where(np.isfinite(z), e_z, 0)

    # Only differences from the row's maximum count: what all logits have in common must cost no digits.
    top = z.max(1)
    bad = ~np.isfinite(top) | ~in_range
    d = np.where(np.isneginf(z), -np.inf, z - np.where(np.isfinite(top), top, 0)[:, None])
    log_sum = _log_sum(d)
    lse = top + np.where(np.isneginf(top), 0, log_sum)
    d_t = d[index, target]
    # They are rounded, and multiplied by log2 e on Triton, by a factor that is rounded too.
    below = np.where(np.isfinite(d), -d, 0)
    # exp and log; the torch backend finds log(sum) from log(p_t), where p_t is above 1e-30.
    e_log = summation(V, eps) + eps * (4 + 2 * log_sum + 4 * np.minimum(below[index, target], 70))

    others = np.exp(d - d_t[:, None])
    others[index, target] = 0
    s = np.where(d_t == 0, -np.log1p(others.sum(1)), d_t - log_sum)  # no cancellation at p = 1
    s = np.where(bad, np.nan, s)
    log_p = d - log_sum[:, None]
    p = np.exp(log_p)

    # Errors of z, or of its differences, of which that of the maximum has none: the smaller bound of the two.
    e_s, e_lse, e_p = np.inf, np.inf, np.inf
    e_top = np.where(np.isfinite(top), e_z[index, np.argmax(z, 1)], 0)
    apart_from_top = np.where(np.arange(V) == np.argmax(z, 1)[:, None], 0, e_z + e_top[:, None])
    for e, e_common in (e_z, 0), (apart_from_top, e_top):
        off = e + 1.5 * eps * below
        shift = np.maximum(_log_sum(d + off) - log_sum, log_sum - _log_sum(d - off))
        e_lse = np.minimum(e_lse, e_common + shift + e_log + eps * np.abs(lse))
        size = below[index, target] + np.abs(np.where(np.isfinite(s), s, 0))
        e_s = np.minimum(e_s, off[index, target] + shift + e_log + eps * size)
        off = off + (shift + summation(V, eps))[:, None] + eps * (4 + 2 * log_sum[:, None] + 2 * below)
        e_p = np.minimum(e_p, np.maximum(np.exp(np.minimum(log_p + off, 0)) - p, p - np.exp(log_p - off)))
    e_p = np.where(np.isneginf(z), 0, e_p + (1e-44 if eps > 1e-10 else 0))  # subnormal p
    return Rows(bad, target, z, e_z, slope, e_slope, p, e_p, s, e_s, lse, e_lse)


def kept_by_rule(rows: Rows, rule: Rule, eps):
    """Which rows the rule keeps, and which of those decisions rounding could turn round."""
    if rule.threshold is None:
        return np.full(len(rows.s), rule.alpha != 0), np.zeros(len(rows.s), bool)
    log_threshold = np.log(rule.threshold)
    kept = ~(rows.s > log_threshold)
    margin = rows.e_s + 2 * eps * abs(log_threshold)
    return kept, ~rows.bad & (rule.threshold != 1) & (np.abs(rows.s - log_threshold) <= margin)


def _focal(s, gamma, alpha):
    p, q = np.exp(s), -np.expm1(s)
    power = np.where(q == 0, float(gamma == 0), q**gamma)
    slope = np.where(p == 0, 0, p * s) / np.where(q == 0, 1, q)  # p s / q, which tends to -1 at p = 1
    slope = np.where(q == 0, -1, slope)
    return -alpha * power * s if alpha else 0 * p, alpha * power * (1 - gamma * slope)


def rule_of(rows: Rows, rule: Rule, eps):
    """phi, coef and their bounds, of rows that are kept."""
    if rule.threshold is not None:
        return -rows.s, rows.e_s, np.ones_like(rows.s), np.zeros_like(rows.s)
    phi, coef = _focal(rows.s, rule.gamma, rule.alpha)
    e_phi, e_coef, q = 0, 0, -np.expm1(rows.s)
    for part in (-1, -0.5, 0.5, 1):
        near_phi, near_coef = _focal(np.minimum(rows.s + part * (rows.e_s + 2 * eps), 0), rule.gamma, rule.alpha)
        e_phi = np.fmax(e_phi, np.where(np.isfinite(phi), np.abs(near_phi - phi), 0))
        e_coef = np.fmax(e_coef, np.abs(near_coef - coef))
    # A dozen roundings; q^gamma as exp2(gamma log2 q), which multiplies the error of the logarithm.
    relative = eps * (12 + 4 * rule.gamma * (1 + np.minimum(np.abs(np.log(np.maximum(q, 1e-38))), 90)))
    e_phi = e_phi + relative * np.where(np.isfinite(phi), np.abs(phi), 0) + (TINY if eps > 1e-10 else 0)
    return phi, e_phi, coef, e_coef + relative * coef + TINY


class Result(NamedTuple):
    loss: np.ndarray  # [N]
    e_loss: np.ndarray
    dx: np.ndarray  # [N, V]
    e_dx: np.ndarray


def loss_and_gradient(rows: Rows, kept, scale, upstream, rule, eps, z_loss=0.0, smoothing=0.0) -> Result:
    """Loss for row scales [N], and gradient of the logits for upstream gradients [N]; dropped rows are exact zeros."""
    n, V = rows.z.shape
    index = np.arange(n)
    phi, e_phi, coef, e_coef = rule_of(rows, rule, eps)
    lse = rows.lse
    if smoothing:
        mean, size = rows.z.mean(1), np.abs(rows.z).mean(1)
        uniform = lse - mean
        e_uniform = rows.e_lse + rows.e_z.mean(1) + summation(V, eps) * size + 3 * eps * (np.abs(lse) + size)
        # At e = 1 an infinite phi has no part in the loss, though 0 * inf may be computed, as PyTorch's own loss does.
        undecided = (smoothing == 1) & np.isinf(phi)
        phi = uniform if smoothing == 1 else (1 - smoothing) * phi + smoothing * uniform
        e_phi = (1 - smoothing) * e_phi + smoothing * e_uniform + 2 * eps * np.abs(phi)
    loss = phi + z_loss * lse * lse if z_loss else phi
    e_loss = e_phi + z_loss * (2 * np.abs(lse) * rows.e_lse + rows.e_lse**2 + 3 * eps * lse * lse)
    e_loss = np.where(np.isfinite(e_loss), e_loss, 0) + 5 * eps * np.where(np.isfinite(loss), np.abs(loss), 0)
    if smoothing:
        e_loss = np.where(undecided, np.inf, e_loss)

    weight = np.full((n, V), smoothing / V)
    weight[index, rows.target] += 1 - smoothing
    of_lse = 2 * z_loss * lse if z_loss else np.zeros_like(lse)
    inner = (coef + of_lse)[:, None] * rows.p - coef[:, None] * weight
    size = (np.abs(coef) + np.abs(of_lse))[:, None]
    e_inner = (e_coef + 2 * z_loss * rows.e_lse)[:, None] * (rows.p + rows.e_p) + size * rows.e_p
    # Factors of a row (class and token weight, 1 / denominator, upstream gradient) and the formula: 16 roundings.
    e_inner = e_inner + e_coef[:, None] * weight + 8 * eps * (size * rows.p + coef[:, None] * weight)
    factor = (upstream * scale)[:, None]
    dx = factor * rows.slope * inner
    e_dx = np.abs(factor) * ((np.abs(rows.slope) + rows.e_slope) * e_inner + rows.e_slope * np.abs(inner))
    e_dx = e_dx + (TINY if eps > 1e-10 else 1e-290) * (np.abs(factor) > 0)

    bad = rows.bad
    loss, dx = np.where(bad, np.nan, scale * loss), np.where(bad[:, None], np.nan, dx)
    return Result(
        np.where(kept, loss, 0),
        np.where(kept & ~bad & (scale != 0), np.abs(scale) * e_loss, 0),
        np.where(kept[:, None], dx, 0),
        np.where((kept & ~bad)[:, None], e_dx, 0),
    )
