"""DTensors in, local tensors and a group out: placements say which ranks have which classes, and which rows.

One mesh dimension, called `tp` here, splits the classes. Rows may be spread over the others, and over that one as well
if the logits are made here. Logits and weights are never gathered.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fsdp import warn_of_averages
from .options import LossOptions


class Call(NamedTuple):
    """What to call a loss with, and what to make of what it returns.

    tensors: local ones, in the order of the arguments.
    row_groups: names of the groups over which rows are spread besides options.group: a mean divides by the sum of
        their denominators.
    is_summed: whether a scalar loss is summed over them too, to be the same on all ranks; if not it is a part of the
        sum, which `result` says.
    result: turns the loss, or (loss, stats), into what the caller gets.
    """

    tensors: tuple[Tensor | None, ...]
    options: LossOptions
    row_groups: list[str]
    is_summed: bool
    result: Callable[[Any], Any]


def any_of(*values) -> bool:
    """Whether one of them is a DTensor; imports nothing."""
    return any(hasattr(type(value), "full_tensor") for value in values)  # of a DTensor itself the compiler denies it


def of_logits(logits, target, options: LossOptions) -> Call:
    """DTensor logits: Shard(-1) on one mesh dimension; on the others Shard of a dimension of rows, or Replicate.

    The loss is Replicate on the first. On the others it is, where rows are spread, Partial("sum") as a scalar and
    sharded as they are per row, otherwise Replicate. The gradient has the placements of the logits.
    """
    mesh, placements, last = logits.device_mesh, logits.placements, logits.dim() - 1
    by_class = [i for i, placement in enumerate(placements) if _split(placement) == last]
    if len(by_class) != 1 or not _is_whole_shard(placements[by_class[0]]) or any(p.is_partial() for p in placements):
        raise TypeError(
            "logits must be Shard(-1) on one mesh dimension, and Shard of a dimension of rows or Replicate on the "
            f"others, got a DTensor with placements {placements}; redistribute it, or, where each rank has all classes "
            "of its rows, pass to_local() of logits and target for the loss of these rows"
        )
    tp = by_class[0]
    rows = [_kinds().Replicate() if i == tp else placement for i, placement in enumerate(placements)]
    target, options = _local_arguments(target, options, mesh, rows, logits.shape[:-1])
    # Whoever else holds the logits would not notice that their memory is written to.
    options = replace(options, group=_group(options, mesh, tp), inplace=False)
    spread = [i for i, placement in enumerate(rows) if not placement.is_replicate()]
    result = _as_dtensor(mesh, rows, spread, logits.shape[:-1], options)
    local = logits.to_local(grad_placements=placements)
    return Call((local, target), options, _group_names(mesh, spread), False, result)


def of_head(input, linear_weight, linear_bias, target, options: LossOptions) -> Call:
    """A DTensor weight (and bias): Shard(0) on one mesh dimension, Replicate on the others.

    input, a DTensor: its rows are Replicate or Shard on that dimension, whatever `rows` says; Partial and Shard(-1)
    are redistributed to Replicate. On the others Shard of rows or Replicate. The loss is placed as in `of_logits`.
    input, plain: `rows` says what its rows are on that dimension; on the others they are each rank's own. The loss is
    plain, a scalar the same on all ranks of the mesh.

    Gradients have the placements of their tensors.
    """
    mesh, tp = _place_of_classes(linear_weight, linear_bias)
    if any_of(input):
        input, rows = _place_of_rows(input, mesh, tp)
        if not rows[tp].is_replicate():
            options = replace(options, rows="sharded")
        elif options.rows == "sharded":
            raise ValueError(
                "rows must be left at 'replicated' with an input whose rows are not split over the ranks of "
                f"linear_weight, got 'sharded' with placements {input.placements}"
            )
        target, options = _local_arguments(target, options, mesh, rows, input.shape[:-1])
        spread = [i for i, placement in enumerate(rows) if i != tp and not placement.is_replicate()]
        result = _as_dtensor(mesh, rows, spread, input.shape[:-1], options)
        local, is_summed = input.to_local(grad_placements=rows), False
    else:
        spread = [i for i in range(mesh.ndim) if i != tp]
        result, local, is_summed = _as_it_is, input, True
    makes_gradients = torch.is_grad_enabled() and isinstance(local, Tensor) and local.requires_grad
    if makes_gradients and not torch.compiler.is_compiling():
        warn_of_averages(linear_weight, linear_bias)
    options = replace(options, group=_group(options, mesh, tp))
    head = [_local_parameter(parameter, spread) for parameter in (linear_weight, linear_bias)]
    return Call((local, *head, target), options, _group_names(mesh, spread), is_summed, result)


def _as_it_is(result):
    return result


def _kinds():
    """Where the kinds of placements are: slow to import, but whoever has a DTensor has imported it."""
    import torch.distributed.tensor

    return torch.distributed.tensor


def _split(placement) -> int | None:
    """The dimension that a placement splits."""
    return getattr(placement, "dim", None)


def _is_whole_shard(placement) -> bool:
    """Whether each rank's part is one piece; not so where FSDP2 splits further what tensor parallelism has split."""
    return type(placement) is _kinds().Shard


