"""The linear path against the float64 reference, and what it must not do: all logits, work for dropped rows."""

import itertools
import os
import shutil
import time

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import (
    DTYPES,
    FAST,
    INTERPRETED,
    LINEAR_LOSSES,
    assert_inductor_gives,
    assert_linear_matches_reference,
    error_of,
    linear_cross_entropy,
    linear_focal,
    linear_loss_and_gradients,
    linear_truncated,
    make_linear_inputs,
    needs_triton,
    option_values,
)

import tce_kernels
from tce_kernels import gradients, head, linear
from tce_kernels.chunks import through_chunks
from tce_kernels.options import LogitsOptions, Truncated

N, D, V = 9, 8, 71


@pytest.mark.parametrize("chunk_size", [1, 4, 7, N, N + 5, "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LINEAR_LOSSES)
@pytest.mark.parametrize("backend", FAST)
def test_matches_the_float64_reference(backend, loss, dtype, chunk_size, device, small_blocks):
    inputs = make_linear_inputs(N, D, V, dtype, device)
    assert_linear_matches_reference(loss, *inputs, backend=backend, chunk_size=chunk_size)


@pytest.mark.parametrize("loss", LINEAR_LOSSES)
def test_torch_backend_matches_the_reference_in_float64(loss, device, small_blocks):
    inputs = make_linear_inputs(N, D, V, torch.float64, device)
    assert_linear_matches_reference(loss, *inputs, backend="torch", chunk_size=4)


@pytest.mark.parametrize("loss, dtype", [(linear_truncated, torch.float32), (linear_focal, torch.float16)])
@pytest.mark.parametrize("backend", FAST)
def test_every_option_and_every_pair_of_options(backend, loss, dtype, device, small_blocks):
    values = option_values(N, V, device)
    values += [("linear_bias", None), ("accumulate_dtype", torch.float64), ("accumulate_dtype", torch.bfloat16)]
    tried = 0
    for (name, value), (other, other_value) in itertools.combinations_with_replacement(values, 2):
        options = {name: value, other: other_value}
        smoothing = "label_smoothing" in options
        if (
            (name == other and value is not other_value)
            or (smoothing and ("weight" in options or loss is linear_focal))
            or ("reduction" in options and "denominator" in options)
        ):
            continue
        input, weight, bias, target = make_linear_inputs(N, D, V, dtype, device, seed=tried)
        bias = None if "linear_bias" in options else bias
        options.pop("linear_bias", None)
        target[target == -100] = options.get("ignore_index", -100)
        assert_linear_matches_reference(loss, input, weight, bias, target, backend=backend, chunk_size=4, **options)
        tried += 1
    assert tried > 80


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"allow_retain_graph": True}])
@pytest.mark.parametrize("backend", FAST)
def test_every_combination_of_frozen_tensors(backend, options, device):
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    want, exact = linear_loss_and_gradients(linear_truncated, *inputs, backend=backend, chunk_size=4, **options)
    for needs in itertools.product([False, True], repeat=3):
        tensors = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(inputs[:3], needs, strict=True)]
        value = linear_truncated(*tensors, inputs[3], backend=backend, chunk_size=4, **options)
        torch.testing.assert_close(value.detach(), want)
        assert value.requires_grad == any(needs)
        if any(needs):
            generator = torch.Generator().manual_seed(1)
            value.backward((0.5 + torch.rand(value.shape, generator=generator)).to(value))
        for tensor, gradient, needed in zip(tensors, exact, needs, strict=True):
            assert (tensor.grad is not None) == needed
            if needed:
                torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_as_exact_as_pytorch_s_own(backend, share, dtype, device):
    """At sizes where errors are statistics; the reference in the same dtype is F.linear and autograd on all logits."""
    inputs = make_linear_inputs(96, 48, 700, dtype, device, confident=share)
    _, gradients = linear_loss_and_gradients(linear_truncated, *inputs, backend=backend, chunk_size=40)
    _, ordinary = linear_loss_and_gradients(linear_truncated, *inputs, backend="reference")
    double = [tensor.double() for tensor in inputs[:3]]
    _, exact = linear_loss_and_gradients(linear_truncated, *double, inputs[3], backend="reference")
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: twice the error.
    factor = 4 if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu" else 2
    for got, usual, want in zip(gradients, ordinary, exact, strict=True):
        assert got.dtype == dtype
        assert error_of(got, want) <= factor * error_of(usual, want)


