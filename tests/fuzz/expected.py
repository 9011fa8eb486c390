"""What a drawn call must give: values from the definition, and how far from them its dtypes may lead.

Each entry of an expectation is (wanted, bound), arrays of one shape: exact where the bound is 0, free where it is inf.
"""

import numpy as np
import torch

from tests.fuzz.definition import TINY, Rule, kept_by_rule, loss_and_gradient, softmax_rows, summation

SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}


def array(tensor):
    return tensor.detach().double().cpu().numpy()


def eps_of(dtype):
    return torch.finfo(dtype).eps


def _ulps(case, dtype):
    """The eps that one rounding to 16 bits costs: half; one in the interpreter, which truncates bfloat16."""
    return 1.0 if case.backend == "triton" and dtype == torch.bfloat16 else 0.5


def _weights(case, target):
    """Row weights [N], and whether float32 adds them up exactly."""
    valid = target != case.options.get("ignore_index", -100)
    weight, exact = valid.astype(float), True
    for name in ("weight", "token_weight"):
        tensor = case.options.get(name)
        if tensor is not None:
            values = array(tensor).reshape(-1)
            values = values[np.clip(target, 0, len(values) - 1)] if name == "weight" else values
            weight = np.where(valid, weight * values, 0)
            exact &= bool((weight * 64 == np.round(weight * 64)).all())
    return valid, weight, exact


def _rule(case):
    if case.rule == "truncated":
        return Rule(threshold=float(case.threshold))
    return Rule(gamma=float(case.gamma), alpha=float(case.alpha))


class Undecided(Exception):
    """Rounding could turn a decision round, and there are no statistics to tell which it was."""


def expect(case, stats=None):
    """{name: (wanted, bound)} of a call.

    Where s is within its error bound of log(threshold) either decision is right: there it is the call's own, from its
    statistics, and everything else has to agree with it.
    """
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    # float64 is checked against float64, whose errors are as large.
    eps = eps_of(compute) * (2 if compute == torch.float64 else 1)
    options, shape = case.options, tuple(case.target.shape)
    target = case.target.cpu().numpy().reshape(-1).astype(np.int64)
    valid, weight, exact = _weights(case, target)
    if case.linear:
        x, e_x = _logits(case, valid, eps)
    else:
        x = array(case.logits).reshape(len(target), case.inputs[0].size[-1])
        x = np.where(valid[:, None], x, 0)  # what ignored rows hold is nobody's business
        e_x = np.zeros_like(x)
    rows = softmax_rows(
        x, e_x, np.where(valid, target, 0), eps, options.get("logit_scale", 1.0), options.get("softcap")
    )
    rule = _rule(case)
    kept, ambiguous = kept_by_rule(rows, rule, eps)
    ambiguous &= weight != 0
    if stats is not None:
        kept = np.where(ambiguous, stats.kept.cpu().numpy().reshape(-1), kept)
    elif ambiguous.any():
        raise Undecided
    kept = kept & (weight != 0)

    reduction, denominator = options.get("reduction", "mean"), options.get("denominator", "valid")
    scale, spread, counted = weight, 0.0, kept
    if reduction == "mean":
        if isinstance(denominator, str):
            part = weight * (kept if denominator == "kept" else valid)
            total = part.sum()
            # Sums of weights are exact for the multiples of 1/64 that are drawn where they may cancel.
            spread = 0 if exact or total == 0 else eps * len(part) * np.abs(part).sum() / abs(total)
        else:
            total = float(denominator)
        scale = weight / total if total else 0 * weight
        if not total:  # nothing to divide by: loss and gradients are 0, and no row has a gradient
            counted = np.zeros_like(kept)
            kept = kept if denominator == "kept" else counted
    upstream = case.upstream.double().cpu().numpy()
    upstream = np.broadcast_to(upstream.reshape(-1), weight.shape)
    result = loss_and_gradient(
        rows, counted, scale, upstream, rule, eps, options.get("z_loss", 0.0), options.get("label_smoothing", 0.0)
    )
    wanted = _loss(result, shape, reduction, spread, eps)
    dx, e_dx = result.dx, result.e_dx + spread * np.abs(result.dx)
    if case.backend == "reference" and options.get("z_loss"):
        # Autograd's gradient of logsumexp is exp(z - lse), with all the digits that lse has lost.
        lost = np.expm1(np.minimum(2 * eps * np.abs(rows.lse) + rows.e_lse, 50))
        of_lse = np.abs(upstream * scale * 2 * options["z_loss"] * rows.lse * lost)
        e_dx = np.where(e_dx > 0, e_dx + of_lse[:, None] * np.abs(rows.slope) * (rows.p + rows.e_p), 0)
    # A row of upstream gradient 0 is not read where that is known before; made before, 0 * NaN stays NaN.
    unread = counted & rows.bad & (upstream == 0)
    dx, e_dx = np.where(unread[:, None], 0, dx), np.where(unread[:, None], 0, e_dx)
    if not (reduction == "none" and case.backend != "reference"):
        e_dx = np.where(unread[:, None], np.inf, e_dx)
    if case.linear:
        _head_gradients(case, wanted, dx, e_dx, counted, eps, abs(total) if reduction == "mean" else 1)
    else:
        dx, e_dx = _rounded(dx, e_dx, case, case.dtype, _times_rounded(case))
        wanted["d logits"] = dx.reshape(case.inputs[0].size), e_dx.reshape(case.inputs[0].size)
    if stats is not None:
        _statistics(case, wanted, rows, x, e_x, valid, kept, eps)
    return wanted


