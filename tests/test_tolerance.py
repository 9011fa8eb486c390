"""Gradients of the classes of the largest mass: within the tolerance, with every option, their sums exact."""

import itertools

import pytest
import torch
from cases import FAST, error_of, linear_focal, linear_loss_and_gradients, linear_truncated, needs_triton

import tce_kernels
from tce_kernels import gradients, head

N, D, V = 56, 16, 500


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few classes are left out even of a small vocabulary, in several chunks."""
    monkeypatch.setattr(gradients, "TILE_CLASSES", 8)


def make_head(dtype, device, spread=1.6, seed=0, n=N):
    """Targets are drawn from the model: some probable, some not. Larger logits are more concentrated."""
    generator = torch.Generator().manual_seed(seed)
    input, weight = spread * torch.randn(n, D, generator=generator), torch.randn(V, D, generator=generator)
    bias = torch.randn(V, generator=generator)
    target = (input @ weight.t() + bias).softmax(1).multinomial(1, generator=generator).squeeze(1)
    target[2::7] = -100
    return *(tensor.to(dtype).to(device) for tensor in (input, weight, bias)), target.to(device)


def exact_gradients(loss, input, weight, bias, target, /, **options):
    double = [tensor.double() for tensor in (input, weight, bias)]
    options = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return linear_loss_and_gradients(loss, *double, target, backend="reference", **options)[1]


def fraction(loss, *inputs, **options):
    tensors = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    return loss(*tensors, inputs[3], return_stats=True, **options)[1].class_fraction.item()


def token_weights(signed):
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3)) + 0.2
    return weights - 0.7 if signed else weights


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "kept": {"denominator": "kept"},
    "retained": {"allow_retain_graph": True},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 15.0},
    "scale": {"logit_scale": 0.8},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and softcap": {"label_smoothing": 0.1, "softcap": 15.0},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "token weights": {"token_weight": token_weights(False)},
    "negative weights": {"token_weight": token_weights(True)},
    "negative weights and smoothing": {"token_weight": token_weights(True), "label_smoothing": 0.1},
    "class weights": {"weight": torch.rand(V, generator=torch.Generator().manual_seed(4)) + 0.2},
    "wide total": {"accumulate_dtype": torch.float64},
}


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("loss", [linear_truncated, linear_focal])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", FAST)
def test_within_the_tolerance_with_every_option(backend, options, loss, device, small_blocks):
    if loss is linear_focal and "label_smoothing" in options:
        return
    slow = backend == "triton" and device.type == "cpu"  # in the interpreter the largest tolerance has to do
    if slow and loss is linear_focal:
        return
    inputs, options = make_head(torch.float32, device), on(device, options)
    exact = exact_gradients(loss, *inputs, **{k: v for k, v in options.items() if k != "accumulate_dtype"})
    value, dense = linear_loss_and_gradients(loss, *inputs, backend=backend, chunk_size=20, **options)
    for tolerance in (0.4,) if slow else (1e-7, 0.02, 0.1, 0.4):
        chosen = dict(backend=backend, chunk_size=20, gradient_tolerance=tolerance, **options)
        got, found = linear_loss_and_gradients(loss, *inputs, **chosen)
        assert torch.equal(got, value)
        for gradient, wanted in zip(found, exact, strict=True):
            assert error_of(gradient, wanted) <= max(2.5 * tolerance, 1e-5)
        # What the tails leave as it was: the sums of the columns, so the bias; of the rows: see below.
        torch.testing.assert_close(found[2], dense[2], rtol=1e-5, atol=1e-6 * dense[2].abs().max().item())
        if tolerance == 0.4 and not {"label_smoothing", "softcap"} <= set(options):
            assert not torch.equal(found[0], dense[0])  # something was left out
            if not slow and options.get("reduction") != "none" and "allow_retain_graph" not in options:
                assert fraction(loss, *inputs, **chosen) < 0.5
    if {"label_smoothing", "softcap"} <= set(options):  # all classes: such gradients have no sign
        assert torch.equal(found[0], dense[0])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"token_weight": token_weights(True)}])
@pytest.mark.parametrize("backend", FAST)
def test_sums_of_rows_and_of_columns_are_exact(backend, options, device, small_blocks):
    """A weight with a column of ones shows the sums of the rows, an input with one those of the columns."""
    input, weight, bias, target = make_head(torch.float32, device)
    input[:, 0], weight[:, 0] = 1, 1
    inputs, options = (input, weight, bias, target), on(device, options)
    exact = exact_gradients(linear_truncated, *inputs, **options)
    _, found = linear_loss_and_gradients(
        linear_truncated, *inputs, backend=backend, gradient_tolerance=0.4, chunk_size=20, **options
    )
    assert error_of(found[0], exact[0]) > 1e-2
    for gradient, wanted in zip(found[:2], exact[:2], strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient[:, 0].double(), wanted[:, 0], rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", FAST)
def test_16_bits_add_their_rounding_and_no_more(backend, options, dtype, device, monkeypatch, small_blocks):
    monkeypatch.setattr(head, "supported", lambda dtype, device: dtype)
    inputs = make_head(dtype, device)
    exact = exact_gradients(linear_truncated, *inputs, **options)
    eps, found = torch.finfo(dtype).eps, {}
    for tolerance, total in [(0.02, torch.float32), (0.4, torch.float32), (0.4, dtype)]:
        _, found[total] = linear_loss_and_gradients(
            linear_truncated, *inputs, backend=backend, gradient_tolerance=tolerance, chunk_size=20,
            accumulate_dtype=total, **options,
        )  # fmt: skip
        for gradient, wanted in zip(found[total], exact, strict=True):
            assert gradient.dtype == dtype
            assert error_of(gradient, wanted) <= 2.5 * tolerance + 6 * eps
    for narrow, wide in zip(found[dtype], found[torch.float32], strict=True):
        assert error_of(narrow, wide.double()) <= 6 * eps


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", FAST)
def test_autocast_leaves_the_sums_in_float32(backend, reduction, device, monkeypatch):
    """Of the same numbers in 16 bits it makes the same totals, and rounds what belongs to float32 tensors less."""
    monkeypatch.setattr(head, "supported", lambda dtype, device: dtype)
    *narrow, target = make_head(torch.bfloat16, device)

    def gradients_of(tensors):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        value = linear_truncated(
            *tensors, target, backend=backend, gradient_tolerance=0.2, chunk_size=20, reduction=reduction
        )
        return torch.autograd.grad(value.sum(), tensors)

    with torch.autocast(device.type, dtype=torch.bfloat16):
        wide = gradients_of([tensor.float() for tensor in narrow])
    for gradient, want in zip(wide, gradients_of(narrow), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.bfloat16(), want)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)])
@pytest.mark.parametrize("backend", FAST)
def test_frozen_tensors(backend, needs, device):
    inputs = make_head(torch.float32, device)
    options = dict(backend=backend, gradient_tolerance=0.2, chunk_size=20)
    _, all_of_them = linear_loss_and_gradients(linear_truncated, *inputs, **options)
    tensors = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(inputs[:3], needs, strict=True)]
    value = linear_truncated(*tensors, inputs[3], **options)
    value.backward((0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(1))).to(value))
    for tensor, want, needed in zip(tensors, all_of_them, needs, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            assert torch.equal(tensor.grad, want)


@pytest.mark.parametrize("backend", FAST)
def test_flat_logits_go_the_dense_way(backend, device):
    inputs = make_head(torch.float32, device, spread=0.01)
    inputs[2].zero_()
    options = dict(backend=backend, chunk_size=20)
    dense = linear_loss_and_gradients(linear_truncated, *inputs, **options)
    found = linear_loss_and_gradients(linear_truncated, *inputs, gradient_tolerance=0.1, **options)
    assert fraction(linear_truncated, *inputs, gradient_tolerance=0.1, **options) == 1
    for one, other in zip(dense[1], found[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", FAST)
def test_confident_rows_count_by_what_is_left_of_them(backend, device):
    """At p = 1 - 1e-3 a row's mass is 2e-3, and the tolerance is a share of that."""
    input, weight, bias, target = make_head(torch.float32, device)
    with torch.no_grad():
        logits = input @ weight.t() + bias
        target = logits.argmax(1)
        gap = logits.exp().sum(1) / logits.exp().amax(1) - 1
        input = torch.cat([input, torch.ones_like(input[:, :1])], 1)
        weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
        assert gap.min() < 0.05
    inputs = (input, weight, bias, target)
    exact = exact_gradients(linear_truncated, *inputs, threshold=1.0, logit_scale=3.0)
    _, found = linear_loss_and_gradients(
        linear_truncated, *inputs, threshold=1.0, logit_scale=3.0, gradient_tolerance=0.05, backend=backend
    )
    for gradient, wanted in zip(found, exact, strict=True):
        assert error_of(gradient, wanted) <= 2.5 * 0.05


