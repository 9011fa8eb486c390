"""Who computes linear layer, loss and gradients, and what they have to give."""

import functools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tce_kernels

from . import peers
from .logits import plain_truncated
from .measure import OURS, Inexact, Observed, Provider, compiles
from .suite import THRESHOLD

CHUNKS = [256, 512, 1024, 2048]
CHECKED_LOGITS, CHECKED_CLASSES = 2**23, 4096  # what the reference has in float64 at a time: 64 MiB, and of the weight
SIGNS = 64


class Exact(NamedTuple):
    """Of the mean. The gradient of the weight is known by its products with SIGNS random vectors of signs.

    The squared norm of such a product has the squared norm of the matrix as its mean, so that an error counts as much
    as it does in the whole gradient, wherever it is; and the products take a thousandth of the memory.
    """

    loss: float
    dinput: Tensor  # (N, D), float32
    dweight: Tensor  # (SIGNS, D), float64
    signs: Tensor  # (V, SIGNS), int8


class Known(NamedTuple):
    """What the reference says of rows, of the sum of their losses."""

    input: Tensor  # (N, D)
    target: Tensor  # (N,)
    weight: Tensor  # (SIGNS, D): the products of the weight with the signs
    loss: Tensor  # (N,), float64
    confidence: Tensor  # (N,), float64
    dinput: Tensor  # (N, D), float32
    dlogits: Tensor  # (N, SIGNS), float64: their products with the signs


class Matmuls(torch.autograd.Function):
    """Only the matrix products that every implementation needs; what they give is no gradient of anything."""

    @staticmethod
    def forward(ctx, input, linear_weight, chunk, share):
        buffer = input.new_empty(chunk, len(linear_weight))
        dinput, dweight = torch.zeros_like(input), torch.empty_like(linear_weight)
        for start, x in zip(range(0, len(input), chunk), input.split(chunk), strict=True):
            kept = round((1 - share) * len(x))
            torch.mm(x, linear_weight.T, out=buffer[: len(x)])
            torch.mm(buffer[:kept], linear_weight, out=dinput[start : start + kept])
            dweight.addmm_(buffer[:kept].T, x[:kept], beta=int(start > 0))
        ctx.gradients = dinput, dweight
        return input.new_zeros(())

    @staticmethod
    def backward(ctx, grad_loss):
        return *ctx.gradients, None, None


