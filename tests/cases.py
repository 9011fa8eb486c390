"""Inputs from lost to confident, and comparison with the float64 reference within what the arithmetic explains."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import tce_kernels

INTERPRETED = not torch.cuda.is_available()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FAST = ["torch", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(N, V, dtype, device, seed=0):
    """Logits [N, V] whose targets range from lost to certain, and targets [N], one in four ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, V, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    target[-1], target[0] = V - 1, 0
    logits[torch.arange(N), target] += torch.linspace(-4, 18, N)
    target[2::4] = -100
    return logits.to(dtype).to(device), target.to(device)


def option_values(N, V, device):
    """The options that all losses share, each at a value that matters."""
    generator = torch.Generator().manual_seed(2)
    token_weight = torch.rand(N, generator=generator).mul(2)
    token_weight[3] = 0
    return [
        ("weight", torch.rand(V, generator=generator).mul(2).to(device)),
        ("token_weight", token_weight.to(device)),
        ("ignore_index", 7),
        ("reduction", "sum"),
        ("reduction", "none"),
        ("denominator", "kept"),
        ("denominator", 31),
        ("denominator", torch.tensor(17, device=device)),
        ("label_smoothing", 0.1),
        ("z_loss", 1e-2),
        ("softcap", 9.0),
        ("logit_scale", 1.3),
        ("allow_retain_graph", True),
    ]


def loss_and_gradient(loss, logits, target, *, upstream_seed=1, **options):
    """loss(logits, target, **options) and its gradient for a random upstream gradient, the same in every dtype."""
    logits = logits.detach().requires_grad_()
    value = loss(logits * 1 if options.get("inplace") else logits, target, **options)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = (0.5 + torch.rand(value.shape, generator=generator)).to(value)
    (gradient,) = torch.autograd.grad(value, logits, upstream)
    return value.detach(), gradient


def assert_matches_reference(loss, logits, target, *, backend, **options):
    """Loss and gradient against the reference in float64, which sees the very same logits and options."""
    value, gradient = loss_and_gradient(loss, logits, target, backend=backend, **options)
    exact_options = {k: v.double() if _is_floating(v) else v for k, v in options.items() if k != "inplace"}
    exact, exact_gradient = loss_and_gradient(loss, logits.double(), target, backend="reference", **exact_options)
    compute = torch.promote_types(logits.dtype, torch.float32)
    assert value.dtype == compute
    assert gradient.dtype == logits.dtype
    assert_close(value, exact, gradient, exact_gradient, compute, backend, options)
    dropped = (exact_gradient == 0).all(-1)
    assert torch.equal(_bits(gradient[dropped]), torch.zeros_like(_bits(gradient[dropped]))), "dropped rows are exact 0"


def assert_close(value, exact, gradient, exact_gradient, compute, backend, options):
    torch.testing.assert_close(value.double(), exact, atol=2e-6, rtol=1e-5, equal_nan=True)
    # float32 arithmetic: p is off by about eps |z|, relative; p - 1 by eps, absolute; both times the row's factor,
    # in which z-loss has 2 lse, at most 50 for these inputs.
    factor = (options.get("logit_scale", 1.0)) * max(1.0, _largest(options.get("token_weight")))
    factor *= max(1.0, _largest(options.get("weight"))) * (1 + 50 * options.get("z_loss", 0.0))
    eps = torch.finfo(gradient.dtype).eps
    # Rounded once or, where the upstream gradient comes after, twice: eps / 2 each. The interpreter truncates
    # float32 to bfloat16 where a GPU rounds: eps each.
    truncates = INTERPRETED and backend == "triton" and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(
        gradient.double(), exact_gradient, equal_nan=True,
        atol=1e-6 * factor + (2**-24 if gradient.dtype == torch.float16 else 0),
        rtol=1e-5 + eps * (2 if truncates else 1),
    )  # fmt: skip


def _largest(tensor):
    return 1.0 if tensor is None else tensor.max().item()


