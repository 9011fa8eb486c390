"""Calls of the public losses, in one process and with their classes on several ranks.

A `Call` says what is computed and how it lies on the ranks. `in_one_process` computes it without a group, `on_a_rank`
is the case that computes this rank's share of it; `assert_same` compares what all ranks have with the whole.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

import tce_kernels

D, V = 24, 211
LOGITS, REPLICATED, SHARDED = "logits", "replicated", "sharded"  # the last two are `rows` of the linear losses


@dataclass(frozen=True)
class Call:
    way: str
    sizes: tuple[int, ...]  # classes of each rank
    options: dict[str, Any] = field(default_factory=dict)  # `True` for a tensor option draws the tensor
    counts: tuple[int, ...] = ()  # SHARDED: rows of each rank
    trailing: tuple[int, ...] = ()  # dimensions of the target after that of the rows
    n_rows: int = 37
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.int64
    has_bias: bool = True
    needs: tuple[bool, bool, bool] = (True, True, True)  # which of input, weight, bias require a gradient
    is_strided: bool = False  # a column of rows too many, as in logits[:, :-1]
    ignored: tuple[int, ...] = (3, 17, 36)
    autocast: torch.dtype | None = None
    poison: tuple[slice, slice, float] = (slice(0), slice(0), 0.0)  # rows, columns of the logits or input; value
    seed: int = 0

    @property
    def is_linear(self):
        return self.way != LOGITS

    @property
    def n_classes(self):
        return sum(self.sizes)

    def classes(self, rank):
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def rows(self, rank):
        if self.way != SHARDED:
            return slice(None)
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


def layouts(p):
    """Ways to lay out V classes and 37 rows on p ranks: even, uneven, empty shards. One rank has no rows."""
    even = tuple(len(part) for part in torch.arange(V).tensor_split(p))
    some = (9, 28), (20, 0, 17), (31, 0, 4, 2)
    counts = (37,) if p == 1 else some[p - 2]
    yield even, counts
    if p > 1:
        uneven = (V - 7 * (p - 1), *[7] * (p - 1))
        yield uneven, counts[::-1]
        yield (0, *[len(part) for part in torch.arange(V).tensor_split(p - 1)]), counts


def tensors_of(call: Call):
    """Input, weight, bias, target, class weights and token weights of the whole: the same in every process."""
    generator = torch.Generator().manual_seed(call.seed)
    shape = call.n_rows, *call.trailing
    x = torch.randn(*shape, D, generator=generator)
    weight = 0.8 * torch.randn(call.n_classes, D, generator=generator)
    bias = torch.randn(call.n_classes, generator=generator)
    target = torch.randint(call.n_classes, shape, generator=generator)
    likely = (x @ weight.t() + bias).argmax(-1)
    target = torch.where(torch.rand(shape, generator=generator) < 0.5, likely, target)
    ignore_index = call.options.get("ignore_index", -100)
    target[[row for row in call.ignored if row < call.n_rows]] = ignore_index
    of_class = torch.rand(call.n_classes, generator=generator) + 0.1
    of_token = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
    upstream = (torch.randn(shape, generator=generator)) * (torch.rand(shape, generator=generator) > 0.3)
    x, weight, bias = (tensor.to(call.dtype) for tensor in (x, weight, bias))
    return x, weight, bias, target.to(call.target_dtype), of_class, of_token, upstream


def in_one_process(call: Call, device: torch.device):
    """Name -> tensor: loss, gradients, statistics."""
    return _evaluate(call, device, slice(None), slice(None))


def on_a_rank(here, call: Call):
    """The same of this rank's share."""
    how = {"group": here.group} | ({"rows": call.way} if call.is_linear else {})
    return _evaluate(call, here.device, call.rows(here.rank), call.classes(here.rank), **how)


def on_a_rank_again(here, call: Call):
    """Two calls of it, which give the same bits."""
    first, second = on_a_rank(here, call), on_a_rank(here, call)
    for name in first:
        assert bits(first[name]) == bits(second[name]), f"{name} differs from call to call"
    return first


