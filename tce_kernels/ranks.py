"""What ranks do together around a loss: they compare their arguments before the work, and add up scalars after it."""

import json
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .autograd import forward_method, operator
from .context import has_data
from .shards import all_gather, resolved, torch_distributed

# What a rank says of its arguments; the checksums of tensors come last.
FACTS = ("status", "rows", "classes", "features", "options")
CHECKED = ("target", "token_weight", "weight", "threshold", "denominator")


def checksum(tensor: Tensor) -> Tensor:
    """Of values and their order, [] int64: an odd multiple of each entry's bits, added up with wrap-around."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_floating_point():
        flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    return (flat.long() * (2 * torch.arange(len(flat), device=flat.device) + 1)).sum()


def _table(facts: list[int], checked: list[Tensor | None], group, device: torch.device) -> list[list[int]]:
    """Everybody's facts; the host waits for them."""
    mine = torch.tensor([*facts, *[0] * len(checked)], dtype=torch.int64, device=device)
    for i, tensor in enumerate(checked, len(facts)):
        if tensor is not None:
            mine[i] = checksum(tensor)
    return all_gather(mine, group).tolist()


def _refuse_refused(table: list[list[int]]) -> None:
    refused = [rank for rank, (status, *_) in enumerate(table) if status]
    if refused:
        raise RuntimeError(
            f"the call was refused on rank {', '.join(map(str, refused))} of the group, where the error says why; the "
            "arguments of this rank are fine"
        )


def _refuse_differences(table: list[list[int]], rows_spread: bool, text: str, group) -> None:
    dist = torch_distributed()
    columns = dict(zip(FACTS + CHECKED, zip(*table, strict=True), strict=True))
    if len(set(columns.pop("options"))) > 1:
        texts = [None] * len(table)
        dist.all_gather_object(texts, text, group=group)
        texts = [json.loads(text) for text in texts]
        for name in sorted(set().union(*texts)):
            values = [options.get(name) for options in texts]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same on all ranks of the group, got {values}, rank by rank")
    for name in ("status", "classes", *(("rows", "target", "token_weight") if rows_spread else ())):
        del columns[name]
    for name, values in columns.items():
        if len(set(values)) > 1:
            what = f"{name} must hold the same values" if name in CHECKED else f"the number of {name} must be the same"
            checksums = "checksums " if name in CHECKED else ""
            hint = ": ranks with rows of their own need rows='sharded'" if name in ("rows", "target") else ""
            raise ValueError(f"{what} on all ranks of the group, got {checksums}{list(values)}, rank by rank{hint}")


@operator(
    "agree",
    "Tensor input, Tensor? linear_weight, Tensor target, Tensor? token_weight, Tensor? weight, Tensor? threshold, "
    "Tensor? denominator, str text, bool rows_spread, bool on_host, str group",
    "Tensor sizes",
    communicates=True,
)
def agree(input, linear_weight, target, token_weight, weight, threshold, denominator, *plain):
    """`sizes` [2, p] of `Shards`, once all ranks have found that their arguments go together; otherwise every rank
    raises the same error.

    The input is the logits (..., V_r) if there is no linear_weight (V_r, D). The other tensors must hold the same
    values on all ranks, but for those per row where `rows_spread`. text: options that must be the same, as a JSON
    object, empty where they are not looked at. on_host: the host waits to learn the sizes and to compare; otherwise
    they stay on the device, unseen.
    """
    text, rows_spread, on_host, group_name = plain
    group = resolved(group_name)
    n_classes = input.shape[-1] if linear_weight is None else len(linear_weight)
    if not on_host:
        sizes = torch.full((2,), target.numel(), dtype=torch.int64, device=input.device)  # no copy from the host
        sizes[0].fill_(n_classes)
        return all_gather(sizes, group).t().contiguous()
    n_features = 0 if linear_weight is None else linear_weight.shape[1]
    facts = [0, target.numel(), n_classes, n_features, zlib.crc32(text.encode())]
    per_row = [None, None] if rows_spread else [target.long(), token_weight]
    table = _table(facts, [*per_row, weight, threshold, denominator], group, device_for(group, [input]))
    _refuse_refused(table)
    _refuse_differences(table, rows_spread, text, group)
    sizes = torch.tensor([[row[FACTS.index(name)] for row in table] for name in ("classes", "rows")], device="cpu")
    total = int(sizes[0].sum())
    if total == 0:
        raise ValueError("there must be at least one class on all ranks of the group together, got none")
    if weight is not None and len(weight) != total:
        raise ValueError(f"weight must have one entry per class of all ranks, [{total}], got {list(weight.shape)}")
    return sizes


@agree.register_fake
def _(input, *arguments):
    *_, on_host, group_name = arguments
    shape = 2, torch_distributed().get_world_size(resolved(group_name))
    return input.new_empty(shape, dtype=torch.int64, device="cpu" if on_host else input.device)


@operator("sum_over_ranks", "Tensor x, Tensor? sizes, str group", "Tensor sum, Tensor after", communicates=True)
def _sum_over_ranks(x, sizes, group_name):
    return all_gather(x, resolved(group_name)).sum(0), _copy_of(sizes, x)


@_sum_over_ranks.register_fake
def _(x, sizes, _):
    return torch.empty_like(x), _copy_of(sizes, x)


def _copy_of(sizes: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.int64) if sizes is None else sizes.clone()


class _SumOverRanks(Function):
    generate_vmap_rule = True

    @forward_method
    def forward(x, sizes, group_name):
        return _sum_over_ranks(x, sizes, group_name)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, upstream, _):
        return upstream, None, None


def sum_over_ranks(x: Tensor, sizes: Tensor | None, group_names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Sum of x [] over the ranks, added up in their order everywhere; to each rank its own part's gradient comes back.

    `sizes` is what the ranks agreed on, before which nothing travels. It comes back for what travels next, so that a
    compiler keeps the order, and keeps a sum that one rank has no use for.
    """
    for group_name in group_names:
        x, after = _SumOverRanks.apply(x, sizes, group_name)
        sizes = None if sizes is None else after
    return x, sizes


def device_for(group, tensors: list) -> torch.device:
    """A device that the group has a backend for: that of the tensors, if it can be; not the CPU if one is elsewhere."""
    devices = [tensor.device for tensor in tensors if isinstance(tensor, Tensor)]
    for device in [*sorted(devices, key=lambda device: device.type == "cpu"), torch.device("cpu")]:
        if device.type in {device.type for device in group._device_types}:
            return device
    return torch.device("cuda", torch.cuda.current_device())


def are_compared(tensors: list, always: bool) -> bool:
    """Whether ranks compare their arguments: not where only that would make the host wait, unless asked to debug."""
    if always or not any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tensors):
        return True
    dist = torch_distributed()
    return not torch.compiler.is_compiling() and dist.get_debug_level() != dist.DebugLevel.OFF


def all_or_none(group, tensors: list, always: bool, check: Callable, *arguments):
    """check(*arguments); if that raises, the other ranks of the group are told, who then raise as well."""
    if group is None or torch.compiler.is_compiling():
        return check(*arguments)
    try:
        return check(*arguments)
    except Exception:
        is_group = isinstance(group, torch_distributed().ProcessGroup)
        have_data = all(has_data(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        if is_group and have_data and are_compared(tensors, always):
            facts = [1] + [0] * (len(FACTS) - 1)
            _table(facts, [None] * len(CHECKED), group, device_for(group, tensors))
        raise