@pytest.mark.parametrize("backend", FAST)
def test_second_calls_give_the_same_bits(backend, device):
    inputs = make_head(torch.float32, device)
    options = dict(backend=backend, gradient_tolerance=0.1, chunk_size=20)
    first, second = (linear_loss_and_gradients(linear_truncated, *inputs, **options)[1] for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", FAST)
def test_nan_reaches_what_it_reaches_without_a_tolerance(backend, device):
    input, weight, bias, target = make_head(torch.float32, device)
    input[5] = torch.nan
    found, dense = (
        linear_loss_and_gradients(
            linear_truncated, input, weight, bias, target, backend=backend, gradient_tolerance=tolerance
        )[1]
        for tolerance in (0.2, 0.0)
    )
    assert found[0][5].isnan().all() and found[1].isnan().all() and found[2].isnan().all()
    others = torch.arange(N, device=device) != 5
    assert torch.equal(found[0][others], dense[0][others])  # a chunk with NaN leaves nothing out


@pytest.mark.parametrize("backend", FAST)
def test_what_the_statistics_say(backend, device):
    inputs = make_head(torch.float32, device)
    options = dict(backend=backend, gradient_tolerance=0.2)
    few = fraction(linear_truncated, *inputs, **options)
    assert 0 < few < 0.7
    assert fraction(linear_truncated, *inputs, **options | {"gradient_tolerance": 0.4}) < few
    assert fraction(linear_truncated, *inputs, **options | {"gradient_tolerance": 0.0}) == 1
    assert fraction(linear_truncated, *inputs, **options, reduction="none") == 1
    assert fraction(linear_truncated, *inputs, **options, allow_retain_graph=True) == 1
    with torch.no_grad():
        stats = linear_truncated(*inputs, return_stats=True, **options)[1]
    assert stats.class_fraction.item() == 1 and stats.class_fraction.dtype == torch.float32
    reference = linear_truncated(*inputs, return_stats=True, backend="reference", gradient_tolerance=0.2)[1]
    assert reference.class_fraction.item() == 1
    # The classes that take part are as many as it says: the others' rows of the weight's gradient are those of a tail.
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    module = tce_kernels.LinearTruncatedCrossEntropyLoss(0.6, return_stats=True, **options)
    assert module(tensors[0], tensors[1], inputs[3], tensors[2])[1].class_fraction.item() == few


@pytest.mark.parametrize("backend", FAST)
def test_compiled_gives_what_eager_gives(backend, device):
    torch.compiler.reset()
    inputs = make_head(torch.float32, device)
    options = dict(backend=backend, gradient_tolerance=0.2, chunk_size=20)
    compiled = torch.compile(linear_truncated, fullgraph=True, backend="aot_eager")
    got, want = (linear_loss_and_gradients(loss, *inputs, **options) for loss in (compiled, linear_truncated))
    assert torch.equal(got[0], want[0]) and all(map(torch.equal, got[1], want[1]))


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), "0.1", None])
def test_bad_tolerances(tolerance):
    with pytest.raises((TypeError, ValueError), match="gradient_tolerance must be"):
        linear_truncated(*make_head(torch.float32, "cpu"), gradient_tolerance=tolerance)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_operations_of_triton(dtype, device):
    """Sums, packing and addition by the kernels against what they mean, for rows with gaps between them."""
    from tce_kernels import triton_ops

    generator = torch.Generator().manual_seed(0)
    n, V, wide = 70, 5000, 5008
    memory = torch.randn(n, wide, generator=generator).to(dtype).to(device)
    dlogits = memory[:, :V]
    groups = torch.stack([torch.arange(n) % 3 == 0, torch.arange(n) % 3 == 1]).to(device)
    want = torch.stack([dlogits[group].double().sum(0) for group in groups])
    memory[groups.logical_not().all(0)] = torch.nan  # of no group: not looked at
    torch.testing.assert_close(triton_ops.class_sums(dlogits, groups).double(), want, rtol=1e-5, atol=1e-5)

    memory = torch.randn(n, wide, generator=generator).to(dtype).to(device)
    dlogits, padding = memory[:, :V], memory[:, V:].clone()
    classes = torch.randperm(V, generator=generator)[:1800].sort().values.to(device)
    kept, others = dlogits[:, classes], torch.ones(V, dtype=torch.bool, device=device).index_fill(0, classes, False)
    sums = dlogits[:, others].double().sum(1)
    got = triton_ops.keep_classes(dlogits, classes)
    assert torch.equal(dlogits[:, :1800], kept) and torch.equal(memory[:, V:], padding)
    torch.testing.assert_close(got.double(), sums, rtol=1e-5, atol=1e-4)

    total, addend = torch.randn(V, 33, generator=generator).to(device), torch.randn(1800, 33, device=device)
    want = total.clone()
    want[classes] += addend
    triton_ops.add_rows(total, classes, addend)
    assert torch.equal(total, want)
