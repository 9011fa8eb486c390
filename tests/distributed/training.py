"""A small language model in one process, under DDP and under FSDP2: losses, gradients, parameters after a step."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import tce_kernels
from tce_kernels import TruncatedCrossEntropyHead
from tce_kernels.distributed import global_denominator

V, D = 50, 16
THRESHOLDS = {"cross-entropy": 1.0, "truncated": 0.03}
OPTIONS = {
    "cross-entropy": {"label_smoothing": 0.1},
    "truncated": {"z_loss": 1e-3, "weight": True, "chunk_size": 4},
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    """forward(tokens, target) is the loss. `calls`: how the head is used, for the wrong ways as well."""

    def __init__(self, name, tied=False, calls=None):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        linear = nn.Linear(D, V, bias=not tied)
        if tied:
            linear.weight = self.embed.weight
        self.head = TruncatedCrossEntropyHead.from_linear(linear, threshold=THRESHOLDS[name])
        self.calls = calls or call_head

    def hidden(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, tokens, target, **options):
        return self.calls(self.head, self.hidden(tokens), target, **options)


# Ways to use the head


def call_head(head, x, target, **options):
    return head(x, target, **options)


def read_weight(head, x, target, **options):
    return _loss(head, x, head.weight, head.bias, target, **options)


def read_full_tensor(head, x, target, **options):
    weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (head.weight, head.bias))
    return _loss(head, x, weight, bias, target, **options)


def read_own_shard(head, x, target, **options):
    return read_weight(head, x, target, rows="sharded", **options)


def read_unsharded(head, x, target, **options):
    head.unshard()
    loss = read_weight(head, x, target, **options)
    head.reshard()
    return loss


def _loss(head, x, of_head, bias, target, **options):
    threshold = head.threshold
    return tce_kernels.linear_truncated_cross_entropy(x, of_head, target, threshold, linear_bias=bias, **options)


WAYS = {way.__name__: way for way in (call_head, read_weight, read_full_tensor, read_own_shard, read_unsharded)}


# Data: micro-batches of very different numbers of valid tokens, one of them without any


def batches(p, n_micro_batches=2):
    """[micro-batch][rank] -> tokens and targets."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for i in range(n_micro_batches):
        step = []
        for rank in range(p):
            n = 6 + 3 * rank
            tokens, target = (torch.randint(V, (n,), generator=generator) for _ in range(2))
            target[torch.rand(n, generator=generator) < (0.1, 0.7)[rank % 2]] = -100
            if i == 0 and rank == p - 1:
                target[:] = -100
            step.append((tokens, target))
        steps.append(step)
    return steps


def class_weights(options):
    options = dict(options)
    if options.get("weight") is True:
        options["weight"] = torch.rand(V, generator=torch.Generator().manual_seed(3)) + 0.1
    return options


def in_one_process(p, name, tied=False, dtype=torch.float32, n_micro_batches=2):
    """All micro-batches of all ranks as one: one mean, one step."""
    model = Model(name, tied).to(dtype)
    whole = [batch for step in batches(p, n_micro_batches) for batch in step]
    tokens, target = (torch.cat(part) for part in zip(*whole, strict=True))
    loss = model(tokens, target, **class_weights(OPTIONS[name]))
    loss.backward()
    return results_of(model, loss.detach())


def results_of(model, loss):
    """Loss, gradients, and parameters after a step of SGD, all whole, by name."""
    torch.optim.SGD(model.parameters(), 0.5).step()
    results = {"loss": loss}
    for name, parameter in model.named_parameters():
        gradient, parameter = parameter.grad, parameter.detach()
        if isinstance(parameter, DTensor):
            assert gradient.placements == parameter.placements
            gradient, parameter = gradient.full_tensor(), parameter.full_tensor()
        name = name.removeprefix("module.")
        results[f"gradient of {name}"], results[name] = gradient.cpu(), parameter.cpu()
    return results


def step(
    here, parallel, call, name, sync, batch_group=None, n_ranks=None, batch_rank=None, averaged=True, as_number=False
):
    """One step over two micro-batches; the loss is that of all ranks."""
    n_ranks, batch_rank = n_ranks or here.size, here.rank if batch_rank is None else batch_rank
    mine = [[t.to(here.device) for t in step[batch_rank]] for step in batches(n_ranks)]
    options = class_weights(OPTIONS[name])
    if "weight" in options:
        options["weight"] = options["weight"].to(here.device)
    denominator = global_denominator(
        [target for _, target in mine], group=batch_group or here.group, weight=options.get("weight"), averaged=averaged
    )
    if as_number:
        denominator = denominator.item()
    total = torch.zeros((), device=here.device)
    for i, (tokens, target) in enumerate(mine):
        with sync(parallel, i == len(mine) - 1):
            loss = call(tokens, target, denominator=denominator, **options)
            loss.backward()
        total += loss.detach()
    return total


def mean_over(total, group):
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group)).cpu()


