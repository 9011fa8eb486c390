"""Values, targets and shapes that break cross-entropy kernels."""

import math

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    DTYPES,
    FAST,
    assert_matches_reference,
    cross_entropy,
    focal,
    loss_and_gradient,
    make_inputs,
    needs_triton,
    truncated,
)
from hypothesis import HealthCheck, Phase, given, settings

import tce_kernels

BACKENDS = ["reference", *FAST]
N, V = 6, 199
HOSTILE = [math.inf, -math.inf, math.nan, 3e38, -3e38, 1e30, -1e30, -1e9, 6e4, -6e4, 1e-41, 0.0, -0.0, 88.0, 1e4]


def run(logits, target, backend, loss=truncated, **options):
    return loss_and_gradient(loss, logits, target, backend=backend, **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"allow_retain_graph": True}])
@pytest.mark.parametrize("backend", FAST)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in the interpreter
)
@given(data=st.data())
def test_any_shape_dtype_options_and_values(backend, options, data, device, small_blocks):
    """The definition decides, wherever float64 says that the row is finite; rows that are not do not touch others."""
    N, V = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 150))
    dtype = data.draw(st.sampled_from(DTYPES))
    logits, target = make_inputs(max(N, 1), V, dtype, device, seed=data.draw(st.integers(0, 10**6)))
    logits, target = logits[:N], target[:N].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    for _ in range(data.draw(st.integers(0, 4)) if N else 0):
        row, column = data.draw(st.integers(0, N - 1)), data.draw(st.integers(0, V - 1))
        logits[row, column] = data.draw(st.sampled_from(HOSTILE))
    loss, extra = data.draw(
        st.sampled_from(
            [
                (truncated, {}),
                (truncated, {"label_smoothing": 0.2}),
                (cross_entropy, {}),
                (focal, {}),
                (focal, {"gamma": 0.5}),
            ]
        )
    )
    extra = dict(
        extra, softcap=data.draw(st.sampled_from([None, 7.0])), logit_scale=data.draw(st.sampled_from([1.0, 0.5]))
    )

    value, gradient = run(logits, target, backend, loss, **options, **extra)
    exact, exact_gradient = run(logits.double(), target, "reference", loss, reduction="none", **extra)
    finite = (exact.isfinite() & exact_gradient.isfinite().all(-1)) | (target == -100)
    assert gradient[finite].isfinite().all()
    assert (gradient[target == -100] == 0).all()
    # Where |z| is huge, float32 has few digits left for z: only rows of ordinary size are compared closely.
    ordinary = finite & (logits.nan_to_num(0, 0, 0).abs().amax(-1) < 100) if N else finite
    if ordinary.any():
        assert_matches_reference(loss, logits[ordinary], target[ordinary], backend=backend, **options, **extra)
    if options.get("reduction") == "none":
        assert value[~finite].isnan().eq(exact[~finite].isnan()).all()


