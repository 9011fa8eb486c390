"""The fast backends against the float64 reference: shapes, dtypes, strides, every option and every pair of options."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    FAST,
    assert_linear_matches_reference,
    assert_matches_reference,
    cross_entropy,
    focal,
    linear_truncated,
    loss_and_gradient,
    make_inputs,
    make_linear_inputs,
    option_values,
    truncated,
)

import tce_kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None
LOSSES = [cross_entropy, truncated, focal]
# Rows of a single class, of less than a block, and twice of two to four blocks and a tail, by the dtype.
SHAPES = [(5, 1), (9, 33), (6, 8195), (3, 20011)]

N, V = 8, 199  # with `small_blocks`: three full blocks and a tail in a row, one row or so a block on the CPU


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FAST)
def test_matches_the_float64_reference(backend, loss, dtype, shape, device):
    assert_matches_reference(loss, *make_inputs(*shape, dtype, device), backend=backend)


@pytest.mark.parametrize("loss", LOSSES)
def test_torch_backend_matches_the_reference_in_float64(loss, device, small_blocks):
    assert_matches_reference(loss, *make_inputs(N, V, torch.float64, device), backend="torch")


PAIRS = list(itertools.combinations_with_replacement(range(14), 2))


def allowed(options, loss):
    smoothing = "label_smoothing" in options
    return not (
        (smoothing and ("weight" in options or loss is focal))
        or ("reduction" in options and "denominator" in options)
        or ("inplace" in options and "allow_retain_graph" in options)
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "loss, dtype", [(truncated, torch.float32), (truncated, torch.bfloat16), (focal, torch.bfloat16)]
)
def test_every_option_and_every_pair_of_options(backend, loss, dtype, device, small_blocks):
    values = [*option_values(N, V, device), ("inplace", True)]
    tried = 0
    for first, second in PAIRS:
        (name, value), (other_name, other_value) = values[first], values[second]
        if name == other_name and first != second:
            continue
        options = {name: value, other_name: other_value}
        if not allowed(options, loss):
            continue
        logits, target = make_inputs(N, V, dtype, device, seed=first)
        target[target == -100] = options.get("ignore_index", -100)
        assert_matches_reference(loss, logits, target, backend=backend, **options)
        tried += 1
    assert tried > 60


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("backend", FAST)
def test_focal_gradient_is_finite_and_right_for_every_gamma(backend, gamma, device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits[0, target[0]] = 60.0  # p rounds to 1
    logits[1, target[1]] = -float("inf")  # p is 0
    _, gradient = loss_and_gradient(focal, logits, target, gamma=gamma, reduction="none", backend=backend)
    assert gradient.isfinite().all()
    assert_matches_reference(focal, logits, target, gamma=gamma, alpha=0.25, reduction="none", backend=backend)


LAYOUTS = {
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 5))[:, : x.shape[1]],
    "aligned padded rows": lambda x: torch.nn.functional.pad(x, (0, -x.shape[1] % 16 + 16))[:, : x.shape[1]],
    "unaligned start": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "shared row": lambda x: x[:1].expand(x.shape),
    "transposed batch": lambda x: x.view(2, 4, -1).transpose(0, 1).contiguous().transpose(0, 1),
    "one of several": lambda x: torch.nn.functional.pad(x.view(2, 1, 4, -1), (0, 5, 0, 1, 1, 2))[:, 1:2, :-1, :-5],
    "shifted": lambda x: torch.nn.functional.pad(x.view(2, 4, -1), (0, 0, 0, 1))[:, :-1],
}


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FAST)
def test_rows_may_be_strided(backend, layout, options, device, small_blocks):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    logits = LAYOUTS[layout](logits)
    if layout == "shared row" and options.get("inplace"):
        with pytest.raises(ValueError, match="inplace must be False for logits whose rows share memory"):
            truncated(logits, target, backend=backend, **options)
        return
    target = target.view(logits.shape[:-1])
    assert_matches_reference(truncated, logits, target, backend=backend, **options)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "shared row"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", FAST)
def test_inplace_writes_the_gradient_over_strided_logits(backend, reduction, layout, device, small_blocks):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    logits = LAYOUTS[layout](logits)
    target = target.view(logits.shape[:-1])
    _, gradient = loss_and_gradient(truncated, logits, target, reduction=reduction, backend=backend)
    logits.requires_grad_()
    value = truncated(logits, target, reduction=reduction, inplace=True, backend=backend)
    value.backward((0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(1))).to(value))
    assert torch.equal(logits.detach(), logits.grad)
    # Alignment decides where blocks start, and with them the order of a sum.
    torch.testing.assert_close(logits.grad, gradient, atol=1e-7, rtol=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("backend", FAST)
def test_rows_beyond_32_bit_offsets(backend, device):
    """Three rows of 40 logits in 2^31 + 80 elements of memory, of which only the rows' pages are ever touched."""
    if device.type == "cuda":
        memory = torch.empty(2**31 + 80, dtype=torch.bfloat16, device=device)
    else:
        memory = torch.from_numpy(np.empty(2**31 + 80, dtype=np.int16)).view(torch.bfloat16)
    logits = memory.as_strided((3, 40), (2**30, 1))
    values, target = make_inputs(3, 40, torch.bfloat16, device)
    target[2] = 5  # not ignored: its offset is the one beyond 32 bits
    logits.copy_(values)
    compact = loss_and_gradient(truncated, values, target, backend=backend, reduction="none")
    strided = loss_and_gradient(truncated, logits, target, backend=backend, reduction="none")
    assert torch.equal(strided[0], compact[0])
    assert torch.equal(strided[1], compact[1])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_threshold_one_is_cross_entropy(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits[0, target[0]] += 40  # p rounds to 1: still not truncated
    value, stats = tce_kernels.truncated_cross_entropy(logits, target, 1.0, return_stats=True, backend=backend)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, target))
    assert stats.n_kept == stats.n_valid
    assert stats.truncated_fraction == 0


