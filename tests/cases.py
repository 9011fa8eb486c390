"""Inputs from lost to confident, and comparison with the float64 reference within what the arithmetic explains."""

import importlib.util
import math

import pytest
import torch

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


def truncated(logits, target, **options):
    return tce_kernels.truncated_cross_entropy(logits, target, options.pop("threshold", 0.6), **options)


def focal(logits, target, **options):
    return tce_kernels.focal_cross_entropy(logits, target, options.pop("gamma", 2.0), **options)


def cross_entropy(logits, target, **options):
    return tce_kernels.truncated_cross_entropy(logits, target, 1.0, **options)


def log_of(threshold):
    return torch.tensor(math.log(threshold), dtype=torch.float64).float()