def _times_rounded(case):
    """Once; twice for a bfloat16 mean or sum whose upstream gradient is not a power of 2, as documented."""
    scalar = case.options.get("reduction", "mean") != "none"
    twice = case.dtype == torch.bfloat16 and scalar and case.backend != "reference"
    return 2 if twice and not np.log2(abs(case.upstream.item()) or 1).is_integer() else 1


def _rounded(value, bound, case, dtype, times=1):
    """The bound after roundings to a 16-bit type; what autograd rounds to 32 bits or more is in the bound already."""
    if eps_of(dtype) > 1e-6:
        bound = bound + times * _ulps(case, dtype) * eps_of(dtype) * (np.abs(value) + bound)
    return value, np.where(bound > 0, bound + SMALLEST[dtype], 0)


def _loss(result, shape, reduction, spread, eps):
    bound = result.e_loss + spread * np.where(np.isfinite(result.loss), np.abs(result.loss), 0)
    if reduction == "none":
        return {"loss": (result.loss.reshape(shape), bound.reshape(shape))}
    size = np.abs(result.loss[np.isfinite(result.loss)])
    bound = bound.sum() + len(result.loss) * eps * size.sum()
    if (size > 1e37).any():  # finite here, infinite in float32, and so perhaps inf - inf
        bound = np.inf
    return {"loss": (result.loss.sum(), np.asarray(bound))}


def _holds(dtype, values):
    return array(torch.from_numpy(values).to(dtype)) == values


def _logits(case, valid, eps):
    """Logits [N, V] of the linear losses, in the numbers that the matmul sees, and their error."""
    x, W, b = case.matmul_inputs()
    x = np.where(valid[:, None], x, 0)
    product = x @ W.T
    size = np.abs(np.where(np.isfinite(x), x, 0)) @ np.abs(W).T
    with_bias = product if b is None else product + b
    e = eps * (W.shape[1] / 2 + 2) * (size + (0 if b is None else np.where(np.isfinite(b), np.abs(b), 0)))
    m = case.matmul_dtype
    if eps_of(m) > 1e-6:  # rounded after the product and, where that is a step of its own, after the bias
        for value in [product] if b is None else [product, with_bias]:
            off = np.where(_holds(m, value), 0, eps_of(m) / 2 * np.abs(value) + SMALLEST[m])
            e = e * (1 + eps_of(m)) + np.where(np.isfinite(value), off, 0)
    return with_bias, np.where(np.isfinite(with_bias), e, 0)