@pytest.mark.parametrize("backend", FAST)
def test_a_wide_accumulator_beats_a_narrow_one(backend, device, monkeypatch):
    monkeypatch.setattr(head, "supported", lambda dtype, device: dtype)  # on every processor
    inputs = make_linear_inputs(256, 16, 50, torch.bfloat16, device, confident=0.0)
    double = [tensor.double() for tensor in inputs[:3]]
    _, exact = linear_loss_and_gradients(linear_truncated, *double, inputs[3], backend="reference")
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        _, gradients = linear_loss_and_gradients(
            linear_truncated, *inputs, backend=backend, chunk_size=2, accumulate_dtype=dtype
        )
        errors[dtype] = [error_of(got, want) for got, want in zip(gradients, exact, strict=True)]
    assert errors[torch.float32][1] < 0.5 * errors[torch.bfloat16][1]
    assert errors[torch.float32][2] < 0.5 * errors[torch.bfloat16][2]


@pytest.mark.parametrize("backend", FAST)
def test_accumulating_inside_a_matmul(backend, device, monkeypatch):
    """Where the device cannot, a stand-in takes the call that a GPU would get: its result is its out, with beta."""
    inputs = make_linear_inputs(N, D, V, torch.bfloat16, device)
    if device.type == "cpu":
        addmm = torch.addmm

        def stand_in(total, a, b, *, beta, out_dtype, out):
            assert out is total and total.dtype == out_dtype == torch.float32
            return addmm(total, a.float(), b.float(), beta=beta, out=out)

        monkeypatch.setattr(head, "adds_inside", lambda *_: True)
        monkeypatch.setattr(torch, "addmm", lambda *a, **k: (stand_in if "out_dtype" in k else addmm)(*a, **k))
    assert_linear_matches_reference(linear_truncated, *inputs, backend=backend, chunk_size=2)


