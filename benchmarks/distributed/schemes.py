"""What others send, as plain collectives: Megatron's scheme and gathered logits. Cross-entropy without truncation."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


class SummedInput(Function):
    """The input of a layer whose classes are spread over ranks: its gradient is summed, in its own dtype."""

    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class GatheredRows(Function):
    """linear(input [n, D] of this rank, weight [V_r, D]) of all ranks' rows.

    Of the input only this rank's rows are kept until backward, where the others are gathered again.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return F.linear(gathered(input), weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        dinput = torch.empty_like(input)
        dist.reduce_scatter_tensor(dinput, gradient @ weight)
        return dinput, gradient.t() @ gathered(input)


class SummedLoss(Function):
    """Losses [N] of logits [N, V_r]: the maximum over ranks, then sum of exponentials and target's logit together."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        of_target, is_here = logits_of(logits.float(), target)
        row_max = logits.float().amax(1)
        dist.all_reduce(row_max, dist.ReduceOp.MAX)
        exponentials = (logits.float() - row_max[:, None]).exp_()
        sums = torch.cat([exponentials.sum(1), torch.where(is_here, of_target - row_max, 0)])
        dist.all_reduce(sums)
        sum_exp, of_target = sums.chunk(2)
        ctx.save_for_backward(exponentials.div_(sum_exp[:, None]), target)
        ctx.dtype = logits.dtype
        return sum_exp.log() - of_target

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        p, target = ctx.saved_tensors
        here = local(target, p.shape[1])
        index, is_here = clamped(here, p.shape[1])
        dlogits = p.scatter_add(1, index[:, None], -is_here.float()[:, None]) * upstream[:, None]
        return dlogits.to(ctx.dtype), None


def local(target: Tensor, width: int) -> Tensor:
    """Targets counted from this rank's first class, where all ranks have as many."""
    return target - dist.get_rank() * width


def clamped(here: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return here.clamp(0, width - 1), (here >= 0) & (here < width)


def logits_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the targets that are here, and which are."""
    index, is_here = clamped(local(target, logits.shape[1]), logits.shape[1])
    return logits.gather(1, index[:, None])[:, 0], is_here


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, one rank's after the other's."""
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def megatron_logits(logits: Tensor, target: Tensor) -> Tensor:
    return SummedLoss.apply(logits, target).mean()


def megatron_replicated(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return megatron_logits(F.linear(SummedInput.apply(input), weight), target)


def megatron_sharded(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Rows of its own on each rank; targets of all rows, which Megatron's ranks have."""
    return megatron_logits(GatheredRows.apply(input, weight), target)


class GatheredLogits(Function):
    """Logits [N, V] of all ranks' [N, V_r]; to each its own gradient comes back."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.width = logits.shape[1]
        return gathered(logits).view(-1, *logits.shape).transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.split(ctx.width, 1)[dist.get_rank()]


def gathered_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(GatheredLogits.apply(logits).float(), target)