def _place_of_classes(linear_weight, linear_bias) -> tuple:
    """The mesh, and its dimension that splits the classes."""
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and not any_of(tensor):
            raise TypeError(
                f"{name} must be a DTensor where input, linear_weight or linear_bias is, got a plain tensor"
            )
    mesh, placements = linear_weight.device_mesh, linear_weight.placements
    by_class = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(by_class) != 1 or not _is_whole_shard(placements[by_class[0]]) or _split(placements[by_class[0]]) != 0:
        raise TypeError(
            "linear_weight must be Shard(0) on one mesh dimension and Replicate on the others, got a DTensor with "
            f"placements {placements}; redistribute it, or, under FSDP2, make the head a TruncatedCrossEntropyHead, "
            "which FSDP2 gathers before its forward. full_tensor() alone is wrong where ranks have rows of their own: "
            "it drops the other ranks' part of the gradient"
        )
    if linear_bias is not None and (linear_bias.device_mesh != mesh or linear_bias.placements != placements):
        raise TypeError(
            f"linear_bias must be placed as linear_weight is, {placements} on {mesh}, got a DTensor with placements "
            f"{linear_bias.placements} on {linear_bias.device_mesh}"
        )
    return mesh, by_class[0]


def _place_of_rows(input, mesh, tp: int) -> tuple:
    """The input, whole rows of it, and their placements."""
    _check_mesh("input", input, mesh)
    last, rows = input.dim() - 1, list(input.placements)
    if rows[tp].is_partial() or _split(rows[tp]) == last:
        rows[tp] = _kinds().Replicate()
    if any(placement.is_partial() or _split(placement) == last for placement in rows):
        raise TypeError(
            "input must be Shard of a dimension of rows or Replicate on the mesh dimensions that do not split "
            f"linear_weight, got a DTensor with placements {input.placements}; redistribute it"
        )
    return input.redistribute(placements=rows), rows


def _check_mesh(name: str, tensor, mesh) -> None:
    if tensor.device_mesh != mesh:
        raise TypeError(
            f"{name} must be on the mesh of the logits or the linear_weight, {mesh}, got a DTensor with placements "
            f"{tensor.placements} on {tensor.device_mesh}"
        )


def _local_arguments(target, options: LossOptions, mesh, rows: list, shape) -> tuple:
    """Local tensors of what there is per row, placed as `rows` are, and of what is the same for all rows."""

    def per_row(name, value):
        if not any_of(value):
            return value
        _check_mesh(name, value, mesh)
        if value.shape != shape:
            raise ValueError(f"{name} must have one entry per row, {list(shape)}, got shape {list(value.shape)}")
        return value.redistribute(placements=rows).to_local()

    def per_call(name, value):
        if not any_of(value):
            return value
        if name != "weight" and any(placement.is_partial() for placement in value.placements):
            value = value.redistribute(
                placements=[_kinds().Replicate() if p.is_partial() else p for p in value.placements]
            )
        if not all(placement.is_replicate() for placement in value.placements):
            raise TypeError(f"{name} must be Replicate, got a DTensor with placements {value.placements}")
        return value.to_local()

    threshold = per_call("threshold", getattr(options.rule, "threshold", None))
    return per_row("target", target), replace(
        options,
        rule=options.rule if threshold is None else replace(options.rule, threshold=threshold),
        weight=per_call("weight", options.weight),
        token_weight=per_row("token_weight", options.token_weight),
        denominator=per_call("denominator", options.denominator),
    )


def _local_parameter(parameter, spread: list[int]) -> Tensor | None:
    """Its local tensor. The gradient is that of this rank's rows, and becomes that of all before it is handed on."""
    if parameter is None:
        return None
    placements = parameter.placements
    of_gradient = [_kinds().Partial() if i in spread else placement for i, placement in enumerate(placements)]
    # To where it is already: nothing moves but, in backward, the gradient.
    return parameter.redistribute(placements=placements).to_local(grad_placements=of_gradient)


def _as_dtensor(mesh, rows: list, spread: list[int], shape, options: LossOptions) -> Callable:
    """Of a loss per row, placed as `rows` are; or of a scalar, a part of a sum on the mesh dimensions `spread`."""

    def result(value):
        kinds = _kinds()
        loss, *stats = value if isinstance(value, tuple) else (value,)
        if options.reduction == "none":
            how = {"placements": rows, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        else:
            how = {"placements": [kinds.Partial() if i in spread else kinds.Replicate() for i in range(mesh.ndim)]}
        loss = kinds.DTensor.from_local(loss, mesh, run_check=False, **how)
        return (loss, *stats) if stats else loss

    return result


def _group(options: LossOptions, mesh, tp: int):
    """The group that splits the classes; one that was passed must be of the same ranks."""
    from torch.distributed import get_process_group_ranks

    group = mesh.get_group(tp)
    if options.group is not None:
        ranks, given = get_process_group_ranks(group), get_process_group_ranks(options.group)
        if ranks != given:
            raise ValueError(f"group must be None with DTensors, or that of their mesh, ranks {ranks}, got {given}")
    return group


def _group_names(mesh, dimensions: list[int]) -> list[str]:
    return [mesh.get_group(i).group_name for i in dimensions if mesh.size(i) > 1]