def _evaluate(call, device, own, classes, **how):
    options = dict(call.options)
    x, weight, bias, target, of_class, of_token, upstream = tensors_of(call)
    target, of_token, upstream = (tensor[own].to(device) for tensor in (target, of_token, upstream))
    if options.get("weight") is True:
        options["weight"] = of_class.to(device)
    if options.get("token_weight") is True:
        options["token_weight"] = of_token
    if call.dtype == torch.float64 and device.type != "cpu":
        options["backend"] = "torch"
    kind = "focal" if "gamma" in options else "truncated"
    function = getattr(tce_kernels, f"{'linear_' if call.is_linear else ''}{kind}_cross_entropy")

    rows, columns, value = call.poison
    if call.is_linear:
        x[rows, columns] = value
        tensors = {"input": x[own], "weight": weight[classes], "bias": bias[classes] if call.has_bias else None}
    else:
        logits = torch.nn.functional.linear(x, weight, bias)
        logits[rows, columns] = value
        logits = logits[..., classes]
        if call.is_strided:
            logits = torch.nn.functional.pad(logits, (0, 0, 0, 1), value=float("nan"))
        tensors = {"logits": logits}
    needs = dict(zip(tensors, call.needs, strict=False))
    tensors = {
        name: None if tensor is None else tensor.to(device).contiguous().requires_grad_(needs[name])
        for name, tensor in tensors.items()
    }
    with torch.autocast(device.type, call.autocast) if call.autocast else contextlib.nullcontext():
        if call.is_linear:
            value = function(tensors["input"], tensors["weight"], target, linear_bias=tensors["bias"], **options, **how)
        else:
            logits = tensors["logits"][..., :-1, :] if call.is_strided else tensors["logits"]
            value = function(logits * 1 if options.get("inplace") else logits, target, **options, **how)

    results = {}
    if options.get("return_stats"):
        value, stats = value
        results |= {name: value for name, value in stats._asdict().items() if value is not None}
    results["loss"] = value.detach()
    wanted = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    if not wanted:
        assert not value.requires_grad
    else:
        upstream = upstream.to(value) if options.get("reduction") == "none" else torch.full_like(value, 0.7)
        again = options.get("allow_retain_graph", False)
        gradients = torch.autograd.grad(value, list(wanted.values()), upstream, retain_graph=again)
        if again:
            for one, other in zip(gradients, torch.autograd.grad(value, list(wanted.values()), upstream), strict=True):
                assert bits(one) == bits(other), "a second backward differs from the first"
        for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
            assert gradient.dtype == tensor.dtype
            results[f"gradient of {name}"] = gradient
    return {name: tensor.cpu() for name, tensor in results.items()}


def share_of(call: Call, name, whole, rank):
    """What a rank has of one result of the whole."""
    if name in ("gradient of weight", "gradient of bias"):
        return whole[call.classes(rank)]
    if name == "gradient of logits":
        return whole[..., call.classes(rank)]
    if call.way == SHARDED and whole.dim() and whole.shape[0] == call.n_rows:
        return whole[call.rows(rank)]
    return whole


def assert_same(call: Call, whole, results):
    """Every rank's results are its share of the whole; the loss has the same bits on all of them."""
    whole = dict(whole)
    tolerance = tolerance_of(call)
    for rank, mine in enumerate(results):
        assert mine.keys() == whole.keys()
        for name, got in mine.items():
            want = share_of(call, name, whole[name], rank)
            if call.way == SHARDED and name in ("n_valid", "n_kept"):
                want = whole[name[2:]][call.rows(rank)].sum()
            text = f"{name} on rank {rank} of {call}"
            assert got.shape == want.shape and got.dtype == want.dtype, text
            if got.is_floating_point():
                # log p is a logarithm of sums: they are rounded by so much, and log p by the same, absolutely.
                of_log = name in ("log_prob", "entropy")
                error = distance(got, want, whole[name], at_least=1.0 if of_log else 0.0)
                assert error <= tolerance, f"{error:.1e}: {text}"
            else:
                assert torch.equal(got, want), text
            # Where the rows are the same on all ranks, so is everything that is not split by classes.
            if not name.startswith("gradient of") if call.way != SHARDED else name == "loss" and not got.dim():
                assert bits(got) == bits(results[0][name]), f"bits of {text}"
            if name == "gradient of input" and call.way == REPLICATED:
                assert bits(got) == bits(results[0][name]), f"bits of {text}"


def distance(got, want, whole, at_least=0.0):
    """The largest difference, over the largest entry of the whole tensor; infinite where only one is NaN or inf."""
    got, want, whole = got.double(), want.double(), whole.double()
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()) or not got[finite].isfinite().all():
        return float("inf")
    difference = (got - want)[finite].abs()
    if not difference.any():
        return 0.0
    return difference.max().item() / max(at_least, whole[whole.isfinite()].abs().max().item())


def tolerance_of(call: Call):
    if call.dtype == torch.float64:
        return 1e-14
    narrow = call.autocast or call.dtype
    if narrow == torch.float32:
        # Matmuls of other shapes add up in another order, which depends on the processor: 9 eps have been seen.
        return 16 * torch.finfo(torch.float32).eps
    # Two results that are rounded once each are an eps apart at most. What one rank multiplies may be rounded before
    # the ranks are added up, by half an eps, and so may the one process's chunks.
    return 2 * torch.finfo(narrow).eps


def bits(tensor):
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
