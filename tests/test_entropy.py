"""return_stats="entropy": -sum p log p of each row's softmax, whatever the loss is, and nothing else changed."""

import itertools
import math

import pytest
import torch
from cases import (
    DTYPES,
    FAST,
    focal,
    linear_focal,
    linear_loss_and_gradients,
    linear_truncated,
    loss_and_gradient,
    make_inputs,
    make_linear_inputs,
    needs_triton,
    option_values,
    truncated,
)

import tce_kernels

N, V = 8, 199  # with `small_blocks`: three full blocks and a tail in a row, one row or so a block on the CPU
ANY_BACKEND = pytest.mark.parametrize("backend", ["reference", *FAST])
INF, NAN = math.inf, math.nan


def by_definition(z):
    """Entropy [N] of the rows of z [N, V], in float64."""
    p = (z.double() - z.double().logsumexp(1, keepdim=True)).exp()
    return torch.stack(
        [-(row[row > 0] * row[row > 0].log()).sum() if row.isfinite().all() else NAN * row.sum() for row in p]
    )


def transformed(logits, options):
    z = logits.double() * options.get("logit_scale", 1.0)
    softcap = options.get("softcap")
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def assert_entropy(got, z, target, ignore_index=-100):
    """That of z, and 0 for ignored rows. The entropy is as far off as log p is: p times that, and summed up."""
    want = by_definition(z).where(target != ignore_index, 0)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5, equal_nan=True)


WAYS = {  # in which rows are gone through
    "no gradient": {},
    "gradient in forward": {"reduction": "sum"},
    "gradient in backward": {"reduction": "none"},
    "in place": {"reduction": "sum", "inplace": True},
}


def entropy_of(logits, target, way="no gradient", loss=truncated, **options):
    logits = logits.detach().clone().requires_grad_(way != "no gradient")
    _, stats = loss(logits * 1 if way == "in place" else logits, target, return_stats="entropy", **WAYS[way], **options)
    return stats.entropy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@ANY_BACKEND
