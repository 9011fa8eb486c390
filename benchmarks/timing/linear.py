"""Time and memory of a language model's head: linear layer, loss, and the gradients of input and weight."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import heads, states, suite
from .measure import Observed, Provider
from .suite import THRESHOLD, Suite


class Case(NamedTuple):
    N: int
    D: int
    V: int
    dtype: torch.dtype
    share: float  # of the rows that are truncated
    rounds: int


def cases(quick: bool, shape: list[int] | None, dtype: str | None, on_gpu: bool) -> list[Case]:
    """All shares of truncated rows; unless a shape or dtype is asked for, also other N, V and dtypes at one half."""
    N, D, V = shape or ((8192, 4096, 128256) if on_gpu else (1024 if quick else 2048, 576, 49152))
    half = Case(N, D, V, getattr(torch, dtype or ("bfloat16" if on_gpu else "float32")), 0.5, 3 if quick else 5)
    if quick:
        return [half._replace(share=share) for share in (0.0, 0.8)]
    found = [half._replace(share=share) for share in (0.0, 0.1, 0.3, 0.5, 0.8, 0.95)]
    if shape or dtype:
        return found
    found += [half._replace(V=other, rounds=3) for other in ((32000, 262144) if on_gpu else (16384, 98304))]
    found += [half._replace(N=other, rounds=3) for other in ((2048, 32768) if on_gpu else (512, 1024, 4096))]
    for other in (torch.float16,) if on_gpu else (torch.bfloat16, torch.float16):
        found += [half._replace(dtype=other, share=share, rounds=3) for share in (0.0, 0.5)]
    return found


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal input (N, D) and weight (V, D), and targets (N,), of which round(share * N) are as good as sure."""
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(case.N, case.D, device=device, generator=generator)
    linear_weight = 0.02 * torch.randn(case.V, case.D, device=device, generator=generator)
    target = torch.randint(case.V, (case.N,), device=device, generator=generator)
    rows = torch.randperm(case.N, device=device, generator=generator)[: round(case.share * case.N)]
    direction = linear_weight[target[rows]]
    input[rows] = 25 * direction / direction.square().sum(-1, keepdim=True)  # a logit of 25 at the target
    return input.to(case.dtype).requires_grad_(), linear_weight.to(case.dtype).requires_grad_(), target


def checker(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[Provider, Observed], None]:
    expected, dropped = heads.exact(inputs)
    assert dropped.sum() == round(case.share * case.N)

    def check(provider: Provider, observed: Observed) -> None:
        heads.check(provider, observed, expected[THRESHOLD if provider.truncates else 1.0], dropped)

    return check


SUITE = Suite(
    name="linear",
    description=__doc__,
    subject="head, loss and gradients",
    floor="matmuls alone",
    sizes={"N": "rows", "D": "hidden size", "V": "vocabulary"},
    in_words=lambda case: f"input {case.N} x {case.D}, weight {case.V} x {case.D}",
    cases=cases,
    providers=lambda case, device, quick: heads.providers(case.N, case.dtype, case.share, device, quick),
    make_inputs=make_inputs,
    checker=checker,
    missing=heads.missing,
)


def main(arguments: list[str]) -> int:
    """With --states FILE, on those; otherwise on random numbers."""
    if any(argument.partition("=")[0] == "--states" for argument in arguments):
        return states.main(arguments)
    return suite.main(SUITE, arguments)