def _is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def make_linear_inputs(N, D, V, dtype, device, seed=0, confident=1 / 3):
    """Input [N, D], weight [V, D], bias [V] and target [N], one in four ignored.

    A share `confident` of the rows points at its target's row of the weight, the others are at a right angle to it:
    far enough on either side of a threshold of 0.6 for the rounding of 16-bit logits.
    """
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(N, D, generator=generator)
    weight = F.normalize(torch.randn(V, D, generator=generator))
    bias = 0.1 * torch.randn(V, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    target[-1] = V - 1
    towards = weight[target]
    input -= (input * towards).sum(1, keepdim=True) * towards
    rows = torch.randperm(N, generator=generator)[: round(confident * N)]
    input[rows] = 60 * towards[rows]
    target[2::4] = -100
    return *(tensor.to(dtype).to(device) for tensor in (input, weight, bias)), target.to(device)


def linear_loss_and_gradients(loss, input, weight, bias, target, /, **options):
    """loss(...) and its gradients, without the bias's where that is None, for a random upstream gradient."""
    tensors = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    value = loss(*tensors, target, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = (0.5 + torch.rand(value.shape, generator=generator)).to(value)
    return value.detach(), torch.autograd.grad(value, [tensor for tensor in tensors if tensor is not None], upstream)


def error_of(tensor, exact):
    """Relative error in norm; absolute where the exact tensor is 0."""
    norm = exact.norm()
    return ((tensor.double() - exact).norm() / torch.where(norm == 0, 1, norm)).item()


def assert_inductor_gives(got, want):
    """The bits of eager mode on a CPU. On a GPU TorchInductor may divide otherwise, a bit off, before the rounding."""
    if got.is_cuda:
        assert got.dtype == want.dtype
        assert error_of(got, want) <= max(1e-6, torch.finfo(want.dtype).eps)
    else:
        assert torch.equal(got, want)


def assert_linear_matches_reference(loss, input, weight, bias, target, /, *, backend, **options):
    """Loss and gradients against the reference in float64, which sees the very same tensors and options."""
    value, gradients = linear_loss_and_gradients(loss, input, weight, bias, target, backend=backend, **options)
    wide = [None if tensor is None else tensor.double() for tensor in (input, weight, bias)]
    exact_options = {k: v.double() if _is_floating(v) else v for k, v in options.items()}
    exact, exact_gradients = linear_loss_and_gradients(loss, *wide, target, backend="reference", **exact_options)
    assert value.dtype == torch.promote_types(input.dtype, torch.float32)
    # |z| <= 60: float32 logits are off by about 60 eps, and 16-bit ones are rounded by half of that. z-loss doubles
    # it and multiplies by lse. Gradients have the same error in p, relative, and most rows have a smaller |z|.
    eps = torch.finfo(input.dtype).eps
    factor = max(1.0, _largest(options.get("token_weight"))) * max(1.0, _largest(options.get("weight")))
    factor *= (1 + 120 * options.get("z_loss", 0.0)) * (len(target) if options.get("reduction") == "sum" else 1)
    torch.testing.assert_close(value.double(), exact, atol=60 * eps * factor, rtol=1e-5)
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == input.dtype
        assert error_of(gradient, wanted) <= max(4 * eps, 1e-5)


def truncated(logits, target, **options):
    return tce_kernels.truncated_cross_entropy(logits, target, options.pop("threshold", 0.6), **options)


def focal(logits, target, **options):
    return tce_kernels.focal_cross_entropy(logits, target, options.pop("gamma", 2.0), **options)


def cross_entropy(logits, target, **options):
    return tce_kernels.truncated_cross_entropy(logits, target, 1.0, **options)


def linear_truncated(input, weight, bias, target, /, **options):
    threshold = options.pop("threshold", 0.6)
    return tce_kernels.linear_truncated_cross_entropy(input, weight, target, threshold, linear_bias=bias, **options)


def linear_focal(input, weight, bias, target, /, **options):
    return tce_kernels.linear_focal_cross_entropy(input, weight, target, 2.0, linear_bias=bias, **options)


def linear_cross_entropy(input, weight, bias, target, /, **options):
    return tce_kernels.linear_truncated_cross_entropy(input, weight, target, 1.0, linear_bias=bias, **options)


LINEAR_LOSSES = [linear_cross_entropy, linear_truncated, linear_focal]


def log_of(threshold):
    return torch.tensor(math.log(threshold), dtype=torch.float64).float()
