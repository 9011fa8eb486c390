"""Time and memory of one loss and its gradient, on logits of which a given share of rows is truncated."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tce_kernels

from . import peers, suite
from .measure import OURS, Inexact, Observed, Provider, compiles
from .suite import THRESHOLD, Suite

CONFIDENT = 0.99  # p_t of the rows that are to be truncated
CHECKED_ROWS = 64


class Case(NamedTuple):
    N: int
    V: int
    dtype: torch.dtype
    share: float  # of the rows that are truncated
    rounds: int


class Copy(torch.autograd.Function):
    """Reads the logits once and writes as much once, as every loss with a gradient must; it gives no loss."""

    @staticmethod
    def forward(ctx, logits):
        ctx.gradient = logits.clone()
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.gradient


def cases(quick: bool, shape: list[int] | None, dtype: str | None, on_gpu: bool) -> list[Case]:
    """All shares of truncated rows; unless a shape or dtype is asked for, also other vocabularies and dtypes."""
    N, V = shape or ((8192, 128256) if on_gpu else (1024, 49152))
    half = Case(N, V, getattr(torch, dtype or ("bfloat16" if on_gpu else "float32")), 0.5, 7 if quick else 20)
    if quick:
        return [half._replace(share=share) for share in (0.0, 0.8)]
    found = [half._replace(share=share) for share in (0.0, 0.5, 0.8, 0.95)]
    if shape or dtype:
        return found
    found += [half._replace(V=V, rounds=10) for V in ((32000, 50257, 262144) if on_gpu else (16384, 98304))]
    others = (torch.float32, torch.float16) if on_gpu else (torch.bfloat16, torch.float16)
    return found + [half._replace(dtype=other, rounds=10) for other in others]


def providers(case: Case, device: torch.device, quick: bool) -> list[list[Provider]]:
    """Each entry is one provider, here in a single size. The last is the floor."""
    found = [
        Provider(OURS, ours),
        Provider("plain PyTorch", plain_truncated),
    ]
    if compiles(device):
        compiled = torch.compile(plain_truncated, dynamic=False)
        found.append(Provider("plain PyTorch, torch.compile", compiled, compiles=True))
    found.append(Provider("F.cross_entropy", F.cross_entropy, truncates=False))
    liger, _ = peers.offer(peers.LIGER, "logits", device)
    if liger:
        name, per_row = peers.named(peers.LIGER), liger(reduction="none")
        found.append(Provider(name, liger(), truncates=False, overwrites=True))
        found.append(Provider(f"{name} + truncation", functools.partial(truncated, per_row), overwrites=True))
    quack, _ = peers.offer(peers.QUACK, "logits", device)
    if quack:
        name, per_row = peers.named(peers.QUACK), functools.partial(quack, reduction="none")
        found.append(Provider(name, quack, truncates=False))
        found.append(Provider(f"{name} + truncation", functools.partial(truncated, per_row)))
    found.append(Provider("copying alone", lambda logits, target: Copy.apply(logits), is_floor=True))
    return [[provider] for provider in found]


def ours(logits: Tensor, target: Tensor) -> Tensor:
    return tce_kernels.truncated_cross_entropy(logits, target, THRESHOLD)


def truncated(per_row: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """The truncated loss as one writes it around a cross-entropy that gives the losses of the rows."""
    loss = per_row(logits, target)
    return torch.where(loss >= -math.log(THRESHOLD), loss, 0).mean()


def plain_truncated(logits: Tensor, target: Tensor) -> Tensor:
    return truncated(functools.partial(F.cross_entropy, reduction="none"), logits, target)


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random normal logits (N, V), round(share * N) rows of which have p_t of about CONFIDENT, and targets (N,)."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(case.N, case.V, dtype=case.dtype, device=device, generator=generator)
    target = torch.randint(case.V, (case.N,), device=device, generator=generator)
    rows = torch.randperm(case.N, device=device, generator=generator)[: round(case.share * case.N)]
    for row in rows.split(CHECKED_ROWS):
        lse = logits[row].float().logsumexp(-1)
        logits[row, target[row]] = (lse + math.log(CONFIDENT / (1 - CONFIDENT))).to(case.dtype)
    return logits.requires_grad_(), target


def checker(case: Case, inputs: tuple[Tensor, Tensor]) -> Callable[[Provider, Observed], None]:
    """Compares with the reference in float64: the loss, the gradient of the first rows, zeros where truncated."""
    logits, target = (x.detach() for x in inputs)
    N = len(target)
    log_p = []
    for x, t in zip(logits.split(CHECKED_ROWS), target.split(CHECKED_ROWS), strict=True):
        _, stats = reference(x.double(), t, THRESHOLD)
        log_p.append(stats.log_prob)
    log_p = torch.cat(log_p)
    dropped = log_p > math.log(THRESHOLD)
    assert dropped.sum() == round(case.share * N)
    losses = {1.0: -log_p.mean().item(), THRESHOLD: -log_p[~dropped].sum().item() / N}

    x, t = logits[:CHECKED_ROWS].double().requires_grad_(), target[:CHECKED_ROWS]
    gradients = {threshold: torch.autograd.grad(reference(x, t, threshold)[0] / N, x)[0] for threshold in losses}
    rows = torch.arange(len(t), device=t.device)

    def check(provider: Provider, observed: Observed) -> None:
        threshold = THRESHOLD if provider.truncates else 1.0
        expected, loss = gradients[threshold], losses[threshold]
        # Relative to each entry, as log p of about -12 is rounded before it is exponentiated; and to 1/N at the
        # target, where the gradient is the difference of two terms. In float32 the sum of V exponentials is off by
        # more: 2e-5 in PyTorch. float16 has no numbers between 0 and 2^-24.
        tolerance = max(16 * torch.finfo(case.dtype).eps, 1e-4)
        allowed = tolerance * expected.abs() + (2**-24 if case.dtype == torch.float16 else 0)
        allowed[rows, t] += tolerance / N * (expected[rows, t] != 0)
        gradient = observed.gradients[0]
        wrong = int((~((gradient[:CHECKED_ROWS] - expected).abs() <= allowed)).sum())
        if wrong:
            raise Inexact(f"{wrong} of {expected.numel()} checked gradients are not the reference's")
        if provider.truncates and gradient[dropped].any():
            raise Inexact("the gradient of a truncated row is not zero")
        if not abs(observed.loss.item() - loss) <= tolerance * loss:
            raise Inexact(f"the loss is {observed.loss.item():.9g}, the reference says {loss:.9g}")

    return check


def reference(logits: Tensor, target: Tensor, threshold: float) -> tuple[Tensor, tce_kernels.LossStats]:
    return tce_kernels.truncated_cross_entropy(
        logits, target, threshold, reduction="sum", return_stats=True, backend="reference"
    )


SUITE = Suite(
    name="logits",
    description=__doc__,
    subject="loss and gradient",
    floor="copying alone",
    sizes={"N": "rows", "V": "vocabulary"},
    in_words=lambda case: f"logits {case.N} x {case.V}",
    cases=cases,
    providers=providers,
    make_inputs=make_inputs,
    checker=checker,
    missing=lambda device, quick: peers.missing("logits", device),
)


def main(arguments: list[str]) -> int:
    return suite.main(SUITE, arguments)