@contextlib.contextmanager
def fsdp_sync(model, is_last):
    model.set_requires_gradient_sync(is_last)
    yield


def ddp_sync(model, is_last):
    return contextlib.nullcontext() if is_last else model.no_sync()


def ddp(here, name, **how):
    model = Model(name).to(here.device)
    parallel = DistributedDataParallel(model, process_group=here.group, **how)
    # With static_graph DDP asserts if its first backward is under no_sync, with PyTorch's own losses too.
    sync = (lambda *_: contextlib.nullcontext()) if how.get("static_graph") else ddp_sync
    total = step(here, parallel, parallel, name, sync)
    return results_of(model, mean_over(total, here.group))


def wrap(model, mesh, head, **how):
    """Layers in units of their own, the head in one or in the root's."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **how)
    if head == "own unit":
        fully_shard(model.head, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def fsdp(here, name, head="own unit", tied=False, bf16=False, outside=False, way="call_head", as_number=False, **how):
    """With the loss inside or outside of the root's forward."""
    model = Model(name, tied, WAYS[way]).to(here.device)
    if bf16:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrap(model, here.mesh(), head, **how)
    call = model
    if outside:
        register_fsdp_forward_method(model, "hidden")

        def call(tokens, target, **options):
            return WAYS[way](model.head, model.hidden(tokens), target, **options)

    total = step(here, model, call, name, fsdp_sync, as_number=as_number)
    return results_of(model, mean_over(total, here.group))


def sum_gradients(model):
    """FSDP2 sums over ranks instead of averaging; gloo can only do so."""
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def own_shard(here, name, summed=True):
    """FSDP2's shard of the head as it is: hidden states travel, not the weight."""
    model = Model(name, calls=read_own_shard).to(here.device)
    wrap(model, here.mesh(), "own unit")
    register_fsdp_forward_method(model, "hidden")
    if summed:
        sum_gradients(model)

    def call(tokens, target, **options):
        assert isinstance(model.head.weight, DTensor)
        return read_own_shard(model.head, model.hidden(tokens), target, **options)

    total = step(here, model, call, name, fsdp_sync, averaged=False)
    return results_of(model, total.cpu())


def warnings_of_own_shard(here, summed):
    return _warnings(own_shard, here, "truncated", summed)


def warnings_of_fsdp(here, way):
    return _warnings(fsdp, here, "truncated", way=way)


def _warnings(case, *arguments, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case(*arguments, **how)
    return [str(warning.message) for warning in caught if "linear_weight" in str(warning.message)]


def hybrid(here, name, own=False):
    """Shards of the model on pairs of ranks, two copies of it."""
    mesh = here.mesh_2d(("replicate", "shard"))
    model = Model(name, calls=read_own_shard if own else call_head).to(here.device)
    wrap(model, mesh, "own unit")
    call = model
    if own:
        register_fsdp_forward_method(model, "hidden")
        sum_gradients(model)

        def call(tokens, target, **options):
            return read_own_shard(model.head, model.hidden(tokens), target, **options)

    total = step(here, model, call, name, fsdp_sync, averaged=not own)
    return results_of(model, total.cpu() if own else mean_over(total, here.group))


def fsdp_and_tensor_parallel(here, name):
    """The head's classes over pairs of ranks that have the same rows; FSDP2 over the others."""
    mesh = here.mesh_2d(("dp", "tp"))
    dp, tp = mesh["dp"], mesh["tp"]
    model = Model(name).to(here.device)
    for key in ("weight", "bias"):
        whole = getattr(model.head, key).detach()
        setattr(model.head, key, nn.Parameter(distribute_tensor(whole, tp, [Shard(0)])))
    wrap(model, dp, "own unit")
    total = step(
        here, model, model, name, fsdp_sync, batch_group=dp.get_group(), n_ranks=2, batch_rank=dp.get_local_rank()
    )
    return results_of(model, mean_over(total, dp.get_group()))


def _targets(here, weighted):
    targets = [step[here.rank][1].to(here.device) for step in batches(here.size)]
    token_weights = [torch.arange(len(target), device=here.device) % 3 for target in targets] if weighted else None
    return targets, token_weights


def denominator(here, averaged, weighted):
    targets, token_weights = _targets(here, weighted)
    total = global_denominator(targets, group=here.group, token_weights=token_weights, averaged=averaged)
    return total.cpu()


def total_weight(p, weighted):
    """The same by hand, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for _, target in (batch for step in batches(p) for batch in step):
        token_weight = torch.arange(len(target)) % 3 if weighted else torch.ones(len(target))
        total += token_weight[target != -100].sum()
    return total


def refused_denominator(here):
    targets, _ = _targets(here, False)
    try:
        global_denominator([target.float() for target in targets] if here.rank == 1 else targets, group=here.group)
    except Exception as error:
        return type(error), str(error)


def run(here, case, name, how):
    """The results of a case, or its error: it may be refused, but not wrong."""
    try:
        return globals()[case](here, name, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
