"""What training over ranks needs besides the losses."""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks
from .functional import row_weight
from .options import LogitsOptions, Truncated
from .ranks import are_compared, device_for
from .shards import all_gather, torch_distributed


def global_denominator(
    targets: Tensor | Iterable[Tensor],
    *,
    group: "torch.distributed.ProcessGroup | None" = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    token_weights: Tensor | Iterable[Tensor] | None = None,
    averaged: bool = True,
) -> Tensor:
    """What each loss of a step must be divided by, so that the step's gradient is that of one mean over all its tokens.

    A mean of every micro-batch or rank of its own gives tokens in short ones more weight. Pass the result as
    `denominator` to each loss of the step, and scale nothing else:

        denominator = global_denominator([batch.target for batch in step], group=data_parallel_group)
        for batch in step:
            truncated_cross_entropy(model(batch.tokens), batch.target, denominator=denominator).backward()

    Args:
        targets: the targets of this rank's micro-batches of the step, any shape, int32 or int64; one or an iterable.
            None at all, or none that is valid, is legal.
        group: the ranks that have other tokens of the step: the data-parallel ones, times the context-parallel ones;
            not those among which only classes are spread. None: the default group, or this process alone where
            torch.distributed is not initialised.
        ignore_index, weight: as in the loss.
        token_weights: the token_weight of each micro-batch, in the shape of its target; None for ones.
        averaged: gradients are averaged over the group, as DDP and FSDP2 do by default; False where they are summed.

    Returns:
        float32, 0-d, on the device of the targets: the sum of the weights of all tokens that are not ignored; if
        `averaged`, over the number of ranks. The same bits on all ranks.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape; the other ranks of the group then raise
        a RuntimeError (with tensors on a GPU only if TORCH_DISTRIBUTED_DEBUG is set: the host would have to wait).

    FSDP2's MixedPrecisionPolicy converts what goes into a forward, to 16 bits that count no tokens: pass the
    denominator to a wrapped module as a number, or set cast_forward_inputs=False.

    There is none for "kept": how many tokens are kept is known only after the losses.
    """
    if group is not None:
        checks.check_group(group)
    elif torch_distributed().is_available() and torch_distributed().is_initialized():
        group = torch_distributed().group.WORLD
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    refusal = None
    try:
        total = _local_total(targets, ignore_index, weight, token_weights)
    except (TypeError, ValueError) as error:
        if group is None:
            raise
        refusal, total = error, torch.zeros((), dtype=torch.float64)
    if group is None:
        return total.float()
    device = total.device
    facts = torch.stack([total, torch.tensor(float(refusal is not None), dtype=total.dtype, device=device)])
    compared = are_compared(targets, always=False)
    if refusal is not None and not compared:
        raise refusal
    facts = all_gather(facts.to(device_for(group, targets)), group)
    if refusal is not None:
        raise refusal
    if compared and facts[:, 1].any():
        refused = ", ".join(map(str, facts[:, 1].nonzero().squeeze(1).tolist()))
        raise RuntimeError(f"the targets were refused on rank {refused} of the group, where the error says why")
    total = facts[:, 0].sum()
    return (total / len(facts) if averaged else total).float().to(device)


def _local_total(targets, ignore_index, weight, token_weights) -> Tensor:
    """Sum of the weights of this rank's tokens, float64 []."""
    if token_weights is None:
        token_weights = [None] * len(targets)
    elif isinstance(token_weights, Tensor):
        token_weights = [token_weights]
    token_weights = list(token_weights)
    if len(token_weights) != len(targets):
        raise ValueError(f"token_weights must be as many as the targets, {len(targets)}, got {len(token_weights)}")
    total = None
    for target, token_weight in zip(targets, token_weights, strict=True):
        options = LogitsOptions(rule=Truncated(), ignore_index=ignore_index, weight=weight, token_weight=token_weight)
        checks.check_tensor("target", target)
        checks.check_rows(target, options, "targets", target[..., None], None)
        of_batch = row_weight(target.long(), options, torch.float64).sum()
        total = of_batch if total is None else total + of_batch
    return torch.zeros((), dtype=torch.float64) if total is None else total