def test_entropy_is_that_of_the_softmax(backend, dtype, way, device, small_blocks):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 is not for Triton")
    for columns in (1, 2, 13, V, 1000):
        logits, target = make_inputs(N, columns, dtype, device)
        got = entropy_of(logits, target, way, backend=backend)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert_entropy(got, logits, target)
        if dtype == torch.float64:
            torch.testing.assert_close(got, by_definition(logits).where(target != -100, 0), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("loss", [truncated, focal])
@ANY_BACKEND
def test_no_option_but_scale_and_softcap_matters(backend, loss, device, small_blocks):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    values = [*option_values(N, V, device), ("threshold", 1e-30), ("threshold", 1.0), ("alpha", 0.0)]
    options = [{name: value} for name, value in values]
    options += [{"softcap": 9.0, "logit_scale": 1.3, "label_smoothing": 0.1, "z_loss": 1e-2}]
    tried = 0
    for some in options:
        unknown = {"alpha"} if loss is truncated else {"threshold", "label_smoothing"}
        if unknown & set(some):
            continue
        some_target = target.where(target != -100, some.get("ignore_index", -100))
        for requires_grad in (False, True):
            x = logits.detach().clone().requires_grad_(requires_grad)
            _, stats = loss(x, some_target, return_stats="entropy", backend=backend, **some)
            assert_entropy(stats.entropy, transformed(logits, some), some_target, some.get("ignore_index", -100))
        tried += 1
    assert tried > 12


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"denominator": "kept"}, {"label_smoothing": 0.1}, {"softcap": 9.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ANY_BACKEND
def test_everything_else_has_the_same_bits(backend, dtype, options, device, small_blocks):
    logits, target = make_inputs(N, V, dtype, device)
    found = []
    for return_stats in (True, "entropy"):
        seen = []

        def loss(x, target, seen=seen, return_stats=return_stats, **more):
            value, stats = truncated(x, target, return_stats=return_stats, **more)
            seen.extend(stats)
            return value

        found.append([*loss_and_gradient(loss, logits, target, backend=backend, **options), *seen])
    (*plain, nothing), (*others, entropy) = found
    assert nothing is None and entropy is not None
    assert all(torch.equal(one, other) for one, other in zip(plain, others, strict=True))


ROWS = {  # logits of one row, and its entropy
    "all equal": ([3.0] * 64, math.log(64)),
    "one class": ([5.0], 0.0),
    "two of many": ([2.0, 2.0] + [-200.0] * 30, math.log(2)),
    "masked": ([1.0, -INF, 1.0, -INF, 1.0, 1.0] + [-INF] * 100, math.log(4)),
    "masked at the front": ([-INF] * 100 + [1.0] * 5, math.log(5)),
    "one not masked": ([-INF] * 70 + [-3.0] + [-INF] * 70, 0.0),
    "far apart": ([3e38, -3e38, 0.0] + [-INF] * 80, 0.0),
    "equal and huge": ([3e38] * 3 + [-3e38] * 100, math.log(3)),
    "equal and hugely negative": ([-3e38] * 100, math.log(100)),
    "equal beyond what fits": ([2.0**34] * 70, math.log(70)),
    "equal at odd numbers": ([12345.678] * 80, math.log(80)),
    "rising": ([float(i) for i in range(-300, 0)], None),
    "falling": ([float(-i) for i in range(300)], None),
    "rising slowly": ([i / 64 for i in range(300)], None),
    "a last one above all": ([0.0] * 200 + [11.0], None),
    "a first one above all": ([11.0] + [0.0] * 200, None),
    "certain": ([40.0] + [0.0] * 99, None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROWS)
@ANY_BACKEND
def test_rows_by_hand(backend, name, way, device, small_blocks):
    row, want = ROWS[name]
    logits = torch.tensor([row] * 3, device=device)
    got = entropy_of(logits, torch.zeros(3, dtype=torch.int64, device=device), way, backend=backend)
    assert (got >= 0).all()
    want = by_definition(logits.cpu())[0].item() if want is None else want
    # Two lanes add a half of the terms each, and round at each addition.
    added = len(row) / 2 * 2.0**-24 if backend == "triton" else 0.0
    assert got.tolist() == pytest.approx([want] * 3, rel=1e-6, abs=3e-7 + added)


@ANY_BACKEND
def test_small_entropies_keep_their_digits(backend, device):
    """Where p is 1 - 1e-12 the entropy is 3e-11: nothing cancels, but for 1 + 1e-12 in float32, a share of 1 / 30."""
    logits = torch.zeros(1, 100, device=device)
    logits[0, 7] = math.log(99) + math.log(1e12)
    got = entropy_of(logits, torch.tensor([7], device=device), backend=backend).item()
    assert got == pytest.approx(by_definition(logits.cpu()).item(), rel=0.05)


@pytest.mark.parametrize("way", WAYS)
@ANY_BACKEND
def test_a_row_that_is_broken_is_alone(backend, way, device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    target[:] = 3
    target[6] = -100
    logits[1, 5], logits[3, 190], logits[4], logits[6, 2] = NAN, INF, -INF, NAN
    got = entropy_of(logits, target, way, backend=backend)
    assert got.isnan().tolist() == [False, True, False, True, True, False, False, False]
    assert got[6] == 0
    fine = [0, 2, 5, 7]
    assert_entropy(got[fine], logits[fine], target[fine])


@needs_triton
@pytest.mark.parametrize("n_multiprocessors", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_that_share_a_row(dtype, n_multiprocessors, device, small_blocks, monkeypatch):
    """Splits are put together: some hold nothing but -inf, and the largest logits are in one of them."""
    from tce_kernels import triton_ops

    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (n_multiprocessors, 2**30))
    logits, target = make_inputs(4, 700, dtype, device)
    target[:] = 1
    logits[1, 100:500], logits[2, 64:128], logits[3] = -INF, 60.0, -INF
    logits[2, :64] = -INF
    assert triton_ops._n_splits(logits[None]) > 1
    for way, options in itertools.product(WAYS, ({}, {"label_smoothing": 0.1}, {"logit_scale": 1.3})):
        got = entropy_of(logits, target, way, backend="triton", **options)
        assert_entropy(got, transformed(logits, options), target)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, "auto"])
@pytest.mark.parametrize("loss", [linear_truncated, linear_focal])
@ANY_BACKEND
def test_linear_losses(backend, loss, chunk_size, needs_gradient, device, small_blocks):
    input, weight, bias, target = make_linear_inputs(12, 7, 99, torch.float32, device)
    for options in ({}, {"reduction": "none"}, {"softcap": 20.0, "gradient_tolerance": 0.3}):
        x = input.detach().clone().requires_grad_(needs_gradient)
        _, stats = loss(
            x, weight, bias, target, return_stats="entropy", backend=backend, chunk_size=chunk_size, **options
        )
        z = transformed(torch.nn.functional.linear(*[t.double() for t in (input, weight, bias)]), options)
        want = by_definition(z).where(target != -100, 0)
        # |z| <= 60: float32 logits are off by 60 eps or so.
        torch.testing.assert_close(stats.entropy.double(), want, atol=60 * 2**-23, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", FAST)
def test_linear_losses_in_other_dtypes(backend, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 is not for Triton")
    input, weight, bias, target = make_linear_inputs(12, 16, 99, dtype, device)
    _, stats = linear_truncated(input.requires_grad_(), weight, bias, target, return_stats="entropy", backend=backend)
    exact = torch.nn.functional.linear(*[t.double() for t in (input, weight, bias)])
    want = by_definition(exact).where(target != -100, 0)
    error = 60 * torch.finfo(dtype).eps  # of the logits, which moves the entropy by sum p |log p + H| times as much
    torch.testing.assert_close(
        stats.entropy.double(), want, atol=2 * error, rtol=1e-5 if dtype == torch.bfloat16 else 1e-13
    )


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"chunk_size": 5}, {"gradient_tolerance": 0.3}])
@pytest.mark.parametrize("backend", FAST)
def test_the_rest_of_a_linear_loss_has_the_same_bits(backend, options, device):
    inputs = make_linear_inputs(12, 7, 99, torch.float32, device)
    found = []
    for return_stats in (True, "entropy"):
        seen = []

        def loss(*arguments, seen=seen, return_stats=return_stats, **more):
            value, stats = linear_truncated(*arguments, return_stats=return_stats, **more)
            seen.extend(stats[:-1])
            return value

        value, gradients = linear_loss_and_gradients(loss, *inputs, backend=backend, **options)
        found.append([value, *gradients, *seen])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_modules_and_the_head_pass_it_on():
    logits, target = make_inputs(N, V, torch.float32, "cpu")
    for module in (tce_kernels.TruncatedCrossEntropyLoss, tce_kernels.FocalCrossEntropyLoss):
        _, stats = module(return_stats="entropy")(logits, target)
        assert_entropy(stats.entropy, logits, target)
        assert module()(logits, target, return_stats="entropy")[1].entropy is not None
        assert "return_stats='entropy'" in repr(module(return_stats="entropy"))
    input, weight, bias, target = make_linear_inputs(12, 7, 99, torch.float32, "cpu")
    z = torch.nn.functional.linear(input, weight, bias)
    linear = torch.nn.Linear(7, 99)
    linear.weight.data, linear.bias.data = weight, bias
    head = tce_kernels.TruncatedCrossEntropyHead.from_linear(linear, return_stats="entropy")
    torch.testing.assert_close(
        head(input, target)[1].entropy.double(), by_definition(z).where(target != -100, 0), atol=1e-5, rtol=1e-5
    )
    loss = tce_kernels.LinearTruncatedCrossEntropyLoss(return_stats="entropy")
    assert torch.equal(loss(input, weight, target, bias)[1].entropy, head(input, target)[1].entropy)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"denominator": "kept", "label_smoothing": 0.1}])
