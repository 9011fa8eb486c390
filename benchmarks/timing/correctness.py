"""Core cases against the reference in float64, on the device that is about to be measured."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tce_kernels

FEW, MANY = 48, 192  # rows: fewer than a GPU has multiprocessors, which share them, and more. One in four is ignored
D = 128
BLOCK_SIZES = (1024, 50257, 128256)  # one block of the kernels; many, with odd rows; many, aligned
FLOAT32 = 2e-5  # relative error of p in float32, F.cross_entropy's too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    loss: str  # a function of tce_kernels
    dtype: torch.dtype
    V: int
    options: dict
    N: int = FEW
    strided: bool = False  # rows of the logits lie further apart than their length

    def __str__(self) -> str:
        options = ", ".join(f"{k}={list(v.shape) if isinstance(v, Tensor) else v}" for k, v in self.options.items())
        strided = ", strided rows" if self.strided else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.loss}({options}), {dtype}, N = {self.N}, V = {self.V}{strided}"


def cases(sizes: tuple[int, ...] = BLOCK_SIZES) -> list[Case]:
    """Every dtype, size, layout and number of rows; every loss, reduction and shared option; the linear losses too."""
    small, odd, large = sizes
    weight = torch.rand(odd, generator=torch.Generator().manual_seed(3)) + 0.5
    token_weight = torch.rand(MANY, generator=torch.Generator().manual_seed(4)) + 0.5
    options = [
        dict(reduction="none"),
        dict(reduction="mean"),
        dict(reduction="mean", denominator="kept"),
        dict(label_smoothing=0.1),
        dict(z_loss=1e-2),
        dict(softcap=20.0),
        dict(logit_scale=1.3),
        dict(weight=weight),
        dict(token_weight=token_weight),
        dict(allow_retain_graph=True),
    ]
    truncated, focal = "truncated_cross_entropy", "focal_cross_entropy"
    total = dict(reduction="sum", threshold=0.6)
    found = [
        Case(truncated, dtype, V, total, N, strided)
        for dtype in DTYPES
        for V in sizes
        for N in (FEW, MANY)
        for strided in (False, True)
    ]
    found += [Case(truncated, torch.bfloat16, odd, total | option, MANY) for option in options]
    found += [Case(truncated, torch.float32, V, dict(threshold=1.0)) for V in sizes]
    found += [Case(focal, dtype, odd, dict(gamma=2.0, reduction="sum")) for dtype in DTYPES]
    linear = [dict(threshold=0.6), dict(threshold=0.6, reduction="none"), dict(threshold=1.0, chunk_size=20)]
    found += [Case(f"linear_{truncated}", dtype, small, option) for dtype in DTYPES for option in linear]
    every = dict(threshold=0.6, reduction="sum", chunk_size=20, softcap=30.0, z_loss=1e-3)
    found += [Case(f"linear_{truncated}", torch.bfloat16, small, every)]
    return found + [Case(f"linear_{focal}", dtype, small, dict(gamma=2.0)) for dtype in DTYPES]


def failures(todo: Iterable[Case], device: torch.device, backend: str) -> list[str]:
    """A line for each case whose loss or gradients the rounding of its dtype does not explain."""
    found = []
    for case in todo:
        difference = (compare_linear if case.loss.startswith("linear") else compare)(case, device, backend)
        if difference:
            found.append(f"{case}: {difference}")
    return found


def make_targets(N: int, V: int, generator: torch.Generator) -> Tensor:
    target = torch.randint(V, (N,), generator=generator, device=generator.device)
    target[0], target[-1] = 0, V - 1
    target[2::4] = -100
    return target


def compare(case: Case, device: torch.device, backend: str) -> str | None:
    """What is wrong with a loss of given logits, whose targets range from lost to confident."""
    generator = torch.Generator(device).manual_seed(0)
    N = case.N
    values = 2 * torch.randn(N, case.V, generator=generator, device=device)
    target = make_targets(N, case.V, generator)
    # The last is e^2 times as likely as all others together. Were it more, 1 - p and the sum of the others' small
    # terms would be lost in float32, in every implementation.
    rows = torch.arange(N, device=device)
    values[rows, target.clamp(min=0)] = torch.linspace(-4, math.log(case.V) + 4, N, device=device)
    logits = torch.empty(N, case.V + 5 * case.strided, dtype=case.dtype, device=device)[:, : case.V].copy_(values)

    value, (gradient,) = evaluated(case, (logits,), target, device, backend)
    exact, (expected,) = evaluated(case, (logits.double(),), target, device, "reference")
    if not torch.allclose(value.double(), exact, atol=2e-6 * (N if value.dim() == 0 else 1), rtol=1e-5):
        return f"the loss is off by {(value - exact).abs().max():.2g}"
    if gradient[(expected == 0).all(1)].any():
        return "the gradient of a dropped or ignored row is not zero"
    # The gradient is made of terms p, p - 1 and p less what smoothing gives every class, times a factor of the row.
    # p is rounded as the exponential of numbers up to 20 over a sum of V terms, FLOAT32 of it; the differences are
    # off by as much of what they subtract. Then comes one rounding, to a dtype that may lack numbers below 2^-24.
    scale = {"mean": 2 / N, "sum": 2.0, "none": 3.0}[case.options.get("reduction", "mean")]
    allowed = (FLOAT32 + torch.finfo(case.dtype).eps) * expected.abs()
    allowed += FLOAT32 * scale * case.options.get("label_smoothing", 0.0) / case.V
    kept = target >= 0
    allowed[kept, target[kept]] += FLOAT32 * scale * (1 + 60 * case.options.get("z_loss", 0.0))
    allowed += 2**-24 if case.dtype == torch.float16 else 0
    wrong = int((~((gradient - expected).abs() <= allowed)).sum())
    return f"{wrong} of {expected.numel()} gradients are wrong" if wrong else None


def compare_linear(case: Case, device: torch.device, backend: str) -> str | None:
    """What is wrong with a loss of hidden states: every third points at its target, the others at a right angle."""
    generator = torch.Generator(device).manual_seed(0)
    N = case.N
    input = torch.randn(N, D, generator=generator, device=device)
    weight = F.normalize(torch.randn(case.V, D, generator=generator, device=device))
    bias = 0.1 * torch.randn(case.V, generator=generator, device=device)
    target = make_targets(N, case.V, generator)
    towards = weight[target.clamp(min=0)]
    input -= (input * towards).sum(1, keepdim=True) * towards
    input[::3] = 60 * towards[::3]
    inputs = tuple(tensor.to(case.dtype) for tensor in (input, weight, bias))

    value, gradients = evaluated(case, inputs, target, device, backend)
    exact, expected = evaluated(case, tuple(x.double() for x in inputs), target, device, "reference")
    # |z| <= 60: logits are off by about 60 eps, most by less. z-loss doubles that and multiplies by lse.
    eps = torch.finfo(case.dtype).eps
    factor = (N if case.options.get("reduction") == "sum" else 1) * (1 + 120 * case.options.get("z_loss", 0.0))
    if not torch.allclose(value.double(), exact, atol=60 * eps * factor, rtol=1e-5):
        return f"the loss is off by {(value - exact).abs().max():.2g}"
    for name, gradient, wanted in zip(("input", "weight", "bias"), gradients, expected, strict=True):
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        if not error <= max(4 * eps, 1e-5):
            return f"the gradient of the {name} is off by {error:.2g} of its norm"
    return None


def evaluated(
    case: Case, inputs: tuple[Tensor, ...], target: Tensor, device: torch.device, backend: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradients for a random upstream gradient, which is the same for every dtype."""
    tensors = [x.detach().requires_grad_() for x in inputs]
    loss: Callable = getattr(tce_kernels, case.loss)
    compute = torch.promote_types(inputs[0].dtype, torch.float32)
    options = {k: v.to(device, compute) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    if case.loss.startswith("linear"):
        value = loss(*tensors[:2], target, linear_bias=tensors[2], backend=backend, **options)
    else:
        value = loss(*tensors, target, backend=backend, **options)
    upstream = 0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(value, tensors, upstream.to(value))
    return value.detach(), gradients
