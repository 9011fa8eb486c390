"""Where PyTorch users put a loss: compilers, checkpoints, hooks, transforms; with a group."""

import torch
import torch._dynamo.testing
import torch._inductor.config
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import tce_kernels

from .calls import Call, bits, tensors_of


def make(here, call: Call):
    """(function of this rank's logits or weight, and of a number by which its loss is divided; that tensor)"""
    x, weight, bias, target, *_ = (tensor.to(here.device) for tensor in tensors_of(call))
    mine, rows, options = call.classes(here.rank), call.rows(here.rank), dict(call.options)
    group, way = here.group, call.way
    if not call.is_linear:
        logits = torch.nn.functional.linear(x, weight, bias)[..., mine].contiguous()
        return lambda tensor, **more: tce_kernels.truncated_cross_entropy(
            tensor * 1, target, group=group, **options, **more
        ), logits
    return lambda tensor, **more: tce_kernels.linear_truncated_cross_entropy(
        x[rows], tensor * 1, target[rows], linear_bias=bias[mine], group=group, rows=way, **options, **more
    ), weight[mine]


def gradient(function, tensor, scale=0.7):
    tensor = tensor.detach().requires_grad_()
    value = function(tensor)
    upstream = scale * torch.arange(1, value.numel() + 1, device=value.device).view(value.shape).to(value)
    value.backward(upstream)
    return [value.detach().cpu(), tensor.grad.cpu()]


def compiled(here, call: Call, backend):
    """Eager and compiled results, of several calls with other values; and how many graphs there are."""
    function, tensor = make(here, call)
    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True  # what an older version of the operators has left there
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = torch.compile(function, fullgraph=True, backend=graphs)
    results = []
    for i in range(3):
        values = {"threshold": torch.tensor(0.4 + 0.1 * i, device=here.device)}
        scaled = tensor * (1 + 0.1 * i)
        eager = gradient(lambda x, values=values: function(x, **values), scaled)
        results.append((eager, gradient(lambda x, values=values: fast(x, **values), scaled)))
    return results, graphs.frame_count


def compiled_autograd(here, call: Call):
    function, tensor = make(here, call)
    want = gradient(function, tensor)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        return want, gradient(function, tensor)


def checkpointed(here, call: Call):
    function, tensor = make(here, call)
    want = gradient(function, tensor)
    ways = [lambda x, again=again: checkpoint(function, x, use_reentrant=again) for again in (False, True)]
    return [(want, gradient(way, tensor)) for way in ways]


def hooked(here, call: Call):
    function, tensor = make(here, call)
    with save_on_cpu():
        return gradient(function, tensor), gradient(function, tensor)


def differentiated(here, call: Call):
    """By torch.func.grad."""
    function, tensor = make(here, call)
    got = torch.func.grad(lambda x: 0.7 * function(x))(tensor)
    return gradient(function, tensor)[1], got.cpu()


def mapped(here, call: Call):
    """The loss of each sample of a batch, by torch.vmap: its values, or the error."""
    function, tensor = make(here, call)
    batch = torch.stack([tensor, 0.5 * tensor])
    want = torch.stack([function(sample) for sample in batch])
    return want.cpu(), _error(lambda: torch.vmap(function)(batch).cpu())


def in_forward_mode(here, call: Call):
    function, tensor = make(here, call)
    return _error(lambda: torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),)))


def differentiated_twice(here, call: Call):
    function, tensor = make(here, call)
    tensor = tensor.detach().requires_grad_()

    def second():
        (first,) = torch.autograd.grad(function(tensor).sum(), tensor, create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensor)

    return _error(second)


def backward_twice(here, call: Call):
    """The gradients of two backwards through one graph, or the error of the second."""
    function, tensor = make(here, call)
    tensor = tensor.detach().requires_grad_()
    value = function(tensor)
    (first,) = torch.autograd.grad(value, tensor, 0.7 * torch.ones_like(value), retain_graph=True)
    second = _error(lambda: torch.autograd.grad(value, tensor, 0.7 * torch.ones_like(value))[0].cpu())
    return first.cpu(), second


def through_modules(here, call: Call):
    """The modules, given the group at the start or in the call, against the functions."""
    x, weight, bias, target, *_ = (tensor.to(here.device) for tensor in tensors_of(call))
    mine, group = call.classes(here.rank), here.group
    logits = torch.nn.functional.linear(x, weight, bias)[..., mine]
    linear = torch.nn.Linear(weight.shape[1], len(weight[mine]), device="meta")
    linear.weight, linear.bias = torch.nn.Parameter(weight[mine]), torch.nn.Parameter(bias[mine])
    head = x, weight[mine], target, bias[mine]
    given = [
        tce_kernels.truncated_cross_entropy(logits, target, 0.5, group=group),
        tce_kernels.TruncatedCrossEntropyLoss(0.5, group=group)(logits, target),
        tce_kernels.TruncatedCrossEntropyLoss(0.5)(logits, target, group=group),
    ]
    made = [
        tce_kernels.linear_truncated_cross_entropy(*head[:3], 0.5, linear_bias=head[3], group=group),
        tce_kernels.LinearTruncatedCrossEntropyLoss(0.5, group=group)(*head),
        tce_kernels.LinearTruncatedCrossEntropyLoss(0.5)(*head, group=group),
        tce_kernels.TruncatedCrossEntropyHead.from_linear(linear, threshold=0.5, group=group)(x, target),
        tce_kernels.TruncatedCrossEntropyHead.from_linear(linear, threshold=0.5)(x, target, group=group),
    ]
    focal = [
        tce_kernels.focal_cross_entropy(logits, target, 1.5, group=group),
        tce_kernels.FocalCrossEntropyLoss(1.5, group=group)(logits, target),
    ]
    return [{bits(loss.detach()) for loss in losses} for losses in (given, made, focal)]


def _error(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def zeros_from_above_on_one_rank(here, call: Call):
    """Gradients of replicated rows whose upstream gradients are 0 for most rows on one rank: of input and weight."""
    x, weight, bias, target, *_ = (tensor.to(here.device) for tensor in tensors_of(call))
    mine = call.classes(here.rank)
    x, weight = x.requires_grad_(), weight[mine].requires_grad_()
    loss = tce_kernels.linear_truncated_cross_entropy(
        x, weight, target, 1.0, linear_bias=bias[mine], reduction="none", group=here.group
    )
    upstream = torch.ones_like(loss)
    if here.rank == 1:
        upstream[5:] = 0
    return [gradient.cpu() for gradient in torch.autograd.grad(loss, (x, weight), upstream)]
