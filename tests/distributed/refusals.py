"""Ranks that do not call alike: what each of them is told, and that the next call works."""

import torch
import torch.distributed as dist

import tce_kernels

N, D, V = 8, 6, 20
ODD = 1  # the rank that differs


def arguments(here, way):
    """What every rank passes where all is well: to the function, by name."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    classes = torch.arange(V).tensor_split(here.size)[here.rank]
    given = {"target": target, "threshold": 0.5, "group": here.group}
    if way == "logits":
        return given | {"logits": (x @ weight.t())[:, classes].requires_grad_()}
    bias = torch.zeros(len(classes), requires_grad=True)
    head = {"input": x.requires_grad_(), "linear_weight": weight[classes].requires_grad_(), "linear_bias": bias}
    return given | head | {"rows": way, "chunk_size": 3}


def call(given):
    function = tce_kernels.truncated_cross_entropy if "logits" in given else tce_kernels.linear_truncated_cross_entropy
    if "gamma" in given:
        given = {name: value for name, value in given.items() if name != "threshold"}
        linear = "logits" not in given
        function = tce_kernels.linear_focal_cross_entropy if linear else tce_kernels.focal_cross_entropy
    return function(**given)


def of_rows(given, rows):
    return {name: given[name].detach()[rows].requires_grad_() for name in ("logits", "input") if name in given}


def narrower(given):
    return {name: given[name].detach()[:, :-1].requires_grad_() for name in ("input", "linear_weight")}


def frozen(given, *names):
    return {name: given[name].detach() for name in names if name in given}


def wide(given):
    names = ("logits", "input", "linear_weight", "linear_bias")
    return {name: given[name].detach().double().requires_grad_() for name in names if name in given}


def other(value, name="threshold"):
    return lambda given: {name: value}


def all_alike(given):
    return {}


# What the odd rank passes instead, and what the others do: each makes changes from the good arguments. All raise the
# same ValueError, which says this.
DISAGREEMENTS = {
    "a row less": (lambda given: of_rows(given, slice(1, None)) | {"target": given["target"][1:]}, all_alike, "8, 7"),
    "other targets": (lambda given: {"target": given["target"].roll(1)}, all_alike, "target"),
    "two targets exchanged": (lambda given: {"target": given["target"][[1, 0, *range(2, N)]]}, all_alike, "target"),
    "another threshold": (other(0.6), all_alike, "threshold"),
    "another threshold in a tensor": (other(torch.tensor(0.6)), other(torch.tensor(0.5)), "threshold"),
    "threshold in a tensor": (other(torch.tensor(0.5)), all_alike, "threshold"),
    "another rule": (other(2.0, "gamma"), all_alike, ""),
    "another gamma": (other(2.0, "gamma"), other(3.0, "gamma"), "gamma"),
    "another z_loss": (other(1e-3, "z_loss"), all_alike, "z_loss"),
    "another smoothing": (other(0.2, "label_smoothing"), all_alike, "label_smoothing"),
    "another softcap": (other(5.0, "softcap"), all_alike, "softcap"),
    "another scale": (other(2.0, "logit_scale"), all_alike, "logit_scale"),
    "another ignore_index": (other(3, "ignore_index"), all_alike, "ignore_index"),
    "another reduction": (other("sum", "reduction"), all_alike, "reduction"),
    "another denominator": (other("kept", "denominator"), all_alike, "denominator"),
    "another number": (other(3, "denominator"), other(4, "denominator"), "denominator"),
    "another number in a tensor": (
        other(torch.tensor(3.0), "denominator"), other(torch.tensor(4.0), "denominator"), "denominator",
    ),
    "class weights of its own": (other(torch.ones(V), "weight"), all_alike, "weight"),
    "other class weights": (other(torch.arange(V), "weight"), other(torch.ones(V), "weight"), "weight"),
    "token weights of its own": (other(torch.ones(N), "token_weight"), all_alike, "token_weight"),
    "other token weights": (
        other(torch.arange(N), "token_weight"), other(torch.ones(N), "token_weight"), "token_weight",
    ),
    "entropy on one rank": (other("entropy", "return_stats"), other(True, "return_stats"), "entropy"),
    "another dtype": (wide, all_alike, "float64"),
    "allow_retain_graph": (other(True, "allow_retain_graph"), all_alike, "allow_retain_graph"),
}  # fmt: skip
LINEAR_DISAGREEMENTS = {
    "another D": (narrower, all_alike, "6, 5"),
    "another chunk_size": (other(4, "chunk_size"), all_alike, "chunk_size"),
    "another tolerance": (other(0.1, "gradient_tolerance"), all_alike, "gradient_tolerance"),
    "no bias": (other(None, "linear_bias"), all_alike, "linear_bias"),
    "a frozen input": (lambda given: frozen(given, "input"), all_alike, "requires_grad"),
    "nothing that needs a gradient": (
        lambda given: frozen(given, "input", "linear_weight", "linear_bias"), all_alike, "requires_grad",
    ),
}  # fmt: skip
# Of rows that each rank has for itself, these may differ.
OWN = "a row less", "other targets", "two targets exchanged", "other token weights"

# Refused on the odd rank by itself: the error there, and a RuntimeError elsewhere.
REFUSALS = {
    "the target's shape": (lambda given: {"target": given["target"][1:]}, ValueError, "target must have the shape"),
    "the target's dtype": (lambda given: {"target": given["target"].double()}, TypeError, "target must be int32 or"),
    "no tensor": (other([1, 2], "target"), TypeError, "target must be a torch.Tensor, got list"),
    "a threshold out of range": (other(1.5), ValueError, r"threshold must be in \(0, 1\]"),
    "an option's type": (other("yes", "return_stats"), TypeError, "return_stats must be True or False"),
    "smoothing with class weights": (
        lambda given: {"label_smoothing": 0.1, "weight": torch.ones(V)}, ValueError, "label_smoothing must be 0",
    ),
    "the token weights' shape": (other(torch.ones(N - 1), "token_weight"), ValueError, "token_weight must have the"),
    "reference": (other("reference", "backend"), ValueError, "backend"),
}  # fmt: skip


def disagree(here, way, name):
    """(error, loss of the next call) of this rank."""
    odd, even, _ = (DISAGREEMENTS | LINEAR_DISAGREEMENTS)[name]
    return _error_and_next(here, way, odd if here.rank == ODD else even)


def refuse(here, way, name, by_all=False):
    odd, *_ = REFUSALS[name]
    return _error_and_next(here, way, odd if here.rank == ODD or by_all else all_alike)


def bad_target(here, way, value, only_on=None):
    """A target that no rank has, or that is in nobody's range."""

    def bad(given):
        target = given["target"].clone()
        target[4] = value
        return {"target": target}

    return _error_and_next(here, way, bad if only_on in (None, here.rank) else all_alike)