@pytest.mark.parametrize("loss", [truncated, cross_entropy, focal])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_spoils_itself_only(backend, reduction, loss, device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    target[target == -100] = 3
    clean = run(logits, target, backend, loss, reduction="none")
    logits[1] = -math.inf
    logits[3, 70] = math.inf
    logits[4, 190] = math.nan
    bad = torch.tensor([False, True, False, True, True, False], device=device)
    value, gradient = run(logits, target, backend, loss, reduction=reduction)
    assert value.isnan().all() if reduction == "sum" else torch.equal(value.isnan(), bad)
    assert gradient[bad].isnan().all()
    assert gradient[~bad].isfinite().all()
    if reduction == "none":
        assert torch.equal(value[~bad], clean[0][~bad])
        assert torch.equal(gradient[~bad], clean[1][~bad])
    _, stats = loss(logits, target, return_stats=True, backend=backend)
    assert stats.kept[bad].all()
    assert not stats.correct[bad].any()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}, {"allow_retain_graph": True}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_contain_their_nan(backend, options, device, small_blocks):
    """Ignored rows and rows of zero weight have a gradient of exact zeros whatever they hold."""
    logits, target = make_inputs(N, V, torch.float32, device)
    token_weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], device=device)
    logits[1], logits[4, 7] = math.nan, math.inf
    logits[2] = math.nan  # ignored
    value, gradient = run(logits, target, backend, token_weight=token_weight, **options)
    assert value.isfinite().all()
    assert (gradient[[1, 2, 4]] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("mask", [-math.inf, -3.4e38, -1e30, -1e9])
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton, shared rows", marks=needs_triton)])
def test_masked_vocabulary(backend, mask, device, small_blocks, monkeypatch):
    """-inf logits, and numbers that stand for it: whole blocks of them, first, middle and last, next to the target."""
    if backend == "triton, shared rows":
        from tce_kernels import triton_ops

        monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (64, 2**30))
        backend = "triton"
    logits, target = make_inputs(N, V, torch.float32, device)
    target = torch.full_like(target, 130)
    for row, columns in enumerate([slice(0, 70), slice(64, 128), slice(131, 199), slice(0, 130), slice(140, 141)]):
        logits[row, columns] = mask
    value, gradient = run(logits, target, backend, reduction="none")
    exact, exact_gradient = run(logits.double(), target, "reference", reduction="none")
    torch.testing.assert_close(value.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-6, rtol=1e-5)
    assert (gradient[logits == mask] == 0).all()


@pytest.mark.parametrize("loss, options", [(cross_entropy, {}), (truncated, {"label_smoothing": 0.1}), (focal, {})])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_target_has_an_infinite_loss_and_a_finite_gradient(backend, loss, options, device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits[0, target[0]] = -math.inf
    value, gradient = run(logits, target, backend, loss, reduction="none", **options)
    assert value[0] == math.inf
    exact = run(logits.double(), target, "reference", loss, reduction="none", **options)
    torch.testing.assert_close(gradient.double(), exact[1], atol=1e-6, rtol=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 1.4e9, 1.6e9, -1.6e9, 1e30, 3e38, -3e38])
@pytest.mark.parametrize("backend", FAST)
def test_huge_logits_lose_no_digits(backend, offset, device, small_blocks):
    """Only differences of logits count, so their common size must not cost precision."""
    logits = torch.full((3, V), offset, device=device)
    step = offset - math.copysign(1, offset) * 2.0 ** (math.floor(math.log2(abs(offset))) - 23)
    logits[1, 5] = step
    target = torch.tensor([4, 5, 6], device=device)
    value, gradient = run(logits, target, backend, cross_entropy, reduction="none")
    exact, exact_gradient = run(logits.double(), target, "reference", cross_entropy, reduction="none")
    torch.testing.assert_close(value.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=1e-6, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("bad", [-1, V, V + 1, -101, 2**31 - 1, 2**40])
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"reduction": "none"}])
def test_bad_target_on_triton_is_nan_in_its_row_only(bad, options, device, small_blocks):
    if bad == 2**40:
        logits, target = make_inputs(N, V, torch.float32, device)
    else:
        logits, target = make_inputs(N, V, torch.float32, device)
        target = target.int()
    target[1] = bad
    value, gradient = run(logits, target, "triton", **options)
    assert value[1].isnan() if value.dim() else value.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("bad", [-1, V, -101])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_target_on_a_cpu_is_an_index_error_that_names_it(backend, inplace, bad):
    logits, target = make_inputs(N, V, torch.float32, "cpu")
    logits, target = logits.view(2, 3, V).requires_grad_(), target.view(2, 3)
    target[1, 2] = bad
    before = logits.detach().clone()
    with pytest.raises(IndexError, match=rf"target must be in \[0, {V}\) .*got {bad} at position \[1, 2\]"):
        truncated(logits, target, inplace=inplace, backend=backend)
    assert torch.equal(logits, before)
    with torch.no_grad(), pytest.raises(IndexError, match="at position"):
        truncated(logits, target, backend=backend)