def ours(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return tce_kernels.linear_truncated_cross_entropy(input, linear_weight, target, THRESHOLD)


def plain(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return plain_truncated(F.linear(input, linear_weight), target)


def cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def chunked(input: Tensor, linear_weight: Tensor, target: Tensor, **options) -> Tensor:
    return F.linear_cross_entropy(input, linear_weight, target, options=torch.nn.LinearCrossEntropyOptions(**options))


def providers(
    N: int, dtype: torch.dtype, share: float, device: torch.device, quick: bool = False
) -> list[list[Provider]]:
    """Each entry is one provider in its sizes of chunk, of which the fastest is taken. The last is the floor."""
    peer = functools.partial(Provider, truncates=False)
    found = [[Provider(OURS, ours)], [Provider("F.linear + plain PyTorch", plain)]]
    if compiles(device):
        compiled = torch.compile(plain, dynamic=False)
        found.append([Provider("F.linear + plain PyTorch, torch.compile", compiled, compiles=True)])
    found.append([peer("F.linear + F.cross_entropy", cross_entropy)])
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        sizes = [chunk for chunk in CHUNKS if chunk <= N] or [N]
        found.append(
            [peer("F.linear_cross_entropy", functools.partial(chunked, batch_chunk_size=c), chunk=c) for c in sizes]
        )
        if not quick:  # its chunks are of a few rows, which takes long
            found.append([peer("F.linear_cross_entropy, defaults", chunked)])
    liger, quack, cut = (peers.offer(package, "linear", device)[0] for package in (peers.LIGER, peers.QUACK, peers.CUT))
    if cut and compiles(device):
        compiled = functools.partial(cut, impl="torch_compile")
        found.append([peer(f"{peers.named(peers.CUT)}, torch_compile", compiled, compiles=True)])
    if cut and device.type == "cuda" and dtype != torch.float32:  # its kernels have no float32 gradients
        found.append([peer(f"{peers.named(peers.CUT)}, cce", cut)])
    if liger:
        liger_loss = liger()
        found.append([peer(peers.named(peers.LIGER), lambda input, weight, target: liger_loss(weight, input, target))])
    if quack:
        found.append([peer(peers.named(peers.QUACK), quack)])

    def floor(input, linear_weight, target, chunk):
        return Matmuls.apply(input, linear_weight, chunk, share)

    sizes = sorted({min(1024, N), N})
    found.append([Provider("matmuls alone", functools.partial(floor, chunk=c), chunk=c, is_floor=True) for c in sizes])
    return found


def missing(device: torch.device, quick: bool) -> list[str]:
    """A line for each provider that is not measured, with the reason."""
    lines = peers.missing("linear", device)
    if not compiles(device):
        lines.append("cut-cross-entropy, torch_compile: no C++ compiler found")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        lines.append("F.linear_cross_entropy: needs a newer torch")
    elif quick:
        lines.append("F.linear_cross_entropy, defaults: not with --quick")
    return lines


class Reference:
    """Mean loss and gradients, in float64.

    What is found of a row is kept for the next call. If that has the same weight, only rows that have changed are
    computed: those which are truncated now and were not before.
    """

    def __init__(self):
        self.known: Known | None = None

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[float, Exact], Tensor]:
        """With truncation and without (threshold 1); and which rows (N,) are truncated."""
        input, linear_weight, target = (x.detach() for x in inputs)
        generator = torch.Generator(input.device).manual_seed(0)
        size = len(linear_weight), SIGNS
        signs = torch.randint(2, size, dtype=torch.int8, device=input.device, generator=generator) * 2 - 1
        known, self.known = self.known, None  # if memory does not last, nothing is known
        self.known = known = learned(known, input, linear_weight, target, signs)
        unsure = (known.confidence > 0.5) & (known.confidence < 0.99)
        if unsure.any():  # rounding could put it on the other side of the threshold
            sys.exit("Some rows are neither confident nor lost: choose a larger hidden size, or a smaller vocabulary.")
        dropped = known.confidence > THRESHOLD

        def mean(kept: Tensor) -> Exact:
            scale = kept.double() / len(kept)
            dweight = (known.dlogits * scale[:, None]).T @ input.double()
            return Exact((known.loss * scale).sum().item(), known.dinput * scale[:, None].float(), dweight, signs)

        return {THRESHOLD: mean(~dropped), 1.0: mean(torch.ones_like(dropped))}, dropped


def learned(known: Known | None, input: Tensor, linear_weight: Tensor, target: Tensor, signs: Tensor) -> Known:
    """`known` with those rows made that differ in it."""
    weight = products(linear_weight, signs)
    if known and (known.input.shape, known.input.dtype) == (input.shape, input.dtype) and weight.equal(known.weight):
        changed = (input != known.input).any(1) | (target != known.target)
        known = known._replace(input=input, target=target)
    else:
        N = len(target)
        changed = torch.ones_like(target, dtype=torch.bool)
        empty = functools.partial(torch.empty, dtype=torch.double, device=input.device)
        dinput = torch.empty_like(input, dtype=torch.float32)
        known = Known(input, target, weight, empty(N), empty(N), dinput, empty(N, SIGNS))
    weights = linear_weight.split(CHECKED_CLASSES)
    for rows in changed.nonzero().squeeze(1).split(max(CHECKED_LOGITS // len(linear_weight), 1)):
        x = input[rows].double()
        logits = x.new_empty(len(x), len(linear_weight))
        for some, of_some in zip(weights, logits.split(CHECKED_CLASSES, 1), strict=True):
            torch.mm(x, some.double().T, out=of_some)
        losses, stats = tce_kernels.truncated_cross_entropy(
            logits.requires_grad_(), target[rows], 1.0, reduction="none", return_stats=True, backend="reference"
        )
        dlogits = torch.autograd.grad(losses.sum(), logits)[0]
        dinput = torch.zeros_like(x)
        for some, of_some in zip(weights, dlogits.split(CHECKED_CLASSES, 1), strict=True):
            dinput.addmm_(of_some, some.double())
        known.loss[rows] = losses.detach()
        known.confidence[rows] = stats.log_prob.exp()
        known.dinput[rows] = dinput.float()
        known.dlogits[rows] = products(dlogits.T, signs).T
    return known


exact = Reference()


def products(matrix: Tensor, signs: Tensor) -> Tensor:
    """signs.T @ matrix in float64, for a matrix (V, D) and signs (V, SIGNS)."""
    total = torch.zeros(signs.shape[1], matrix.shape[1], dtype=torch.double, device=matrix.device)
    for some, of_some in zip(matrix.split(CHECKED_CLASSES), signs.split(CHECKED_CLASSES), strict=True):
        total.addmm_(of_some.double().T, some.double())
    return total


def check(provider: Provider, observed: Observed, expected: Exact, dropped: Tensor) -> None:
    """Raise Inexact unless loss and gradients agree with the reference."""
    dtype = observed.gradients[0].dtype
    # The norm of a gradient is that of its target terms, which 16-bit logits hardly touch: plain PyTorch is within
    # 2e-3 in bfloat16. The softmax terms are 0.02 of it, the standard deviation of the weight, and p / N underflows in
    # float16 without a gradient scaler, so all of them may be missing. In float32, plain PyTorch is within 1e-6, or
    # 1e-5 where nearly all rows are confident, with p_t - 1 lost in rounding, and much longer than the others.
    allowed = 3e-5 if dtype == torch.float32 else 0.03
    dinput, dweight = observed.gradients
    for name, gradient, wanted in (
        ("input", dinput, expected.dinput),
        ("weight", products(dweight, expected.signs), expected.dweight),
    ):
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        if not error <= allowed:
            raise Inexact(f"the gradient of the {name} is {error:.1e} from the reference, in norm")
    # Some sum the loss in the dtype of the input: a rounding per chunk.
    error = abs(observed.loss.item() - expected.loss) / expected.loss
    if not error <= max(1e-5, 4 * torch.finfo(observed.loss.dtype).eps):
        raise Inexact(f"the loss is {error:.1e} from the reference")
    if provider.truncates and dinput[dropped].any():
        raise Inexact("the gradient of a truncated row is not zero")
