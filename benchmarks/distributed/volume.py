"""What a rank sends in a forward and backward pass: ours, the formulas, Megatron's scheme and gathered logits."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import tce_kernels

from ..timing.linear import Case, make_inputs
from ..timing.suite import THRESHOLD
from . import counted, schemes

OURS, MEGATRON, GATHERED = "tce_kernels", "Megatron's scheme", "gathered logits"
LOGITS, REPLICATED, SHARDED = "given logits", 'linear, rows="replicated"', 'linear, rows="sharded"'
NO_GRADIENT = 'linear, rows="replicated", no gradient'
SUMS = 3 * 4  # bytes a row, float32
KEPT = (1.0, 0.8, 0.5, 0.2, 0.05)
# The largest error of an entry, relative to the largest entry of one process.
TOLERATED = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    N: int
    D: int
    V: int


class Inputs(NamedTuple):
    """Of all ranks: input [N, D], weight [V, D], target [N]."""

    input: Tensor
    weight: Tensor
    target: Tensor


class Expected(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]
    kept: Tensor  # bool [N]


class Scheme(NamedTuple):
    provider: str
    what: str
    loss: Callable[..., Tensor]  # of this rank's tensors
    needs_gradient: bool = True

    @property
    def truncates(self) -> bool:
        return self.provider == OURS


SCHEMES = [
    Scheme(OURS, LOGITS, lambda *tensors: tce_kernels.truncated_cross_entropy(*tensors, group=dist.group.WORLD)),
    Scheme(OURS, REPLICATED, lambda *tensors: linear(*tensors, rows="replicated")),
    Scheme(OURS, NO_GRADIENT, lambda *tensors: linear(*tensors, rows="replicated"), needs_gradient=False),
    Scheme(OURS, SHARDED, lambda *tensors: linear(*tensors, rows="sharded")),
    Scheme(MEGATRON, LOGITS, schemes.megatron_logits),
    Scheme(MEGATRON, REPLICATED, schemes.megatron_replicated),
    Scheme(MEGATRON, SHARDED, schemes.megatron_sharded),
    Scheme(GATHERED, LOGITS, schemes.gathered_logits),
]


def linear(input: Tensor, weight: Tensor, target: Tensor, rows: str) -> Tensor:
    return tce_kernels.linear_truncated_cross_entropy(
        input, weight, target, THRESHOLD, group=dist.group.WORLD, rows=rows
    )


def formula(scheme: Scheme, shape: Shape, itemsize: int, kept: float, p: int) -> float:
    """Bytes that a rank sends: sums of rows, rows themselves, gradients of rows. Without agreement and padding."""
    N, D, V = shape
    ring = (p - 1) / p
    sums, gradient = (p - 1) * N * SUMS, ring * kept * N * D * 4
    theirs = 2 * ring * N * SUMS
    row = ring * N * D * itemsize
    return {
        (OURS, LOGITS): sums,
        (OURS, NO_GRADIENT): sums,
        (OURS, REPLICATED): sums + 2 * gradient,
        (OURS, SHARDED): sums + row + gradient,
        (MEGATRON, LOGITS): theirs,
        (MEGATRON, REPLICATED): theirs + 2 * row,
        (MEGATRON, SHARDED): theirs + 3 * row,
        (GATHERED, LOGITS): ring * N * V * itemsize,
    }[scheme.provider, scheme.what]


def measure(shape: Shape, dtypes: list[torch.dtype], shares: tuple[float, ...], loopback: bool) -> Iterator[dict]:
    """Of every rank; a row of results per dtype, share of kept rows and scheme, once its result is right."""
    for dtype in dtypes:
        for kept in shares:
            inputs = Inputs(*make_inputs(Case(*shape, dtype, 1 - kept, 1), torch.device("cpu")))
            for scheme in SCHEMES:
                if scheme.truncates or kept == shares[0]:  # the others send the same whatever is kept
                    yield row_of(scheme, shape, inputs, kept, loopback)


def row_of(scheme: Scheme, shape: Shape, inputs: Inputs, kept: float, loopback: bool) -> dict:
    p = dist.get_world_size()
    expected = alone(inputs, scheme)
    tensors = own(inputs, scheme)
    check(scheme, expected, *run(scheme, tensors))
    dtype = inputs.input.dtype
    found = counted.collectives(lambda: run(scheme, tensors))
    sent = torch.tensor([
        sum(each.sent for each in found),
        sum(each.sent for each in found if not each.of_numbers),
        sum(each.sent_by_gloo for each in found),
    ])  # fmt: skip
    dist.all_reduce(sent)
    sent, agreement, by_gloo = (sent / p).tolist()
    read = counted.over_loopback(lambda: run(scheme, tensors)) if loopback else None
    return shape._asdict() | dict(
        p=p,
        dtype=str(dtype).removeprefix("torch."),
        provider=scheme.provider,
        what=scheme.what,
        kept=kept,
        collectives=len(found),
        formula_bytes=round(formula(scheme, shape, dtype.itemsize, kept, p)),
        sent_bytes=round(sent),
        agreement_bytes=round(agreement),
        sent_by_gloo_bytes=round(by_gloo),
        loopback_bytes="" if read is None else round(read),
    )


def own(inputs: Inputs, scheme: Scheme) -> tuple[Tensor, ...]:
    """This rank's tensors, as the scheme takes them."""
    input, weight, target = (tensor.detach() for tensor in inputs)
    rank, p = dist.get_rank(), dist.get_world_size()
    weight = weight.tensor_split(p)[rank]
    if scheme.what == LOGITS:
        tensors = [input @ weight.t()]
    else:
        tensors = [input.tensor_split(p)[rank] if scheme.what == SHARDED else input, weight]
    if scheme.what == SHARDED and scheme.truncates:
        target = target.tensor_split(p)[rank]
    return *(tensor.clone().requires_grad_(scheme.needs_gradient) for tensor in tensors), target


def run(scheme: Scheme, tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = scheme.loss(*tensors)
    return loss.detach(), torch.autograd.grad(loss, tensors[:-1]) if scheme.needs_gradient else ()


def alone(inputs: Inputs, scheme: Scheme) -> Expected:
    """The same on one process, and this rank's part of it."""
    input, weight, target = inputs
    rank, p = dist.get_rank(), dist.get_world_size()
    threshold = THRESHOLD if scheme.truncates else 1.0
    if scheme.what == LOGITS:
        logits = (input @ weight.t()).detach().requires_grad_()
        loss, stats = tce_kernels.truncated_cross_entropy(logits, target, threshold, return_stats=True)
        gradients = (torch.autograd.grad(loss, logits)[0].tensor_split(p, 1)[rank],)
    else:
        loss, stats = tce_kernels.linear_truncated_cross_entropy(input, weight, target, threshold, return_stats=True)
        dinput, dweight = torch.autograd.grad(loss, (input, weight))
        gradients = (
            dinput.tensor_split(p)[rank] if scheme.what == SHARDED else dinput,
            dweight.tensor_split(p)[rank],
        )
    return Expected(loss.detach(), gradients if scheme.needs_gradient else (), stats.kept)


def check(scheme: Scheme, expected: Expected, loss: Tensor, gradients: tuple[Tensor, ...]) -> None:
    for got, wanted in zip((loss, *gradients), (expected.loss, *expected.gradients), strict=True):
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not error <= TOLERATED[gradients[0].dtype if gradients else torch.float32]:
            raise ValueError(f"{scheme.provider}, {scheme.what}: off by {error:.1e} of the largest entry")