@ANY_BACKEND
def test_compiled_gives_what_eager_gives(backend, options, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)
    input, weight, bias, linear_target = make_linear_inputs(12, 7, 99, torch.float32, device)

    def step(logits, input):
        value, stats = truncated(logits * 2, target, return_stats="entropy", backend=backend, **options)
        linear, linear_stats = linear_truncated(
            input * 2, weight, bias, linear_target, return_stats="entropy", backend=backend, chunk_size=5, **options
        )
        return value.sum() + linear.sum(), *stats, *linear_stats

    def run(function):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (logits, input)]
        value, *stats = function(*leaves)
        return [value.detach(), *stats, *torch.autograd.grad(value, leaves)]

    for got, want in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # the gradient comes in backward: another kernel


@pytest.mark.parametrize("backend", FAST)
def test_operators_pass_opcheck(backend, device):
    operators, form = torch.ops.tce_kernels, ("truncated", None, 1.0, -100, 0.1, 0.2, 5.0, 1.5)
    logits, target = make_inputs(6, 13, torch.float32, device)
    logits, target, row_scale = logits.view(2, 3, 13), target.view(2, 3), torch.rand(2, 3, device=device)
    arguments = (logits, target, row_scale, torch.tensor(-0.5, device=device), *form, backend)
    torch.library.opcheck(operators.row_loss.default, (*arguments, None, None, True))
    torch.library.opcheck(operators.loss_and_dlogits.default, (*arguments, True))
    rows = operators.row_loss(*arguments, None, None, True)[1]
    assert rows.shape == (7, 2, 3)
    torch.library.opcheck(operators.dlogits.default, (logits, target, row_scale, rows, *form, backend))
    input, weight, bias, target = make_linear_inputs(6, 7, 13, torch.float32, device)
    head, chunks = (input, weight, bias, target), (4, torch.float32, 0.0, torch.float32, backend, [True] * 3)
    arguments = (*head, row_scale.view(6), torch.tensor(-0.5, device=device), *form, *chunks)
    torch.library.opcheck(operators.linear_loss.default, (*arguments, False, None, None, True))
    rows = operators.linear_loss(*arguments, False, None, None, True)[1]
    torch.library.opcheck(operators.linear_gradients.default, (*head, row_scale.view(6), rows, *form, *chunks))


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
@ANY_BACKEND
def test_any_shape(backend, shape, device):
    logits = torch.zeros(*shape, 5, device=device)
    target = torch.zeros(shape, dtype=torch.int64, device=device)
    _, stats = truncated(logits.requires_grad_(), target, return_stats="entropy", backend=backend)
    assert stats.entropy.shape == shape
    torch.testing.assert_close(stats.entropy, torch.full(shape, math.log(5), device=device))