@pytest.mark.parametrize("loss", [truncated, focal])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5), (3, 2, 0, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, shape, reduction, loss, device):
    logits = torch.zeros(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(shape[:-1], device=device, dtype=torch.int64)
    value, stats = loss(logits, target, reduction=reduction, return_stats=True, backend=backend)
    assert value.shape == (shape[:-1] if reduction == "none" else ())
    assert (value == 0).all()
    value.sum().backward()
    assert logits.grad.shape == shape
    assert stats.n_valid == 0
    assert stats.truncated_fraction == stats.accuracy == stats.mean_confidence == 0


ZERO = {
    "all ignored": dict(target=-100),
    "all truncated": dict(threshold=1e-6),
    "no weight": dict(token_weight=0.0),
    "number 0": dict(denominator=0),
    "tensor 0": dict(denominator=torch.tensor(0.0)),
    "none kept": dict(threshold=1e-6, denominator="kept"),
}


@pytest.mark.parametrize("case", ZERO)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_denominator_is_a_connected_zero(backend, case, device, small_blocks):
    options = dict(ZERO[case])
    logits, target = make_inputs(N, V, torch.float32, device)
    logits[torch.arange(N), target.clamp(0)] = 5.0
    if "target" in options:
        target = torch.full_like(target, options.pop("target"))
    if "token_weight" in options:
        options["token_weight"] = torch.zeros(N, device=device)
    value, gradient = run(logits, target, backend, **options)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", FAST)
def test_single_row_without_batch_dimension(backend, device):
    logits, target = make_inputs(1, V, torch.float32, device)
    target[0] = 3
    assert_matches_reference(truncated, logits[0], target[0], backend=backend)
    assert_matches_reference(truncated, logits[0], target[0], backend=backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_class_has_no_loss(backend, device):
    target = torch.zeros(4, dtype=torch.int64, device=device)
    for logits in (torch.randn(4, 1, device=device), torch.randn(1, 4, device=device).t()):  # whose stride says nothing
        value, stats = tce_kernels.truncated_cross_entropy(logits, target, 1.0, return_stats=True, backend=backend)
        assert value == 0
        assert stats.kept.all()


@pytest.mark.parametrize("below", [86.0, 90.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_of_subnormal_probability_keeps_its_digits(backend, below, device):
    """exp(-88) is the smallest normal float32; the loss is about `below`, which float32 holds to 8e-6."""
    logits = torch.zeros(2, 5, device=device)
    logits[:, 3], logits[:, 1] = -below, torch.tensor([0.0, 1.5], device=device)
    target = torch.tensor([3, 3], device=device)
    value, _ = run(logits, target, backend, cross_entropy, reduction="none")
    want, _ = run(logits.double(), target, "reference", cross_entropy, reduction="none")
    torch.testing.assert_close(value.double(), want, atol=0, rtol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", FAST)
def test_a_row_does_not_depend_on_its_neighbours(backend, device):
    """Not in its last bit either, whatever takes another way in the rows beside it."""
    logits, target = make_inputs(N, V, torch.float32, device)
    target[target == -100] = 1
    hostile = logits.clone()
    hostile[0, target[0]], hostile[2, 3], hostile[4] = -120.0, math.nan, -math.inf
    plain, beside = (
        loss_and_gradient(truncated, x, target, backend=backend, reduction="none") for x in (logits, hostile)
    )
    untouched = [1, 3, 5]
    for one, other in zip(plain, beside, strict=True):
        assert torch.equal(one[untouched], other[untouched])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignore_index_beyond_the_dtype_of_the_target_ignores_nothing(backend, dtype, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    target[target == -100] = 0  # which is what 2^40 is in 32 bits
    want = run(logits, target, backend, reduction="none")
    got = run(logits, target.to(dtype), backend, reduction="none", ignore_index=2**40)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"softcap": 5.0}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_may_hold_anything(backend, reduction, options, bad, device, small_blocks):
    """Ignored, of weight 0, or of upstream gradient 0: exact zeros, and NaN in their weight is not seen."""
    logits, target = make_inputs(N, V, torch.float32, device)
    token_weight = torch.ones(N, device=device)
    token_weight[target == -100] = math.nan
    token_weight[1] = 0
    logits[target == -100], logits[1, 3], logits[3, 4] = bad, bad, bad
    leaf = logits.requires_grad_()
    value = truncated(leaf, target, token_weight=token_weight, reduction=reduction, backend=backend, **options)
    dead = (target == -100) | (token_weight == 0)
    if reduction == "none":
        upstream = torch.ones_like(value)
        upstream[3] = 0
        dead[3] = True
        assert (value[(target == -100) | (token_weight == 0)] == 0).all()
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        assert gradient[~dead].isfinite().all() and gradient[~dead].any()
    else:
        (gradient,) = torch.autograd.grad(value, leaf)
    if backend != "reference" or reduction == "mean":  # 0 * NaN is what autograd makes of an upstream gradient of 0
        assert torch.equal(gradient[dead], torch.zeros_like(gradient[dead]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("denominator", [0, torch.tensor(0), "kept"])
@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_denominator_of_zero_is_zero_in_every_dtype(backend, bad, denominator, linear, dtype, device):
    """Also with rows of infinite or NaN loss. "kept" is 0 where the weights of the kept rows cancel out."""
    token_weight = torch.tensor([1.0, -1.0], device=device)
    target = torch.tensor([1, 2], device=device)
    if linear:
        input, weight = torch.ones(2, 4, dtype=dtype, device=device), torch.ones(5, 4, dtype=dtype, device=device)
        tensors = input.requires_grad_(), weight.requires_grad_()
        bias = torch.zeros(5, dtype=dtype, device=device)
        if bad is not None:
            bias[1:3] = bad
        value, stats = tce_kernels.linear_truncated_cross_entropy(
            *tensors, target, 1.0, linear_bias=bias, token_weight=token_weight, denominator=denominator,
            backend=backend, return_stats=True,
        )  # fmt: skip
    else:
        logits = torch.zeros(2, 5, dtype=dtype, device=device)
        if bad is not None:
            logits[:, 1:3] = bad
        tensors = (logits.requires_grad_(),)
        value, stats = tce_kernels.truncated_cross_entropy(
            *tensors,
            target,
            1.0,
            token_weight=token_weight,
            denominator=denominator,
            backend=backend,
            return_stats=True,
        )
    assert value == 0
    for gradient in torch.autograd.grad(value, tensors):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert stats.kept.tolist() == [isinstance(denominator, str)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_a_row_of_nothing_but_minus_infinity(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits[1] = -math.inf
    _, stats = truncated(logits, target, return_stats=True, backend=backend)
    assert stats.lse[1] == -math.inf
    assert stats.log_prob[1].isnan()
    assert not stats.correct[1] and stats.kept[1]


@pytest.mark.parametrize("backend", FAST)
def test_nan_in_a_row_of_upstream_gradient_0_reaches_no_gradient(backend, device):
    input, weight = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    target = torch.tensor([1, 0, 2], device=device)
    input[1] = math.nan
    tensors = input.requires_grad_(), weight.requires_grad_()
    value = tce_kernels.linear_truncated_cross_entropy(*tensors, target, 1.0, reduction="none", backend=backend)
    for gradient in torch.autograd.grad(value, tensors, torch.tensor([1.0, 0.0, 1.0], device=device)):
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_nan_in_an_ignored_row_of_the_input_reaches_no_gradient(backend, device):
    input, weight = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    target = torch.tensor([1, -100, 2], device=device)
    input[1] = math.nan
    tensors = input.requires_grad_(), weight.requires_grad_()
    value = tce_kernels.linear_truncated_cross_entropy(*tensors, target, 1.0, backend=backend)
    for gradient in torch.autograd.grad(value, tensors):
        assert gradient.isfinite().all() and gradient.any()
