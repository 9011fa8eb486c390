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
CHECKED_ROWS = 256


class Exact(NamedTuple):
    loss: float
    gradients: tuple[Tensor, Tensor]


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


def exact(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[float, Exact], Tensor]:
    """What the reference says in float64, with truncation and without (threshold 1); which rows (N,) are truncated."""
    input, linear_weight, target = (x.detach() for x in inputs)
    linear_weight, N = linear_weight.double(), len(target)
    loss, dinput, dweight, confidence = summed(input, linear_weight, target, THRESHOLD)
    if ((confidence > 0.5) & (confidence < 0.99)).any():  # rounding could put it on the other side of the threshold
        sys.exit("Some rows are neither confident nor lost: choose a larger hidden size, or a smaller vocabulary.")
    expected = {THRESHOLD: Exact(loss / N, (dinput / N, dweight / N))}
    dropped = confidence > THRESHOLD
    loss_of_dropped, dinput[dropped], dweight_of_dropped, _ = summed(
        input[dropped], linear_weight, target[dropped], 1.0
    )
    expected[1.0] = Exact((loss + loss_of_dropped) / N, (dinput / N, (dweight + dweight_of_dropped) / N))
    return expected, dropped


def summed(input: Tensor, linear_weight: Tensor, target: Tensor, threshold: float) -> tuple[float, Tensor, ...]:
    """The sum of the rows' losses, its gradients with respect to input and weight, and the rows' p_t."""
    loss, dinput, dweight = 0.0, torch.empty_like(input, dtype=torch.double), torch.zeros_like(linear_weight)
    confidence = torch.empty(len(target), dtype=torch.double, device=input.device)
    for start in range(0, len(target), CHECKED_ROWS):
        rows = slice(start, start + CHECKED_ROWS)
        x = input[rows].double()
        logits = F.linear(x, linear_weight).requires_grad_()
        loss_of_rows, stats = tce_kernels.truncated_cross_entropy(
            logits, target[rows], threshold, reduction="sum", return_stats=True, backend="reference"
        )
        dlogits = torch.autograd.grad(loss_of_rows, logits)[0]
        loss += loss_of_rows.item()
        torch.mm(dlogits, linear_weight, out=dinput[rows])
        dweight.addmm_(dlogits.T, x)
        confidence[rows] = stats.log_prob.exp()
    return loss, dinput, dweight, confidence


def check(provider: Provider, observed: Observed, expected: Exact, dropped: Tensor) -> None:
    """Raise Inexact unless loss and gradients agree with the reference."""
    dtype = observed.gradients[0].dtype
    # The norm of a gradient is that of its target terms, which 16-bit logits hardly touch: plain PyTorch is within
    # 2e-3 in bfloat16. The softmax terms are 0.02 of it, the standard deviation of the weight, and p / N underflows in
    # float16 without a gradient scaler, so all of them may be missing. In float32, plain PyTorch is within 1e-6, or
    # 1e-5 where nearly all rows are confident, with p_t - 1 lost in rounding, and much longer than the others.
    allowed = 3e-5 if dtype == torch.float32 else 0.03
    for name, gradient, wanted in zip(("input", "weight"), observed.gradients, expected.gradients, strict=True):
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        if not error <= allowed:
            raise Inexact(f"the gradient of the {name} is {error:.1e} from the reference, in norm")
    # Some sum the loss in the dtype of the input: a rounding per chunk.
    error = abs(observed.loss.item() - expected.loss) / expected.loss
    if not error <= max(1e-5, 4 * torch.finfo(observed.loss.dtype).eps):
        raise Inexact(f"the loss is {error:.1e} from the reference")
    if provider.truncates and observed.gradients[0][dropped].any():
        raise Inexact("the gradient of a truncated row is not zero")
