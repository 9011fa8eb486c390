"""Losses of DTensors, whose placements say which rank has what."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import tce_kernels

from .calls import Call, tensors_of

R, S, LAST = Replicate(), Shard(0), Shard(-1)

# By mesh dimension: of the input, the target, and the loss that comes back for a mean and for "none". The weight is
# Shard(0) on the last.
HEADS = {
    "replicated": ([R], [R], [R], [R]),
    "plain target": ([R], None, [R], [R]),
    "rows": ([S], [S], [R], [S]),
    "rows, whole target": ([S], [R], [R], [S]),
    "partial": ([Partial()], [R], [R], [R]),
    "features": ([LAST], [R], [R], [R]),
    "dp x tp": ([S, R], [S, R], [Partial(), R], [S, R]),
    "dp x tp, rows on both": ([S, S], [S, S], [Partial(), R], [S, S]),
    "dp x tp, rows on tp": ([R, S], [R, S], [R, R], [R, S]),
    "dp x tp, replicated": ([R, R], [R, R], [R, R], [R, R]),
}
LOGITS = {
    "classes": ([LAST], [R], [R], [R]),
    "plain target": ([LAST], None, [R], [R]),
    "dp x tp": ([S, LAST], [S, R], [Partial(), R], [S, R]),
    "dp x tp, whole target": ([S, LAST], [R, R], [Partial(), R], [S, R]),
    "dp x tp, rows replicated": ([R, LAST], [R, R], [R, R], [R, R]),
}


def place(here, mesh, tensor, placements):
    if placements is None:
        return tensor.to(here.device)
    whole = [R if placement.is_partial() else placement for placement in placements]
    placed = distribute_tensor(tensor.to(here.device), mesh, whole)
    if whole == placements:
        return placed
    return DTensor.from_local(placed.to_local(), mesh, placements, run_check=False)


def mesh_for(here, placements):
    return here.mesh("tp") if len(placements) == 1 else here.mesh_2d(("dp", "tp"))


def placed(here, call: Call, of_input, of_target, of_loss, outright):
    """Loss, gradients and statistics, whole, on each rank; what is placed as it should not be is an error.

    outright: backward from the DTensor that the loss is, not from its full tensor.
    """
    mesh = mesh_for(here, of_input)
    of_weight = [R] * (mesh.ndim - 1) + [S]
    x, weight, bias, target, of_class, of_token, upstream = tensors_of(call)
    options = dict(call.options)
    if options.get("weight") is True:
        options["weight"] = of_class.to(here.device)
    if options.get("token_weight") is True:
        options["token_weight"] = place(here, mesh, of_token, of_target)
    target = place(here, mesh, target, of_target)

    is_partial = any(placement.is_partial() for placement in of_input)
    if call.is_linear:
        leaf = place(here, mesh, x, [R] * mesh.ndim if is_partial else of_input).requires_grad_()
        if is_partial:
            local = (leaf / here.size).to_local(grad_placements=[Partial()])
            given = DTensor.from_local(local, mesh, of_input, run_check=False)
        else:
            given = leaf
        head = [place(here, mesh, tensor, of_weight).requires_grad_() for tensor in (weight, bias)]
        leaves = {"input": leaf, "weight": head[0], "bias": head[1]}
        loss = tce_kernels.linear_truncated_cross_entropy(given, head[0], target, linear_bias=head[1], **options)
    else:
        logits = torch.nn.functional.linear(x, weight, bias)
        leaves = {"logits": place(here, mesh, logits, of_input).requires_grad_()}
        loss = tce_kernels.truncated_cross_entropy(leaves["logits"], target, **options)

    results = {}
    if options.get("return_stats"):
        loss, stats = loss
        results |= {name: value.cpu() for name, value in stats._asdict().items() if value is not None}
    assert loss.placements == tuple(of_loss), loss.placements
    whole = loss.full_tensor()
    upstream = upstream.to(here.device) if loss.dim() else torch.full_like(whole, 0.7)
    value = 0.7 * loss if outright else whole
    gradients = torch.autograd.grad(value, list(leaves.values()), None if outright else upstream)
    results["loss"] = whole.detach().cpu()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.placements == leaf.placements or is_partial, (name, gradient.placements)
        results[f"gradient of {name}"] = gradient.full_tensor().cpu()
    return results


REFUSED = {
    "a whole weight": ({}, {"linear_weight": [R], "linear_bias": [R]}, "linear_weight must be Shard(0)"),
    "split features": ({}, {"linear_weight": [Shard(1)], "linear_bias": [R]}, "linear_weight must be Shard(0)"),
    "split class weights": ({"weight": [S]}, {}, "weight must be Replicate"),
    "a plain bias": ({}, {"linear_bias": None}, "linear_bias must be a DTensor"),
    "a plain weight": ({}, {"linear_weight": None, "linear_bias": None}, "linear_weight must be a DTensor"),
}
REFUSED_2D = {
    "classes split twice": ({}, {"linear_weight": [S, S], "linear_bias": [S, S]}, "linear_weight must be Shard(0)"),
    "rows to be summed": ({}, {"input": [Partial(), R]}, "input must be Shard of a dimension of rows or Replicate"),
    "features on another": ({}, {"input": [Shard(1), R]}, "input must be Shard of a dimension of rows or Replicate"),
}
REFUSED_LOGITS = {
    "rows": [S],
    "replicated": [R],
    "partial": [Partial()],
    "two dimensions": [LAST, LAST],
    "rows and partial": [Partial(), LAST],
}


def refused_head(here, name):
    options, changed, _ = (REFUSED | REFUSED_2D)[name]
    dimensions = 2 if name in REFUSED_2D else 1
    whole, split = [R] * dimensions, [R] * (dimensions - 1) + [S]
    placements = {"input": whole, "linear_weight": split, "linear_bias": split, "target": whole} | changed
    mesh = mesh_for(here, whole)
    x, weight, bias, target, of_class, *_ = tensors_of(Call("replicated", (12, 12)))
    tensors = {"input": x, "linear_weight": weight, "linear_bias": bias, "target": target}
    tensors = {key: place(here, mesh, tensor, placements[key]) for key, tensor in tensors.items()}
    options = {key: place(here, mesh, of_class, value) for key, value in options.items()}
    return _error(tce_kernels.linear_truncated_cross_entropy, **tensors, **options)


def refused_logits(here, name):
    placements = REFUSED_LOGITS[name]
    mesh = mesh_for(here, placements)
    x, weight, bias, target, *_ = tensors_of(Call("logits", (12, 12)))
    logits = torch.nn.functional.linear(x, weight, bias)
    return _error(tce_kernels.truncated_cross_entropy, place(here, mesh, logits, placements), target.to(here.device))


def _error(function, *arguments, **keywords):
    try:
        return "no error", str(function(*arguments, **keywords))
    except Exception as error:
        return type(error), str(error)