@pytest.mark.parametrize("side", [-1, 0, 1])
@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_ulp_either_side_of_the_threshold(backend, dtype, side, device):
    """p_t > threshold is dropped, p_t == threshold kept, with the mask decided in float32."""
    logits, target = make_inputs(N, V, dtype, device)
    target[target == -100] = 0
    _, stats = tce_kernels.truncated_cross_entropy(logits, target, 1.0, return_stats=True, backend=backend)
    for row in range(N):
        log_prob = stats.log_prob[row].cpu()
        if not -20 < log_prob < -1e-4:
            continue
        neighbour = log_prob
        if side:
            neighbour = torch.nextafter(log_prob, torch.tensor(side * torch.inf))
        threshold = neighbour.double().exp().to(device)  # log(threshold) rounds to `neighbour` in float32
        assert threshold.log().float() == neighbour.to(device)
        for given in (threshold, threshold.item()):
            _, at = tce_kernels.truncated_cross_entropy(logits, target, given, return_stats=True, backend=backend)
            assert at.kept[row].item() == (side >= 0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_logarithm_of_a_threshold_is_not_rounded_to_its_dtype(backend, device):
    threshold = torch.tensor(0.9, dtype=torch.bfloat16, device=device)
    log, rounded = threshold.double().log(), threshold.log().double()
    assert log != rounded
    p = ((log + rounded) / 2).exp()  # between the two
    logits = torch.stack([p, 1 - p]).log().float()[None]
    target = torch.zeros(1, dtype=torch.int64, device=device)
    _, stats = tce_kernels.truncated_cross_entropy(logits, target, threshold, return_stats=True, backend=backend)
    assert stats.kept.item() == (p <= threshold.double()).item()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_label_smoothing_of_one(backend, linear, device):
    """The target counts only through the rule then."""
    if linear:
        inputs = make_linear_inputs(N, 6, V, torch.float32, device)
        assert_linear_matches_reference(linear_truncated, *inputs, backend=backend, label_smoothing=1)
    else:
        assert_matches_reference(
            truncated, *make_inputs(N, V, torch.float32, device), backend=backend, label_smoothing=1
        )


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_tensor_threshold_is_the_same_as_a_number(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    number = loss_and_gradient(truncated, logits, target, threshold=0.5, backend=backend)
    tensor = loss_and_gradient(truncated, logits, target, threshold=torch.tensor(0.5, device=device), backend=backend)
    assert torch.equal(number[0], tensor[0])
    assert torch.equal(number[1], tensor[1])


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"denominator": "kept"}])
@pytest.mark.parametrize("backend", FAST)
def test_two_runs_give_the_same_bits(backend, options, device):
    logits, target = make_inputs(9, 9001, torch.bfloat16, device)
    first = loss_and_gradient(truncated, logits, target, backend=backend, **options)
    second = loss_and_gradient(truncated, logits, target, backend=backend, **options)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", [{}, {"softcap": 9.0, "logit_scale": 1.3}])
