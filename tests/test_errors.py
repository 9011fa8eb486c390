"""Every refusal: its type, its message, and that nothing was touched."""

import re

import pytest
import torch
from cases import FAST, needs_triton

import tce_kernels
from tce_kernels import (
    FocalCrossEntropyLoss,
    LinearTruncatedCrossEntropyLoss,
    TruncatedCrossEntropyLoss,
    focal_cross_entropy,
    linear_focal_cross_entropy,
    linear_truncated_cross_entropy,
    truncated_cross_entropy,
)

N, V = 4, 7


def arguments(device):
    return torch.zeros(N, V, device=device), torch.zeros(N, dtype=torch.int64, device=device)


OPTIONS = [
    (dict(threshold=0), ValueError, "threshold must be in (0, 1], got 0"),
    (dict(threshold=1.5), ValueError, "threshold must be in (0, 1], got 1.5"),
    (dict(threshold=float("nan")), ValueError, "threshold must be in (0, 1], got nan"),
    (dict(threshold="0.9"), TypeError, "threshold must be a number, got str"),
    (dict(threshold=True), TypeError, "threshold must be a number, got bool"),
    (dict(threshold=torch.ones(1)), ValueError, "threshold must be a number or a 0-d tensor, got shape [1]"),
    (dict(threshold=torch.tensor(1)), TypeError, "threshold must be a floating-point tensor, got torch.int64"),
    (dict(reduction="avg"), ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (dict(reduction=None), ValueError, "reduction must be one of 'mean', 'sum', 'none', got None"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    (dict(denominator="all"), ValueError, "denominator must be one of 'valid', 'kept', got 'all'"),
    (dict(denominator=-1), ValueError, "denominator must be a finite number >= 0, got -1"),
    (dict(denominator=None), TypeError, "denominator must be a number, got NoneType"),
    (dict(denominator=torch.ones(2)), ValueError, "denominator must be a 0-d tensor, got shape [2]"),
    (dict(denominator=torch.tensor(True)), TypeError, "denominator must be a tensor of real numbers, got torch.bool"),
    (dict(denominator=torch.tensor(1.0, requires_grad=True)), ValueError, "denominator must not require grad: the loss"
     " has no gradient for it, so pass denominator.detach()"),
    (dict(denominator=3, reduction="sum"), ValueError, "denominator must be left at 'valid' with reduction='sum', got 3"),
    (dict(denominator="kept", reduction="none"), ValueError, "denominator must be left at 'valid' with"
     " reduction='none', got 'kept'"),
    (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float"),
    (dict(ignore_index=2**63), ValueError, "ignore_index must be in the range of int64, got 9223372036854775808"),
    (dict(ignore_index=True), TypeError, "ignore_index must be an int, got bool"),
    (dict(label_smoothing=1.1), ValueError, "label_smoothing must be in [0, 1], got 1.1"),
    (dict(label_smoothing=None), TypeError, "label_smoothing must be a number, got NoneType"),
    (dict(label_smoothing=0.1, weight=torch.ones(V)), ValueError, "label_smoothing must be 0 with class weights, got 0.1"),
    (dict(z_loss=-1), ValueError, "z_loss must be a finite number >= 0, got -1"),
    (dict(z_loss=float("inf")), ValueError, "z_loss must be a finite number >= 0, got inf"),
    (dict(softcap=0), ValueError, "softcap must be None or a finite number > 0, got 0"),
    (dict(softcap=float("inf")), ValueError, "softcap must be None or a finite number > 0, got inf"),
    (dict(logit_scale=float("inf")), ValueError, "logit_scale must be a finite number > 0, got inf"),
    (dict(logit_scale=float("nan")), ValueError, "logit_scale must be a finite number > 0, got nan"),
    (dict(logit_scale=None), TypeError, "logit_scale must be a number, got NoneType"),
    (dict(z_loss=float("nan")), ValueError, "z_loss must be a finite number >= 0, got nan"),
    (dict(label_smoothing=float("nan")), ValueError, "label_smoothing must be in [0, 1], got nan"),
    (dict(label_smoothing=-0.1), ValueError, "label_smoothing must be in [0, 1], got -0.1"),
    (dict(denominator=float("inf")), ValueError, "denominator must be a finite number >= 0, got inf"),
    (dict(denominator=float("nan")), ValueError, "denominator must be a finite number >= 0, got nan"),
    (dict(softcap="5"), TypeError, "softcap must be a number, got str"),
    (dict(logit_scale=0.0), ValueError, "logit_scale must be a finite number > 0, got 0.0"),
    (dict(logit_scale=torch.tensor(2.0)), TypeError, "logit_scale must be a number, got Tensor"),
    (dict(inplace=1), TypeError, "inplace must be True or False, got 1"),
    (dict(allow_retain_graph=None), TypeError, "allow_retain_graph must be True or False, got None"),
    (dict(return_stats="yes"), TypeError, "return_stats must be True or False, got 'yes'"),
    (dict(return_stats="Entropy"), TypeError, "got 'Entropy'; or 'entropy', which adds that of each row"),
    (dict(return_stats=1), TypeError, "return_stats must be True or False, got 1; or 'entropy'"),
    (dict(return_stats=None), TypeError, "return_stats must be True or False, got None; or 'entropy'"),
    (dict(inplace=True, allow_retain_graph=True), ValueError, "inplace must be False with allow_retain_graph=True,"
     " which keeps the logits, got True"),
    (dict(weight=[1.0] * V), TypeError, "weight must be a torch.Tensor, got list"),
    (dict(weight=torch.ones(V, dtype=torch.bool)), TypeError, "weight must be a tensor of real numbers, got torch.bool"),
    (dict(weight=torch.ones(V, requires_grad=True)), ValueError, "weight must not require grad"),
    (dict(token_weight=torch.ones(N, dtype=torch.complex64)), TypeError, "token_weight must be a tensor of real numbers,"
     " got torch.complex64"),
]  # fmt: skip

TENSORS = [
    (dict(weight=torch.ones(V + 1)), ValueError, f"weight must have one entry per class, [{V}], got [{V + 1}]"),
    (dict(token_weight=torch.ones(N, 1)), ValueError, f"token_weight must have the shape of the target, [{N}], got [{N}, 1]"),
    (dict(logits=[[0.0] * V] * N), TypeError, "logits must be a torch.Tensor, got list"),
    (dict(target=[0] * N), TypeError, "target must be a torch.Tensor, got list"),
    (dict(logits=torch.zeros(N, V, dtype=torch.int64)), TypeError, "logits must be float16, bfloat16, float32 or float64,"
     " got torch.int64"),
    (dict(logits=torch.zeros(())), ValueError, "logits must be (..., V) with at least one class, got shape []"),
    (dict(logits=torch.zeros(N, 0)), ValueError, f"logits must be (..., V) with at least one class, got shape [{N}, 0]"),
    (dict(target=torch.zeros(N)), TypeError, "target must be int32 or int64, got torch.float32"),
    (dict(target=torch.zeros(N, dtype=torch.int16)), TypeError, "target must be int32 or int64, got torch.int16"),
    (dict(target=torch.zeros(N + 1, dtype=torch.int64)), ValueError, "target must have the shape of the logits without"
     f" the last dimension, [{N}], got [{N + 1}]"),
    (dict(target=torch.zeros(N, V, dtype=torch.int64)), ValueError, "target must have the shape of the logits without"
     f" the last dimension, [{N}], got [{N}, {V}]"),
]  # fmt: skip


def refuse(function, options, error, message, device):
    logits, target = arguments(device)
    logits.requires_grad_()
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) and not v.requires_grad else v for k, v in options.items()
    }
    with pytest.raises(error, match=re.escape(message)):
        function(options.pop("logits", logits), options.pop("target", target), **options)
    assert (logits == 0).all()


@pytest.mark.parametrize("options, error, message", OPTIONS + TENSORS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
def test_bad_arguments(backend, options, error, message, device):
    refuse(truncated_cross_entropy, {"backend": backend, "inplace": True, **options}, error, message, device)
    if not {"threshold", "label_smoothing"} & set(options):  # focal has neither
        refuse(focal_cross_entropy, {"backend": backend, **options}, error, message, device)


FOCAL = [
    (dict(gamma=-1), ValueError, "gamma must be a finite number >= 0, got -1"),
    (dict(gamma=float("inf")), ValueError, "gamma must be a finite number >= 0, got inf"),
    (dict(gamma=torch.tensor(2.0)), TypeError, "gamma must be a number, got Tensor"),
    (dict(gamma=float("nan")), ValueError, "gamma must be a finite number >= 0, got nan"),
    (dict(alpha=float("inf")), ValueError, "alpha must be a finite number >= 0, got inf"),
    (dict(alpha=-0.5), ValueError, "alpha must be a finite number >= 0, got -0.5"),
    (dict(label_smoothing=0.1), ValueError, "label_smoothing must be 0 with the focal loss, got 0.1"),
]


@pytest.mark.parametrize("options, error, message", FOCAL, ids=lambda value: str(value)[:40])
def test_bad_focal_arguments(options, error, message, device):
    refuse(focal_cross_entropy, options, error, message, device)
    with pytest.raises(error, match=re.escape(message)):
        FocalCrossEntropyLoss(**options)


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=lambda value: str(value)[:40])
def test_modules_check_their_options_when_they_are_made(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TruncatedCrossEntropyLoss(**options)


D = 3
LINEAR = [
    (dict(input=[[0.0] * D] * N), TypeError, "input must be a torch.Tensor, got list"),
    (dict(linear_weight=None), TypeError, "linear_weight must be a torch.Tensor, got NoneType"),
    (dict(linear_bias=1.0), TypeError, "linear_bias must be a torch.Tensor, got float"),
    (dict(input=torch.zeros(N, D, dtype=torch.int64)), TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int64"),
    (dict(linear_weight=torch.zeros(V, D, dtype=torch.bool)), TypeError, "linear_weight must be float16, bfloat16, float32 or float64, got torch.bool"),
    (dict(input=torch.zeros(N, D + 1)), ValueError, f"input must be (..., D) with D = {D} as in linear_weight, got shape [{N}, {D + 1}]"),
    (dict(input=torch.zeros(())), ValueError, f"input must be (..., D) with D = {D} as in linear_weight, got shape []"),
    (dict(linear_weight=torch.zeros(V)), ValueError, f"linear_weight must be (V, D) with at least one class and feature, got shape [{V}]"),
    (dict(linear_weight=torch.zeros(0)), ValueError, "got shape [0]; a weight that is sharded must be gathered first"),
    (dict(linear_weight=torch.zeros(0, D)), ValueError, "linear_weight must be (V, D) with at least one class and feature, got shape [0, 3]"),
    (dict(linear_bias=torch.zeros(V, 1)), ValueError, f"linear_bias must have one entry per class, [{V}], got [{V}, 1]"),
    (dict(input=torch.zeros(N, D, dtype=torch.bfloat16)), TypeError, "linear_weight must have the dtype of the input (torch.bfloat16), got"
     " torch.float32; convert one of them, or use torch.autocast"),
    (dict(linear_bias=torch.zeros(V, dtype=torch.float16)), TypeError, "linear_bias must have the dtype of the input (torch.float32), got torch.float16"),
    (dict(target=torch.zeros(N + 1, dtype=torch.int64)), ValueError, f"target must have the shape of the input without the last dimension, [{N}], got [{N + 1}]"),
    (dict(weight=torch.ones(V + 1)), ValueError, f"weight must have one entry per class, [{V}], got [{V + 1}]"),
    (dict(chunk_size=0), ValueError, "chunk_size must be 'auto' or at least 1, got 0"),
    (dict(chunk_size=2.0), TypeError, "chunk_size must be 'auto' or an int, got 2.0"),
    (dict(chunk_size=True), TypeError, "chunk_size must be 'auto' or an int, got True"),
    (dict(chunk_size="all"), TypeError, "chunk_size must be 'auto' or an int, got 'all'"),
    (dict(accumulate_dtype="float32"), TypeError, "accumulate_dtype must be a torch.dtype, got 'float32'"),
    (dict(accumulate_dtype=torch.int32), ValueError, "accumulate_dtype must be one of torch.float16, torch.bfloat16, torch.float32,"
     " torch.float64, got torch.int32"),
]  # fmt: skip
LINEAR_OPTIONS = [case for case in OPTIONS if "inplace" not in case[0]]


def refuse_linear(function, options, error, message, device):
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) and not v.requires_grad else v for k, v in options.items()
    }
    given = dict(
        input=torch.zeros(N, D, device=device, requires_grad=True), linear_weight=torch.zeros(V, D, device=device),
        target=torch.zeros(N, dtype=torch.int64, device=device),
    )  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        function(**given | options)


@pytest.mark.parametrize("options, error, message", LINEAR_OPTIONS + LINEAR, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
def test_bad_linear_arguments(backend, options, error, message, device):
    refuse_linear(linear_truncated_cross_entropy, {"backend": backend, **options}, error, message, device)
    if not {"threshold", "label_smoothing"} & set(options):
        refuse_linear(linear_focal_cross_entropy, {"backend": backend, **options}, error, message, device)


@pytest.mark.parametrize("options, error, message", FOCAL, ids=lambda value: str(value)[:40])
def test_bad_linear_focal_arguments(options, error, message, device):
    refuse_linear(linear_focal_cross_entropy, options, error, message, device)


def test_linear_modules_check_their_options_when_they_are_made():
    module_options = [
        c for c in LINEAR_OPTIONS + LINEAR if {"chunk_size", "accumulate_dtype", "threshold", "reduction"} & set(c[0])
    ]
    assert len(module_options) > 10
    for options, error, message in module_options:
        with pytest.raises(error, match=re.escape(message)):
            LinearTruncatedCrossEntropyLoss(**options)
    with pytest.raises(TypeError, match="inplace is not an option of the linear loss"):
        LinearTruncatedCrossEntropyLoss(inplace=True)
    with pytest.raises(TypeError, match="inplace"):
        linear_truncated_cross_entropy(torch.zeros(N, D), torch.zeros(V, D), torch.zeros(N).long(), inplace=True)


def test_linear_devices_must_agree():
    given = dict(input=torch.zeros(N, D), linear_weight=torch.zeros(V, D), target=torch.zeros(N, dtype=torch.int64))
    for name, tensor in given.items() | {("token_weight", torch.ones(N)), ("linear_bias", torch.ones(V))}:
        if name == "input":
            continue
        with pytest.raises(ValueError, match=rf"{name} must be on the device of the input \(cpu\), got meta"):
            linear_truncated_cross_entropy(**given | {name: tensor.to("meta")})


@pytest.mark.parametrize("target", [-1, V, 2**40])
def test_bad_targets_of_the_linear_loss(target, device):
    input, weight = torch.randn(N, D, device=device, requires_grad=True), torch.randn(V, D, device=device)
    targets = torch.tensor([0, -100, target, 1], device=device)
    if device.type == "cpu":
        for backend in ("torch", "reference"):
            for context in (torch.no_grad(), torch.enable_grad()):
                with context, pytest.raises(IndexError, match=rf"got {target} at position \[2\]"):
                    linear_truncated_cross_entropy(input, weight, targets, 1.0, backend=backend)


@needs_triton
@pytest.mark.parametrize("target", [-1, V, 2**40])
def test_bad_targets_of_the_linear_loss_are_nan_on_triton(target, device):
    input, weight = torch.randn(N, D, device=device, requires_grad=True), torch.randn(V, D, device=device)
    targets = torch.tensor([0, -100, target, 1], device=device)
    value = linear_truncated_cross_entropy(input, weight, targets, 1.0, backend="triton", reduction="none")
    assert value.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(value.sum(), input)
    assert gradient.isnan().any(1).tolist() == [False, False, True, False]


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="smoothing"):
        TruncatedCrossEntropyLoss(smoothing=0.1)
    with pytest.raises(TypeError, match="gamma"):
        truncated_cross_entropy(*arguments("cpu"), gamma=2.0)


@pytest.mark.parametrize("backend", FAST)
def test_strides_that_would_need_a_copy(backend, device):
    logits = torch.zeros(V, N, device=device).t()
    target = torch.zeros(N, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"contiguous classes.*strides \[1, 4\]; pass logits.contiguous\(\)"):
        truncated_cross_entropy(logits, target, backend=backend)
    logits = torch.zeros(2, 3, 4, V + 1, device=device)[:, :2, :3, :V]
    with pytest.raises(ValueError, match=r"rows that two strides describe.*pass logits.contiguous\(\)"):
        truncated_cross_entropy(logits, logits.new_zeros(2, 2, 3, dtype=torch.int64), backend=backend)
    assert truncated_cross_entropy(logits, logits.new_zeros(2, 2, 3, dtype=torch.int64), backend="reference") > 0


@needs_triton
def test_float64_on_triton(device):
    logits, target = arguments(device)
    with pytest.raises(
        TypeError, match="float16, bfloat16 or float32 with backend='triton', got float64; pass backend='torch'"
    ):
        truncated_cross_entropy(logits.double(), target, backend="triton")


def test_devices_must_agree():
    logits, target = arguments("cpu")
    meta = torch.device("meta")
    cases = [dict(target=target.to(meta)), dict(weight=torch.ones(V, device=meta)), dict(threshold=torch.tensor(0.5, device=meta)),
             dict(token_weight=torch.ones(N, device=meta)), dict(denominator=torch.tensor(3, device=meta))]  # fmt: skip
    for options in cases:
        (name,) = options
        with pytest.raises(ValueError, match=rf"{name} must be on the device of the logits \(cpu\), got meta"):
            tce_kernels.truncated_cross_entropy(logits, options.pop("target", target), **options)


def test_float64_does_not_mix_with_others_under_autocast():
    """Autocast converts between float32 and 16 bits, and leaves float64 alone."""
    given = dict(input=torch.zeros(N, D), linear_weight=torch.zeros(V, D), target=torch.zeros(N, dtype=torch.int64))
    for name in ("input", "linear_weight"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(TypeError, match="must have the dtype of the input"):
                linear_truncated_cross_entropy(**given | {name: given[name].double()})


def test_rows_that_overlap_across_the_outer_dimension_only():
    memory = torch.zeros(100, requires_grad=True) * 1
    logits = memory.as_strided((2, 3, V), (V, 2 * V, 1))  # rows 0, 14, 28 and 7, 21, 35: no two share memory
    target = torch.zeros(2, 3, dtype=torch.int64)
    truncated_cross_entropy(logits, target, inplace=True)
    logits = memory.as_strided((1, 3, V), (0, V, 1))  # nothing is as far apart as the stride of one says
    truncated_cross_entropy(logits, target[:1], inplace=True)
    logits = memory.as_strided((2, 3, V), (2 * V + 3, V, 1))  # 0, 7, 14 and 17: the third and the fourth do
    with pytest.raises(ValueError, match="inplace must be False for logits whose rows share memory"):
        truncated_cross_entropy(logits, target, inplace=True)