def test_processors_without_16_bit_matmuls(monkeypatch):
    """float32 matmuls from 16-bit tensors: logits are not rounded at all, gradients once."""
    monkeypatch.setattr(head, "supported", lambda dtype, device: torch.promote_types(dtype, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make_linear_inputs(N, D, V, dtype, "cpu")
        double = [tensor.double() for tensor in inputs[:3]]
        for options in ({}, {"reduction": "none"}):
            value, gradients = linear_loss_and_gradients(linear_truncated, *inputs, chunk_size=4, **options)
            want, exact = linear_loss_and_gradients(
                linear_truncated, *double, inputs[3], backend="reference", **options
            )
            torch.testing.assert_close(value.double(), want, atol=2e-6, rtol=1e-5)
            for got, wanted in zip(gradients, exact, strict=True):
                assert got.dtype == dtype
                # Rounded once, by at most half an eps.
                assert error_of(got, wanted) <= torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_autocast_on_processors_without_16_bit_matmuls(options, monkeypatch):
    monkeypatch.setattr(head, "supported", lambda dtype, device: torch.promote_types(dtype, torch.float32))
    inputs = make_linear_inputs(N, D, V, torch.float32, "cpu")
    want = linear_loss_and_gradients(linear_truncated, *inputs, chunk_size=4, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_loss_and_gradients(linear_truncated, *inputs, chunk_size=4, **options)
    assert torch.equal(got[0], want[0])
    for one, other in zip(got[1], want[1], strict=True):
        assert torch.equal(one, other)


def test_which_processors_multiply_16_bits():
    with torch.backends.mkldnn.flags(enabled=False):
        assert head.supported(torch.bfloat16, torch.device("cpu")) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert head.supported(dtype, torch.device("cpu")) == dtype
    assert head.supported(torch.float16, torch.device("cuda")) == torch.float16


def kept_rows(inputs):
    double = [tensor.detach().double() for tensor in inputs[:3]]
    return linear_truncated(*double, inputs[3], backend="reference", return_stats=True)[1].kept


def count_rows(monkeypatch):
    """How many rows go through the forward matmul, and through each of the backward matmuls."""
    counts = {"forward": [], "backward": []}
    write_logits, add = head.Head.write_logits, gradients.Gradients.add

    def counted_logits(self, rows, out):
        counts["forward"].append(len(rows))
        write_logits(self, rows, out)

    def counted_add(self, dlogits, rows):
        counts["backward"].append(len(rows))
        assert len(dlogits) == len(rows)
        add(self, dlogits, rows)

    monkeypatch.setattr(head.Head, "write_logits", counted_logits)
    monkeypatch.setattr(gradients.Gradients, "add", counted_add)
    return counts


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("backend", FAST)
def test_work_in_proportion_to_what_is_kept(backend, share, reduction, device, monkeypatch):
    inputs = make_linear_inputs(80, D, V, torch.float32, device, confident=share)
    counts = count_rows(monkeypatch)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    value, stats = linear_truncated(
        *tensors, inputs[3], backend=backend, chunk_size=16, reduction=reduction, return_stats=True
    )
    n_kept, n_valid = stats.n_kept.item(), stats.n_valid.item()
    assert n_valid == 60
    assert n_kept == kept_rows(inputs).sum()
    assert sum(counts["forward"]) == n_valid  # ignored rows are not multiplied at all
    value.sum().backward()
    assert sum(counts["forward"]) == n_valid + (n_kept if reduction == "none" else 0)
    assert sum(counts["backward"]) == n_kept
    fewest, most = (4, 20) if device.type == "cpu" else (8, 24)  # never for a sliver of rows, but the last
    assert all(count >= fewest for count in counts["backward"][:-1])
    assert all(count < most for count in counts["backward"])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_evaluation_makes_no_gradients(backend, device, monkeypatch):
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    trained, train_stats = linear_truncated(*tensors, inputs[3], backend=backend, return_stats=True)
    counts = count_rows(monkeypatch)
    with torch.no_grad():
        value, stats = linear_truncated(*tensors, inputs[3], backend=backend, chunk_size=4, return_stats=True)
    assert not value.requires_grad
    assert counts["backward"] == []
    torch.testing.assert_close(value, trained.detach())
    for name, got, want in zip(stats._fields[:-1], stats, train_stats, strict=False):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("backend", FAST)
def test_stats_match_the_reference(backend, device, small_blocks):
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    for requires_grad in (False, True):
        input.requires_grad_(requires_grad)
        arguments = dict(return_stats=True, softcap=20.0)
        _, stats = linear_truncated(input, weight, bias, target, backend=backend, chunk_size=4, **arguments)
        double = [tensor.detach().double() for tensor in (input, weight, bias)]
        _, exact = linear_truncated(*double, target, backend="reference", **arguments)
        for name in ("kept", "correct", "valid", "n_valid", "n_kept"):
            assert torch.equal(getattr(stats, name), getattr(exact, name)), name
        for name in ("log_prob", "lse", "truncated_fraction", "accuracy", "mean_confidence"):
            torch.testing.assert_close(
                getattr(stats, name).double(), getattr(exact, name).double(), atol=1e-5, rtol=1e-5
            )


EMPTY = {
    "no rows": lambda input, target: (input[:0], target[:0]),
    "all ignored": lambda input, target: (input, torch.full_like(target, -100)),
    "one row": lambda input, target: (input, target.where(torch.arange(N, device=target.device) == 3, -100)),
}  # fmt: skip


@pytest.mark.parametrize("threshold", [1e-30, 0.6])  # the first drops every row
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", [*EMPTY, "all rows"])
@pytest.mark.parametrize("backend", FAST)
def test_nothing_left(backend, case, reduction, threshold, device):
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    input, target = EMPTY.get(case, lambda *both: both)(input, target)
    options = dict(reduction=reduction, threshold=threshold)
    value, gradients = linear_loss_and_gradients(
        linear_truncated, input, weight, bias, target, backend=backend, chunk_size=4, **options
    )
    want, exact = linear_loss_and_gradients(
        linear_truncated, input, weight, bias, target, backend="reference", **options
    )
    torch.testing.assert_close(value, want, atol=2e-6, rtol=1e-5)
    for got, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
        if threshold == 1e-30 or case in ("no rows", "all ignored"):
            assert not got.any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", [(5, 3, 1), (1, 1, 1), (1, 4, 9), (4, 1, 9)])
def test_smallest_sizes(backend, sizes, device):
    inputs = make_linear_inputs(*sizes, torch.float32, device)
    assert_linear_matches_reference(linear_truncated, *inputs, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_dropped_rows_have_exact_zeros(backend, device):
    inputs = make_linear_inputs(40, D, V, torch.bfloat16, device)
    for reduction in ("mean", "none"):
        _, (dinput, *_) = linear_loss_and_gradients(
            linear_truncated, *inputs, backend=backend, chunk_size=16, reduction=reduction
        )
        dropped = ~kept_rows(inputs)
        assert 0 < dropped.sum() < 40
        assert not dinput[dropped].any()
        assert dinput[~dropped].any(-1).all()


@pytest.mark.parametrize("backend", FAST)
def test_rows_of_any_shape_and_stride(backend, device):
    """Next-token training: hidden[:, :-1] is not contiguous, nor is the target."""
    input, weight, bias, target = make_linear_inputs(12, D, V, torch.float32, device)
    flat = linear_loss_and_gradients(linear_truncated, input, weight, bias, target, backend=backend, reduction="sum")
    padded = F.pad(input.view(3, 4, D), (0, 0, 0, 1))[:, :-1]
    target = F.pad(target.view(3, 4), (1, 0))[:, 1:]
    strided_weight = weight.t().contiguous().t()
    value, gradients = linear_loss_and_gradients(
        linear_truncated, padded, strided_weight, bias, target, backend=backend, reduction="sum", chunk_size=5
    )
    torch.testing.assert_close(value, flat[0])
    assert gradients[0].shape == (3, 4, D)
    for got, want in zip(gradients, flat[1], strict=True):
        torch.testing.assert_close(got.reshape(want.shape), want)
    one = linear_loss_and_gradients(linear_truncated, input[0], weight, bias, target[0, 0], backend=backend)
    want = linear_loss_and_gradients(linear_truncated, input[0], weight, bias, target[0, 0], backend="reference")
    torch.testing.assert_close(one, want)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", FAST)
def test_two_runs_give_the_same_bits(backend, options, device):
    inputs = make_linear_inputs(40, D, V, torch.bfloat16, device)
    runs = [
        linear_loss_and_gradients(linear_truncated, *inputs, backend=backend, chunk_size=16, **options)
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", FAST)
def test_float16_gradients_survive_the_mean(backend, device):
    """1 / N times a small p underflows in float16; divided last, it meets the gradient scaler's factor first."""
    inputs = make_linear_inputs(64, D, 500, torch.float16, device)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    scale = 2.0**14
    gradients = torch.autograd.grad(linear_truncated(*tensors, inputs[3], backend=backend) * scale, tensors)
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = torch.autograd.grad(linear_truncated(*double, inputs[3], backend="reference") * scale, double)
    for got, want in zip(gradients, exact, strict=True):
        assert error_of(got, want) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_multiplies_in_its_dtype(backend, options, dtype, device):
    """As F.linear would: float32 weights with an input of either dtype; gradients in the dtype of their tensors."""
    for input_dtype in (torch.float32, dtype):
        input, weight, bias, target = make_linear_inputs(96, 16, 200, torch.float32, device)
        input = input.to(input_dtype)
        with torch.autocast(device.type, dtype=dtype):
            value, gradients = linear_loss_and_gradients(
                linear_truncated, input, weight, bias, target, backend=backend, chunk_size=40, **options
            )
            _, usual = linear_loss_and_gradients(
                linear_truncated, input, weight, bias, target, backend="reference", **options
            )
        double = [tensor.double() for tensor in (input, weight, bias)]
        want, exact = linear_loss_and_gradients(linear_truncated, *double, target, backend="reference", **options)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want, atol=4e-2, rtol=2e-2)  # |z| of about 10, rounded to bfloat16
        assert [gradient.dtype for gradient in gradients] == [input_dtype, torch.float32, torch.float32]
        for got, ordinary, wanted in zip(gradients, usual, exact, strict=True):
            factor = 4 if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu" else 2
            assert error_of(got, wanted) <= factor * error_of(ordinary, wanted)


def test_float64_stays_float64_under_autocast():
    inputs = make_linear_inputs(N, D, V, torch.float64, "cpu")
    for options in ({}, {"reduction": "none"}):
        want = linear_loss_and_gradients(linear_truncated, *inputs, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = linear_loss_and_gradients(linear_truncated, *inputs, **options)
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(*pair) for pair in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("chunks, exact", [((256, 3), ("weight", "bias")), ((301, 300), ("bias",))])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_float32_parameters_are_not_rounded_to_16_bits(backend, reduction, chunks, exact, device):
    """Two classes with p = 1/2: each row adds 1/2, exactly, and 129.5 and 150.5 are no bfloat16 numbers.

    The weight's product is rounded for each chunk (to 128 and 1.5: exactly), the bias's sum is not, nor are totals.
    """
    n = sum(chunks)
    input = torch.ones(n, 1, dtype=torch.bfloat16, device=device)
    weight, bias = torch.zeros(2, 1, device=device).requires_grad_(), torch.zeros(2, device=device).requires_grad_()
    target = torch.zeros(n, dtype=torch.int64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = linear_cross_entropy(
            input, weight, bias, target, backend=backend, chunk_size=chunks[0], reduction=reduction
        )
    value.sum().backward()
    for name, parameter in [("weight", weight), ("bias", bias)]:
        if name in exact:
            assert parameter.grad.flatten().tolist() == [-n / 2, n / 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_small_gradients_survive_a_large_denominator(backend, dtype, device, monkeypatch):
    """1 / 2^17 is subnormal in float16; a gradient scaler's factor brings it back only if it was not rounded before."""
    monkeypatch.setattr(head, "supported", lambda dtype, device: dtype)
    input, weight, bias, target = make_linear_inputs(48, 16, 50, dtype, device, confident=0.0)
    tensors = [tensor.requires_grad_() for tensor in (input, weight, bias)]
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    scale = 2.0**16
    for leaves, options in ((tensors, {"backend": backend, "chunk_size": 20}), (double, {"backend": "reference"})):
        (linear_truncated(*leaves, target, denominator=2**17, **options) * scale).backward()
    for got, want in zip(tensors, double, strict=True):
        assert error_of(got.grad, want.grad) <= 4 * torch.finfo(dtype).eps


def memory_beyond(run):
    """Peak bytes that run() allocates on a CPU, less those of the tensors it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        returned = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak - sum(tensor.nbytes for tensor in returned)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_memory_is_that_of_a_chunk(options, dtype, share):
    n_rows, vocabulary, chunk_size = 1800, 24000, 600
    input, weight, _, target = make_linear_inputs(n_rows, 16, vocabulary, dtype, "cpu", confident=share)
    input.requires_grad_(), weight.requires_grad_()

    def run():
        value = linear_truncated(input, weight, None, target, chunk_size=chunk_size, backend="torch", **options)
        return torch.autograd.grad(value.sum(), (input, weight))

    run()
    beyond = memory_beyond(run)
    accumulator = weight.numel() * 4 if dtype != torch.float32 else 0
    in_float32 = head.supported(dtype, torch.device("cpu")) != dtype  # no fast 16-bit matmuls: copies of the weight
    logit_bytes = 4 if in_float32 else dtype.itemsize
    copies = weight.numel() * 4 if in_float32 else 0
    assert beyond - accumulator - copies <= 1.25 * chunk_size * vocabulary * logit_bytes + 10e6
    assert beyond > chunk_size * vocabulary * logit_bytes  # it does see the logits


@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_scaled_where_they_are(backend, device, monkeypatch):
    """Without memory for a second gradient of the weight, where nobody can ask for the first one again."""
    monkeypatch.setattr(linear, "product", None)
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    assert_linear_matches_reference(linear_truncated, *inputs, backend=backend)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU nobody reads what pads the rows")
@pytest.mark.parametrize("backend, padding", [("torch", 0), pytest.param("triton", 9, marks=needs_triton)])
def test_rows_of_a_chunk_on_a_cpu(backend, padding, monkeypatch):
    """PyTorch's operations get rows without gaps. A matmul may read what pads Triton's, and counts on numbers there."""
    seen, add = [], gradients.Gradients.add

    def look(self, dlogits, rows):
        seen.append(dlogits.as_strided((len(dlogits), dlogits.stride(0) - V), dlogits.stride(), V).clone())
        add(self, dlogits, rows)

    monkeypatch.setattr(gradients.Gradients, "add", look)
    linear_loss_and_gradients(linear_truncated, *make_linear_inputs(N, D, V, torch.bfloat16, "cpu"), backend=backend)
    assert seen and all(some.shape[1] == padding and (some == 0).all() for some in seen)


def test_chunk_sizes_of_auto():
    """Whole tiles, on a GPU of at most 4096 rows or 1 GiB of logits, on a CPU of at most 1024 rows; none a sliver."""
    for N, vocabulary, itemsize, rows in [
        (10**5, 32000, 2, 14336), (10**5, 128256, 2, 4096), (10**5, 262144, 4, 4096), (16384, 32000, 2, 16384),
        (8192, 128256, 2, 4096), (8400, 128256, 2, 3072), (17000, 32000, 2, 9216), (500, 32000, 2, 1024),
        (0, 9, 2, 1024),
    ]:  # fmt: skip
        assert head.auto_chunk_size(N, vocabulary, itemsize, on_cpu=False) == rows
    for N, rows in [(10**5, 1024), (2048, 1024), (1534, 768), (1025, 576), (700, 704), (0, 64)]:
        assert head.auto_chunk_size(N, 49152, 4, on_cpu=True) == rows


@needs_triton
@pytest.mark.parametrize("kept", [0, 1, 5, 31, 32])
def test_triton_packs_the_kept_rows(kept, device):
    """Whichever rows are kept: none is lost, none is written over before it has moved."""
    from tce_kernels import triton_ops

    generator = torch.Generator().manual_seed(kept)
    for _ in range(6):
        logits = torch.randn(1, 32, V, generator=generator).to(device)
        target = torch.randint(V, (32,), generator=generator).to(device)
        scale = torch.zeros(32).index_fill_(0, torch.randperm(32, generator=generator)[:kept], 1.5).to(device)
        param = torch.tensor(0.0, device=device)
        form = LogitsOptions(rule=Truncated()).form()
        out = torch.empty_like(logits)
        loss, rows = triton_ops.loss_and_dlogits(logits, target, scale, param, form, out)
        packed_loss, packed_rows, order, _ = triton_ops.loss_and_kept_dlogits(logits, target, scale, param, form)
        assert torch.equal(order.sort().values, scale.nonzero().squeeze(1))
        assert torch.equal(logits[0, :kept], out[0, order])
        assert torch.equal(packed_loss, loss)
        assert torch.equal(packed_rows, rows)


REPEATED = [{}, {"reduction": "sum"}, {"denominator": "kept"}, {"allow_retain_graph": True}, {"reduction": "none"}]


@pytest.mark.parametrize("options", REPEATED)
@pytest.mark.parametrize("backend", FAST)
def test_second_backward_is_right_with_retain_graph(backend, options, device):
    """Whatever becomes of the gradients that the first one returned."""
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    value = linear_truncated(*tensors, inputs[3], backend=backend, **options).sum()
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    four = torch.autograd.grad(4 * value, tensors, retain_graph=True)
    for gradient in first:
        gradient.zero_()
    again = torch.autograd.grad(value, tensors)
    for one, two, other in zip(kept, again, four, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(4 * one, other)


@pytest.mark.parametrize("backend", FAST)
def test_second_backward_without_retain_graph_raises(backend, device):
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    value = linear_truncated(*tensors, inputs[3], backend=backend)
    torch.autograd.grad(3 * value, tensors)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("frozen", [0, 1, 2, None])
@pytest.mark.parametrize("backend", FAST)
def test_double_backward_says_that_the_reference_has_it(backend, frozen, options, device):
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    tensors = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(inputs[:3])]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    value = linear_truncated(*tensors, inputs[3], backend=backend, **options).sum()
    gradients = torch.autograd.grad(value, wanted, create_graph=True)
    for gradient, tensor in itertools.product(gradients, wanted):
        with pytest.raises(RuntimeError, match="double backward is not supported.*backend='reference'"):
            torch.autograd.grad(gradient.square().sum(), tensor, retain_graph=True)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_accumulate_into_grad(backend, options, device):
    """Two backward calls in one step, and weights that the embedding shares."""
    inputs = make_linear_inputs(N, D, V, torch.float32, device)
    input, weight, bias = (tensor.requires_grad_() for tensor in inputs[:3])
    for _ in range(2):
        (linear_truncated(input, weight, bias, inputs[3], backend=backend, **options).sum() * 0.5).backward()
    whole, _ = linear_truncated(input, weight, bias, inputs[3], backend="reference", **options).sum(), None
    for tensor, want in zip((input, weight, bias), torch.autograd.grad(whole, (input, weight, bias)), strict=True):
        torch.testing.assert_close(tensor.grad, want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", FAST)
def test_module_is_the_function(backend, device):
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    class_weight, token_weight = torch.rand(V, device=device), torch.rand(N, device=device)
    module = tce_kernels.LinearTruncatedCrossEntropyLoss(0.6, weight=class_weight, chunk_size=4, backend=backend)
    assert not list(module.parameters())
    for size in (2, N):  # options of a call go before the module's, which stay as they are
        got = module(input, weight, target, bias, chunk_size=size, reduction="sum", weight=None)
        want = linear_truncated(input, weight, bias, target, backend=backend, chunk_size=size, reduction="sum")
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match="inplace"):
        module(input, weight, target, bias, inplace=True)
    want = linear_truncated(
        input, weight, bias, target, weight=class_weight, token_weight=token_weight, backend=backend, chunk_size=4
    )
    assert torch.equal(module(input, weight, target, bias, token_weight=token_weight), want)
    assert repr(module) == f"LinearTruncatedCrossEntropyLoss(threshold=0.6, backend='{backend}', chunk_size=4)"
    without = linear_truncated(input, weight, None, target, weight=class_weight, backend=backend, chunk_size=4)
    assert torch.equal(module(input, weight, target), without)


@pytest.mark.parametrize("backend", FAST)
def test_under_activation_checkpointing(backend, device):
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    tensors = [tensor.requires_grad_() for tensor in (input, weight, bias)]

    def step(input, weight, bias):
        return linear_truncated(input * 2, weight, bias, target, backend=backend, chunk_size=4)

    direct = torch.autograd.grad(step(*tensors), tensors)
    kept = torch.autograd.grad(torch.utils.checkpoint.checkpoint(step, *tensors, use_reentrant=False), tensors)
    for one, other in zip(direct, kept, strict=True):
        assert torch.equal(one, other)


def test_shapes_may_change_under_compilation():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda *inputs: linear_truncated(*inputs, chunk_size=4), fullgraph=True, backend=counter)
    for rows in (5, 8, 13, 21):
        inputs = make_linear_inputs(rows, D, V, torch.float32, "cpu")
        assert torch.equal(step(*inputs), linear_truncated(*inputs, chunk_size=4))
    assert counter.frame_count <= 2  # once for the first size, once for any other


COMPILED = [
    {},
    {"reduction": "none"},
    {"denominator": "kept", "z_loss": 0.1},
    {"denominator": 5, "label_smoothing": 0.1, "softcap": 9.0},
    {"allow_retain_graph": True, "accumulate_dtype": torch.float64},
]


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("options", COMPILED)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_compiled_gives_what_eager_gives(backend, options, needs, device):
    torch.compiler.reset()
    *tensors, target = make_linear_inputs(N, D, V, torch.float32, device)

    def step(input, weight, bias):
        return linear_truncated(
            input * 2, weight, bias, target, return_stats=True, backend=backend, chunk_size=4, **options
        )

    def run(function):
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(tensors, needs, strict=True)]
        value, stats = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return value, *torch.autograd.grad(3 * value.sum(), wanted), stats.accuracy, *stats[:-1]

    for got, want in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        if backend == "reference":
            torch.testing.assert_close(got, want)
        else:
            assert torch.equal(got, want)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_what_eager_gives(dtype, device):
    torch.compiler.reset()
    *tensors, target = make_linear_inputs(N, D, V, dtype, device)
    got, want = (
        linear_loss_and_gradients(loss, *tensors, target, chunk_size=4)
        for loss in (torch.compile(linear_truncated, fullgraph=True), linear_truncated)
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)  # the sum may be taken in another order
    for compiled, eager in zip(got[1], want[1], strict=True):
        assert_inductor_gives(compiled, eager)


@pytest.mark.parametrize("backend", FAST)
def test_operators_pass_opcheck(backend, device):
    input, weight, bias, target = make_linear_inputs(6, D, V, torch.bfloat16, device)
    input, target = input.view(2, 3, D), target.view(2, 3)
    row_scale = torch.rand(2, 3, device=device)
    param = torch.tensor(-0.5, device=device)
    form = ("truncated", None, 1.0, -100, 0.1, 0.2, 5.0, 1.5)
    chunks = (2, torch.float32, 0.0, torch.bfloat16, backend)
    operators = torch.ops.tce_kernels
    for needs in ([True] * 3, [False, True, False], [False] * 3):
        arguments = (input, weight, bias, target, row_scale, param, *form, *chunks, needs)
        torch.library.opcheck(operators.linear_loss.default, arguments)
        rows = operators.linear_loss(*arguments)[1]
        arguments = (input, weight, None, target, row_scale, rows, *form, *chunks, needs)
        torch.library.opcheck(operators.linear_gradients.default, arguments)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"denominator": "kept"}, {"gradient_tolerance": 0.3}])
def test_the_host_waits_once_a_chunk(options, device, monkeypatch):
    """Which it does in nonzero, to learn how many rows are left, or with a tolerance in tolist, and nowhere else."""
    monkeypatch.setattr(gradients, "TILE_CLASSES", 1)
    inputs = make_linear_inputs(40, D, V, torch.float32, device)
    waits = []
    nonzero, tolist = torch.Tensor.nonzero, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: waits.append(1) or nonzero(self))
    if "gradient_tolerance" in options:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    for name in ("item", "cpu", "__bool__", "__int__") + (() if "gradient_tolerance" in options else ("tolist",)):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, _Refusing(name, method))
    from tce_kernels import kernels

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, _Launches(getattr(kernels, name)))
    tensors = [tensor.requires_grad_() for tensor in inputs[:3]]
    value = linear_truncated(*tensors, inputs[3], backend="triton", chunk_size=10, **options)
    torch.autograd.grad(value, tensors)
    assert len(waits) == 1 + 3  # before the loop, and in each of the chunks that 30 live rows make


def test_the_next_chunks_have_begun_when_one_is_waited_for():
    """In stages, of which the others' come in between; in memory of their own."""
    done, memories = [], []

    def step(logits, chunk):
        memories.append(logits.data_ptr())
        for stage in "abc":
            done.append(f"{stage}{chunk.item()}")
            yield chunk[:0] if stage == "c" else None

    of_rows = head.Head(torch.ones(4, 2), torch.ones(3, 2), None, torch.float32)
    through_chunks(of_rows, torch.arange(4), 1, "torch", step, None, n_stages=3)
    assert done == "a0 a1 b0 a2 b1 c0 a3 b2 c1 b3 c2 c3".split()
    assert len(set(memories)) == 3 and memories[3] == memories[0]


class _Refusing:
    """A method of a tensor that would make the host wait; launches in the interpreter may use it."""

    launching = False

    def __init__(self, name, method):
        self.name, self.method = name, method

    def __get__(self, tensor, _):
        def call(*args):
            assert _Refusing.launching, f"Tensor.{self.name} makes the host wait"
            return self.method(tensor, *args)

        return call


class _Launches:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            _Refusing.launching = True
            self.kernel[grid](*args, **kwargs)
            _Refusing.launching = False

        return launch


def train_in_parallel(rank, world_size, folder, state, batches):
    """One of the processes of the test below: forward, backward, and the gradients that DDP leaves."""
    os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    model = HeadedModel()
    model.load_state_dict(state)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    input, target = batches[rank]
    parallel(input, target).backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/gradients")
    torch.distributed.barrier()  # nobody leaves while another process still talks
    del parallel  # it holds the group that ends now
    torch.distributed.destroy_process_group()


class HeadedModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V)
        self.loss = tce_kernels.LinearTruncatedCrossEntropyLoss(0.6, chunk_size=4, denominator=6)

    def forward(self, input, target):
        return self.loss(self.body(input), self.head.weight, target, self.head.bias)


def test_distributed_data_parallel_gives_the_gradients_of_one_process(tmp_path):
    """Two processes with 6 rows each; in one of them every row may be ignored, and it still takes part."""
    torch.manual_seed(0)
    model = HeadedModel()
    input, weight, bias, target = make_linear_inputs(12, D, V, torch.float32, "cpu")
    with torch.no_grad():
        model.body.weight.copy_(torch.eye(D))
        model.head.weight.copy_(weight)
    for second in (target[6:], torch.full_like(target[6:], -100)):
        batches = [(input[:6], target[:6]), (input[6:], second)]
        processes = torch.multiprocessing.spawn(
            train_in_parallel, (2, str(tmp_path), model.state_dict(), batches), nprocs=2, join=False
        )
        end = time.monotonic() + 120
        while not processes.join(timeout=10):
            assert time.monotonic() < end, "the processes wait for one another"
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        model.zero_grad()
        (sum(model(*batch) for batch in batches) / 2).backward()
        for got, parameter in zip(torch.load(tmp_path / "gradients"), model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
