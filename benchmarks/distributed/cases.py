"""A head over ranks: what they are given, who computes its loss, and whether it is that of one process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import tce_kernels

from ..timing.linear import Case, make_inputs
from ..timing.measure import Inexact
from ..timing.suite import THRESHOLD
from . import schemes

OURS, MEGATRON, GATHERED = "tce_kernels", "Megatron's scheme", "gathered logits"
LOGITS, REPLICATED, SHARDED = "given logits", 'linear, rows="replicated"', 'linear, rows="sharded"'
NO_GRADIENT = 'linear, rows="replicated", no gradient'


class Shape(NamedTuple):
    N: int
    D: int
    V: int


class Inputs(NamedTuple):
    """Of all ranks: input [N, D], weight [V, D], target [N]."""

    input: Tensor
    weight: Tensor
    target: Tensor


class Result(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # of this rank's tensors


class Scheme(NamedTuple):
    provider: str
    what: str
    loss: Callable[..., Tensor]  # of this rank's tensors, the last of which is the target
    needs_gradient: bool = True
    context: Callable[[], AbstractContextManager] = nullcontext  # in which both passes are

    @property
    def truncates(self) -> bool:
        return self.provider.startswith(OURS)


def linear(input: Tensor, weight: Tensor, target: Tensor, rows: str) -> Tensor:
    return tce_kernels.linear_truncated_cross_entropy(
        input, weight, target, THRESHOLD, group=dist.group.WORLD, rows=rows
    )


OURS_OVER_RANKS = [
    Scheme(OURS, LOGITS, lambda *tensors: tce_kernels.truncated_cross_entropy(*tensors, group=dist.group.WORLD)),
    Scheme(OURS, REPLICATED, lambda *tensors: linear(*tensors, rows="replicated")),
    Scheme(OURS, SHARDED, lambda *tensors: linear(*tensors, rows="sharded")),
]
MEGATRONS = [
    Scheme(MEGATRON, LOGITS, schemes.megatron_logits),
    Scheme(MEGATRON, REPLICATED, schemes.megatron_replicated),
    Scheme(MEGATRON, SHARDED, schemes.megatron_sharded),
]
SCHEMES = [
    *OURS_OVER_RANKS,
    Scheme(OURS, NO_GRADIENT, lambda *tensors: linear(*tensors, rows="replicated"), needs_gradient=False),
    *MEGATRONS,
    Scheme(GATHERED, LOGITS, schemes.gathered_logits),
]


def inputs_for(shape: Shape, dtype: torch.dtype, kept: float, device: torch.device) -> Inputs:
    """The same on all ranks; all but round((1 - kept) N) rows are kept."""
    return Inputs(*make_inputs(Case(*shape, dtype, 1 - kept, 1), device))


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


def run(scheme: Scheme, tensors: tuple[Tensor, ...]) -> Result:
    with scheme.context():
        loss = scheme.loss(*tensors)
        return Result(loss.detach(), torch.autograd.grad(loss, tensors[:-1]) if scheme.needs_gradient else ())


class Reference:
    """One process, in float64 and in the dtype of the inputs, which says how far rounding leads."""

    def __init__(self, inputs: Inputs):
        input, weight, target = inputs
        self.inputs = inputs
        self.exact = Inputs(*(x.detach().double().requires_grad_() for x in (input, weight)), target)
        self.known = {}  # results and errors, by what they are of

    def check(self, scheme: Scheme, got: Result) -> None:
        """Raise Inexact if loss or gradients are further from float64 than twice what one process is."""
        of = scheme.what, scheme.truncates
        if of not in self.known:
            exact = alone(self.exact, scheme)
            self.known[of] = exact, errors(alone(self.inputs, scheme), exact)
        exact, of_one = self.known[of]
        for found, error, rounding in zip((got.loss, *got.gradients), errors(got, exact), of_one, strict=True):
            if not error <= 2 * max(rounding, torch.finfo(found.dtype).eps):
                name = f"{scheme.provider}, {scheme.what}"
                raise Inexact(f"{name}: off by {error:.1e} of the largest entry, one process by {rounding:.1e}")


def alone(inputs: Inputs, scheme: Scheme) -> Result:
    """What one process finds, and this rank's part of its gradients."""
    input, weight, target = inputs
    rank, p = dist.get_rank(), dist.get_world_size()
    options = dict(
        threshold=THRESHOLD if scheme.truncates else 1.0, backend="torch" if input.dtype == torch.double else "auto"
    )
    if scheme.what == LOGITS:
        logits = (input @ weight.t()).detach().requires_grad_()
        loss = tce_kernels.truncated_cross_entropy(logits, target, **options)
        gradients = (torch.autograd.grad(loss, logits)[0].tensor_split(p, 1)[rank],)
    else:
        loss = tce_kernels.linear_truncated_cross_entropy(input, weight, target, **options)
        dinput, dweight = torch.autograd.grad(loss, (input, weight))
        dinput = dinput.tensor_split(p)[rank] if scheme.what == SHARDED else dinput
        gradients = dinput, dweight.tensor_split(p)[rank]
    return Result(loss.detach(), gradients if scheme.needs_gradient else ())


def errors(got: Result, exact: Result) -> list[float]:
    """The largest of loss and of each gradient, over the largest entry."""
    pairs = zip((got.loss, *got.gradients), (exact.loss, *exact.gradients), strict=True)
    return [((found - wanted).abs().max() / wanted.abs().max()).item() for found, wanted in pairs]