def _head_gradients(case, wanted, dlogits, e, counted, eps, total):
    """dlogits times weight and input, with every rounding on the way where the matmuls have 16 bits."""
    x, W, _ = case.matmul_inputs()
    m, n = case.matmul_dtype, len(dlogits)
    narrow = eps_of(m) > 1e-6
    once = _ulps(case, m) * eps_of(m) if narrow else 0.0
    half = eps_of(m) / 2 if narrow else eps
    # In forward, float16 gradients are made for an upstream gradient of 1 and divided last, so they underflow late.
    factor = abs(case.upstream.item()) / (total or 1) if case.in_forward else 1.0
    smallest = SMALLEST[m] * factor
    e = np.where(counted[:, None], e + once * (np.abs(dlogits) + e) + smallest, 0)
    size = np.abs(dlogits) + e
    if m == torch.float16:  # out of its range
        e = np.where(size > 6e4 * max(factor, 1e-30), np.inf, e)
    x = np.where(counted[:, None], x, 0)
    size_x, size_W = np.abs(x), np.abs(W)

    def finish(name, tensor, value, bound, size, n_terms, n_sums, of_sum):
        """n_sums roundings of what is added up, one of the sum in its dtype and one in that of the tensor."""
        if tensor is None or not tensor.requires_grad:
            return
        bound = bound + summation(n_terms, eps) * size + n_sums * (half * size + smallest * (size > 0))
        narrow_sum = eps_of(of_sum) > 1e-6
        bound = bound + size * (_ulps(case, of_sum) * eps_of(of_sum) if narrow_sum and case.in_forward else 2 * eps)
        if eps_of(tensor.dtype) > 1e-6 or tensor.dtype != of_sum:
            bound = bound + _ulps(case, tensor.dtype) * eps_of(tensor.dtype) * (np.abs(value) + bound)
            bound = bound + SMALLEST[tensor.dtype] * (size > 0)
        bound = np.where(np.isnan(bound), np.inf, bound)
        if m == torch.float16:
            bound = np.where(size > 6e4 * max(min(factor, 1), 1e-30), np.inf, bound)
        wanted[name] = value.reshape(tuple(tensor.shape)), bound.reshape(tuple(tensor.shape))

    with np.errstate(all="ignore"):
        # The gradient of the input is scaled by the upstream gradient in the dtype of the matmul, under autocast too.
        e_input = e @ size_W + SMALLEST[m] * (counted[:, None] if narrow else 0)
        finish("d input", case.leaves[0], dlogits @ W, e_input, size @ size_W, W.shape[0], narrow, m)
        # The products of chunks are rounded, and so is what they add up to where `accumulate_dtype` is narrow, or
        # where autograd adds up.
        of_sum = torch.promote_types(case.options.get("accumulate_dtype", torch.float32), m)
        of_sum = m if case.backend == "reference" else of_sum
        sums = case.n_chunks if eps_of(of_sum) > 1e-6 else 0
        size_dW, size_db = size.T @ size_x, size.sum(0)
        finish("d linear_weight", case.leaves[1], dlogits.T @ x, e.T @ size_x, size_dW, n, sums + narrow, of_sum)
        finish("d linear_bias", case.leaves[2], dlogits.sum(0), e.sum(0), size_db, n, sums, of_sum)


def _statistics(case, wanted, rows, x, e_x, valid, kept, eps):
    shape = tuple(case.target.shape)
    index = np.arange(len(valid))
    log_prob = np.where(valid, rows.s, 0)
    wanted["stats.log_prob"] = log_prob, np.where(valid & ~rows.bad, rows.e_s, 0)
    # A row with +inf has no logsumexp that anybody could use: inf or NaN.
    e_lse = np.where(np.isposinf(rows.z).any(1) & valid, np.inf, np.where(valid, rows.e_lse, 0))
    wanted["stats.lse"] = np.where(valid, rows.lse, 0), np.where(np.isneginf(rows.lse), 0, e_lse)
    wanted["stats.kept"] = kept, 0 * kept
    wanted["stats.valid"] = valid, 0 * valid
    z_t, e_t = rows.z[index, rows.target], rows.e_z[index, rows.target]
    top = rows.z.max(1)
    e_top = rows.e_z[index, np.argmax(rows.z, 1)]
    correct = (z_t == top) & valid & ~rows.bad
    same = x == x[index, rows.target][:, None] if not case.linear else np.zeros(x.shape, bool)
    same[index, rows.target] = True
    rival = np.where(same, -np.inf, rows.z + rows.e_z).max(1)
    decided = np.where(correct, z_t - e_t > rival, z_t + e_t < top - e_top) | ~valid | rows.bad
    if not case.linear and case.options.get("softcap") is None and case.options.get("logit_scale", 1.0) == 1:
        decided[:] = True
    wanted["stats.correct"] = correct, np.where(decided, 0, np.inf)
    for name in ("log_prob", "lse", "kept", "valid", "correct"):
        wanted[f"stats.{name}"] = tuple(np.asarray(part, float).reshape(shape) for part in wanted[f"stats.{name}"])
    n_valid, n_kept = valid.sum(), kept.sum()
    over = max(n_valid, 1)
    small = eps_of(torch.float32)
    wanted["stats.n_valid"] = np.asarray(float(n_valid)), np.asarray(0.0)
    wanted["stats.n_kept"] = np.asarray(float(n_kept)), np.asarray(0.0)
    wanted["stats.truncated_fraction"] = np.asarray((n_valid - n_kept) / over), np.asarray(small)
    unsure = np.asarray((~decided).sum() / over + small)
    wanted["stats.accuracy"] = np.asarray(correct.sum() / over), unsure
    p = np.where(valid, np.exp(rows.s), 0)
    off = np.where(valid & ~rows.bad, np.expm1(np.minimum(rows.e_s, 50)) * np.where(rows.bad, 0, p), 0).sum() / over
    off = off + summation(len(valid), eps) * np.where(rows.bad, 0, p).sum() / over + TINY
    wanted["stats.mean_confidence"] = np.asarray(p.sum() / over), np.asarray(off)