def wrong_class_weights(here, way):
    """One too few for all classes together: only together do the ranks know."""
    return _error_and_next(here, way, other(torch.ones(V - 1), "weight"))


def wrong_group(here, way, kind):
    groups = {
        "a name": "world",
        "ranks": [0, 1],
        "not a member": here.groups[(0, 1)] if here.rank > 1 else here.groups[(2, 3)],
        "a mesh": here.mesh(),
    }
    return _error_and_next(here, way, other(groups[kind], "group"))


def wrong_rows(here):
    return _error_and_next(here, "sharded", other("split", "rows"))


def no_grad_on_one(here, way):
    with torch.set_grad_enabled(here.rank != ODD):
        result = _error(lambda: call(arguments(here, way)))
    return result, _error(lambda: call(arguments(here, way)).item())


def _error_and_next(here, way, change):
    given = arguments(here, way)
    result = _error(lambda: call(given | change(given)))
    return result, _error(lambda: _loss_and_sum_of_gradients(arguments(here, way)))


def _error(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def _loss_and_sum_of_gradients(given):
    loss = call(given)
    loss.backward()
    own = next(given[name] for name in ("logits", "linear_weight") if name in given)
    total = own.grad.abs().sum()
    dist.all_reduce(total, group=given["group"])
    return loss.item(), total.item()