def test_stats_match_the_reference(backend, loss, options, device, small_blocks):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    for requires_grad in (False, True):
        logits.requires_grad_(requires_grad)
        _, stats = loss(logits, target, return_stats=True, backend=backend, **options)
        _, exact = loss(logits.detach().double(), target, return_stats=True, backend="reference", **options)
        assert stats.log_prob.dtype == torch.float32
        for name in ("kept", "correct", "valid", "n_valid", "n_kept"):
            assert torch.equal(getattr(stats, name), getattr(exact, name)), name
        for name in ("log_prob", "lse", "truncated_fraction", "accuracy", "mean_confidence"):
            value, want = getattr(stats, name), getattr(exact, name)
            assert not value.requires_grad
            torch.testing.assert_close(value.double(), want.double(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_stats_say_what_they_say(backend, device):
    """Two of four valid rows truncated, three right, by hand."""
    p = torch.tensor([[0.95, 0.03, 0.02], [0.05, 0.92, 0.03], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    target = torch.tensor([0, 1, 1, 2, -100])
    _, stats = truncated(p.log().to(device), target.to(device), threshold=0.9, return_stats=True, backend=backend)
    assert stats.kept.tolist() == [False, False, True, True, False]
    assert stats.correct.tolist() == [True, True, False, True, False]
    assert (stats.n_valid.item(), stats.n_kept.item()) == (4, 2)
    assert stats.truncated_fraction.item() == 0.5
    assert stats.accuracy.item() == 0.75
    assert stats.mean_confidence.item() == pytest.approx((0.95 + 0.92 + 0.2 + 0.8) / 4, rel=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_float16_gradients_survive_the_mean(backend, device):
    """1 / N times a small p underflows in float16; a gradient scaler's factor has to come before the rounding."""
    logits, target = make_inputs(64, 500, torch.float16, device)
    logits.requires_grad_()
    scale = 2.0**14
    (truncated(logits, target, backend=backend) * scale).backward()
    exact = logits.detach().double().requires_grad_()
    (truncated(exact, target, backend="reference") * scale).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=2e-6, rtol=2**-10 + 1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_gradient_of_a_row_sums_to_zero_and_ignores_shifts(backend, device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    _, gradient = loss_and_gradient(truncated, logits, target, backend=backend, reduction="none")
    assert gradient.sum(-1).abs().max() < 2e-6
    _, shifted = loss_and_gradient(truncated, logits + 3, target, backend=backend, reduction="none")
    torch.testing.assert_close(gradient, shifted, atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "loss, options",
    [
        (truncated, {}),
        (truncated, {"reduction": "none", "inplace": True}),
        (truncated, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}),
        (focal, {"denominator": "kept"}),
    ],
)
def test_programs_that_share_a_row(loss, options, dtype, device, small_blocks, monkeypatch):
    """Fewer rows than multiprocessors: each row is split, with the same bits every time."""
    from tce_kernels import triton_ops

    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (16, 2**30))
    splits = []
    row_loss = triton_ops.row_loss

    def watched(logits, *arguments, **options):
        splits.append(triton_ops._n_splits(logits))
        return row_loss(logits, *arguments, **options)

    monkeypatch.setattr(triton_ops, "row_loss", watched)
    for V in (129, 320):  # two blocks and a tail; five full ones
        logits, target = make_inputs(3, V, dtype, device)
        assert_matches_reference(loss, logits, target, backend="triton", **options)
        runs = [loss_and_gradient(loss, logits, target, backend="triton", **options) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert set(splits) == {2, 4}
