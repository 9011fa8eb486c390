"""Where PyTorch users put a loss: hooks, checkpointing, forward mode, functional transforms, compilers, fake and meta
tensors, other default devices and dtypes. A call gives what PyTorch's own loss gives there, or refuses and says why."""

import contextlib
import functools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from cases import FAST, focal, linear_focal, linear_truncated, make_inputs, make_linear_inputs, truncated
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import tce_kernels
from tce_kernels import autograd

N, D, V = 6, 8, 23
SCALAR = [{}, {"denominator": "kept"}, {"allow_retain_graph": True}]
PER_ROW = {"reduction": "none"}
CASES = [("truncated", options) for options in (*SCALAR, PER_ROW)] + [("focal", {"z_loss": 0.1}), ("focal", PER_ROW)]
CASES += [("truncated", {"inplace": True}), ("truncated", {"inplace": True, "reduction": "none"})]
LINEAR_CASES = [("linear_truncated", options) for options in ({}, {"denominator": "kept"}, PER_ROW)]
LINEAR_CASES += [("linear_focal", {"allow_retain_graph": True})]
ANY_CASE = pytest.mark.parametrize("case", CASES + LINEAR_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", FAST)


def make(case, device, dtype=torch.float32):
    """(function of one tensor that calls the loss, that tensor): of logits, or of the weight of an lm-head."""
    name, options = case
    if name.startswith("linear"):
        loss = {"linear_truncated": linear_truncated, "linear_focal": linear_focal}[name]
        input, weight, bias, target = make_linear_inputs(N, D, V, dtype, device)
        return lambda x, **more: loss(input, x, bias, target, chunk_size=4, **options, **more), weight
    logits, target = make_inputs(N, V, dtype, device)
    loss = {"truncated": truncated, "focal": focal}[name]
    return lambda x, **more: loss(x * 1, target, **options, **more), logits  # inplace is not for leaves


def upstream_of(value, seed=1):
    return (0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))).to(value)


def gradient(call, x, **more):
    x = x.detach().requires_grad_()
    value = call(x, **more)
    return torch.autograd.grad(value, x, upstream_of(value))[0]


def exact(call, x):
    return gradient(call, x, backend="reference")


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)


# Forward mode, functional transforms, second derivatives


def by_dual_numbers(f, x, tangent):
    with fwAD.dual_level():
        return fwAD.unpack_dual(f(fwAD.make_dual(x, tangent))).tangent


def by_dual_numbers_that_require_grad(f, x, tangent):
    return by_dual_numbers(f, x.requires_grad_(), tangent).detach()


def by_jvp(f, x, tangent):
    return torch.func.jvp(f, (x,), (tangent,))[1]


def by_linearize(f, x, tangent):
    return torch.func.linearize(f, x)[1](tangent)


def by_jacfwd(f, x, tangent):
    return (torch.func.jacfwd(f)(x) * tangent).sum((-2, -1))


@pytest.mark.filterwarnings("ignore:.*retrieving the constant.*", "ignore:Attempted to insert a get_attr.*")
@pytest.mark.parametrize("way", [
    by_dual_numbers, by_dual_numbers_that_require_grad, by_jvp, by_linearize, by_jacfwd
])  # fmt: skip
@ANY_CASE
@ANY_BACKEND
def test_forward_mode_gives_the_tangent(backend, case, way, device):
    call, x = make(case, device)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    close(way(functools.partial(call, backend=backend), x, tangent), by_jvp(
        functools.partial(call, backend="reference"), x, tangent
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["token_weight", "weight", "denominator", "threshold"])
@pytest.mark.parametrize("linear", [False, True])
def test_tangents_of_options_are_refused(name, linear):
    values = {"token_weight": torch.rand(N), "weight": torch.rand(V)}
    value = values.get(name, torch.tensor(0.5))
    call, x = make(LINEAR_CASES[0] if linear else CASES[0], "cpu")
    with pytest.raises(ValueError, match=f"{name} must not carry a forward-mode tangent.*unpack_dual"):
        torch.func.jvp(lambda option: call(x, **{name: option}), (value,), (torch.ones_like(value),))


def second_of_gradient(f, x):
    value = f(x.requires_grad_()).sum()
    return torch.autograd.grad(torch.autograd.grad(value, x, create_graph=True)[0].square().sum(), x)


def forward_over_reverse(f, x):
    return torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (torch.ones_like(x),))


def reverse_over_forward(f, x):
    return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1].sum())(x)


def dual_numbers_over_reverse(f, x):
    with fwAD.dual_level():
        value = f(fwAD.make_dual(x.requires_grad_(), torch.ones_like(x)))
        return torch.autograd.grad(value.sum(), x)


def reverse_over_dual_numbers(f, x):
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(f(fwAD.make_dual(x.requires_grad_(), torch.ones_like(x)))).tangent
        return torch.autograd.grad(tangent.sum(), x)


def by_upstream_gradient(f, x):
    value = f(x.requires_grad_())
    upstream = torch.ones_like(value, requires_grad=True)
    (gradient,) = torch.autograd.grad(value, x, upstream, create_graph=True)
    gradient.square().sum().backward(inputs=[upstream])


def functional_jvp(f, x):
    return torch.autograd.functional.jvp(f, x, torch.ones_like(x))


@pytest.mark.parametrize("way", [
    second_of_gradient, forward_over_reverse, reverse_over_forward, dual_numbers_over_reverse,
    reverse_over_dual_numbers, by_upstream_gradient, functional_jvp,
])  # fmt: skip
@ANY_CASE
@ANY_BACKEND
def test_second_derivatives_are_refused_with_the_way_out(backend, case, way, device):
    call, x = make(case, device)
    with pytest.raises(RuntimeError, match="double backward is not supported.*backend='reference'"):
        way(functools.partial(call, backend=backend), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@ANY_CASE
@ANY_BACKEND
def test_transforms_of_reverse_mode(backend, case, device):
    call, x = make(case, device)
    fast, slow = functools.partial(call, backend=backend), functools.partial(call, backend="reference")
    batch = torch.stack([x, x.flip(1), x + 0.1])
    for f in (lambda f: torch.func.grad(lambda x: f(x).sum())(x), lambda f: torch.func.vjp(f, x)[1](f(x) * 0 + 2)[0],
              lambda f: torch.func.jacrev(f)(x), lambda f: torch.vmap(f)(batch),
              lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(batch),
              lambda f: torch.vmap(f, in_dims=1)(batch.transpose(0, 1)),
              lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True)):  # fmt: skip
        close(f(fast), f(slow))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [case for case in CASES if "inplace" in case[1]])
@ANY_BACKEND
def test_several_token_weights_for_the_same_logits(backend, case, device):
    call, x = make(case, device)
    x.requires_grad_()
    weights = torch.rand(3, N, generator=torch.Generator().manual_seed(4)).to(device)
    fast, slow = (
        torch.vmap(lambda weight: call(x, token_weight=weight, backend=name))(weights)  # noqa: B023
        for name in (backend, "reference")
    )
    close(fast, slow)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@ANY_CASE
@ANY_BACKEND
def test_batched_backward(backend, case, device):
    call, x = make(case, device)
    results = []
    for name in (backend, "reference"):
        leaf = x.detach().requires_grad_()
        value = call(leaf, backend=name)
        upstreams = torch.stack([upstream_of(value, seed) for seed in (1, 2, 3)])
        results.append(torch.autograd.grad(value, leaf, upstreams, is_grads_batched=True)[0])
    close(*results)


@ANY_CASE
@ANY_BACKEND
def test_tensors_whose_memory_holds_something_else(backend, case, device):
    """Wrappers of functionalisation, and zeros of no memory: only PyTorch's dispatcher sees through them."""
    call, x = make(case, device)
    call = functools.partial(call, backend=backend)
    close(torch.func.functionalize(call)(x), call(x))
    leaf = x.requires_grad_()
    value = call(leaf)
    assert not torch.autograd.grad(value, leaf, torch._efficientzerotensor(value.shape, device=device))[0].any()


@ANY_BACKEND
def test_numbers_that_are_still_to_be_negated(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    close(truncated(torch._neg_view(logits), target, backend=backend), truncated(-logits, target, backend=backend))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_a_trace_of_the_loss_holds_its_operator(case):
    call, x = make(case, "cpu")
    traced = torch.jit.trace(call, x, check_trace=False)
    assert any(node.kind().startswith("tce_kernels::") for node in traced.graph.nodes())
    close(traced(x.flip(0)), call(x.flip(0)))


# What is saved between forward and backward


def identity():
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def that_look_at_entries():
    """As quantisation to 8 bits looks for the largest, which a tensor without entries does not have."""

    def pack(tensor):
        assert tensor.numel() and tensor.float().abs().max().isfinite()
        return tensor.clone()

    return saved_tensors_hooks(pack, lambda tensor: tensor.clone())


@pytest.mark.parametrize("hooks", [contextlib.nullcontext, identity, save_on_cpu, that_look_at_entries])
@ANY_CASE
@ANY_BACKEND
def test_saved_tensor_hooks(backend, case, hooks, device):
    """The gradient is right; a second one is as well, or refused; and the first one stays what it was."""
    call, x = make(case, device)
    leaf = x.detach().requires_grad_()
    with hooks():
        value = call(leaf, backend=backend)
    upstream = upstream_of(value)
    (first,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    close(first, exact(call, x))
    kept = first.clone()
    try:
        (second,) = torch.autograd.grad(value, leaf, upstream)
    except RuntimeError as error:
        assert str(error) == autograd.SECOND_BACKWARD
    else:
        assert torch.equal(second, kept)
    assert torch.equal(first, kept)


@ANY_CASE
@ANY_BACKEND
def test_memory_that_a_hook_keeps_is_not_written_to(backend, case, device):
    call, x = make(case, device)
    kept = []

    def pack(tensor):
        kept.append((tensor.clone(), tensor.clone()))
        return kept[-1][0]

    leaf = x.detach().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = call(leaf, backend=backend)
    value.backward(upstream_of(value))
    close(leaf.grad, exact(call, x))
    assert kept and all(torch.equal(tensor, copy) for tensor, copy in kept)


@ANY_CASE
@ANY_BACKEND
def test_what_a_hook_brings_back_is_not_written_to(backend, case, device):
    """Memory that was freed may come back at its old address, as somebody else's."""
    call, x = make(case, device)
    unpacked = []

    def unpack(tensor):
        unpacked.append((tensor.clone(), tensor))
        return unpacked[-1][0]

    leaf = x.detach().requires_grad_()
    with saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
        value = call(leaf, backend=backend)
    value.backward(upstream_of(value))
    close(leaf.grad, exact(call, x))
    assert unpacked and all(torch.equal(tensor, copy) for tensor, copy in unpacked)


@pytest.mark.parametrize("case", [CASES[0], ("focal", {"z_loss": 0.1}), ("truncated", {"inplace": True})])
@ANY_BACKEND
def test_an_upstream_gradient_is_not_rounded_to_16_bits(backend, case, device):
    """Where the gradient is a new tensor: hooks keep it, and bring it back for each backward."""
    call, x = make(case, device, torch.bfloat16)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor.clone()):
        value = call(x.requires_grad_(), backend=backend)
    upstream = upstream_of(value)
    unit, scaled = (
        torch.autograd.grad(value, x, factor, retain_graph=True)[0] for factor in (torch.ones_like(value), upstream)
    )
    assert torch.equal(scaled, (unit.float() * upstream).to(x.dtype))


@ANY_CASE
@ANY_BACKEND
def test_nothing_empty_is_saved(backend, case, device):
    call, x = make(case, device)
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor):
        call(x.requires_grad_(), backend=backend)
    assert saved and all(shape.numel() for shape in saved)


POLICIES = {
    "ours": lambda context, operator, *_, **__: "tce_kernels" in str(operator),
    "all": lambda *_, **__: True,
    "matmuls": lambda context, operator, *_, **__: "mm" in str(operator),
}


@pytest.mark.parametrize("policy", POLICIES)
@ANY_CASE
@ANY_BACKEND
def test_selective_checkpointing(backend, case, policy, device):
    call, x = make(case, device)

    def choose(*arguments, **options):
        save = POLICIES[policy](*arguments, **options)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def segment(x, **more):
        contexts = functools.partial(create_selective_checkpoint_contexts, choose)
        return checkpoint(functools.partial(call, **more), x, use_reentrant=False, context_fn=contexts)

    close(gradient(segment, x, backend=backend), exact(call, x))


@pytest.mark.parametrize("backend", FAST)
def test_errors_of_others_keep_their_type(backend, device):
    def unpack(_):
        raise torch.OutOfMemoryError("out of memory")

    for case in CASES + LINEAR_CASES:
        call, x = make(case, device)
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            value = call(x.requires_grad_(), backend=backend)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            value.sum().backward()


# Memory that is shared


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z.view(2, 3, V), lambda z: z[:4]])
@pytest.mark.parametrize("options", [{}, PER_ROW, {"denominator": "kept"}])
def test_inplace_is_not_for_parameters(options, view):
    logits, target = make_inputs(N, V, torch.float32, "cpu")
    parameter = torch.nn.Parameter(logits.clone())
    seen = view(parameter)
    target = target[: seen.shape[:-1].numel()].view(seen.shape[:-1])
    with pytest.raises(ValueError, match="inplace must be False for logits that are a leaf"):
        truncated(seen, target, inplace=True, **options)
    assert torch.equal(parameter.detach(), logits)
    with torch.no_grad():  # where it has no effect
        truncated(seen, target, inplace=True, **options)
    assert torch.equal(parameter.detach(), logits)


@pytest.mark.parametrize("options", [{}, PER_ROW])
@ANY_BACKEND
def test_inplace_has_no_effect_where_only_a_tangent_is_asked_for(backend, options, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    before = logits.clone()
    with fwAD.dual_level():
        truncated(fwAD.make_dual(logits, torch.ones_like(logits)), target, inplace=True, backend=backend, **options)
    assert torch.equal(logits, before)


@ANY_BACKEND
def test_inplace_does_not_write_to_a_parameter_when_compiled(backend, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)
    parameter = torch.nn.Parameter(logits.clone())
    step = torch.compile(lambda z: truncated(z, target, inplace=True, backend=backend), backend="aot_eager")
    with contextlib.suppress(ValueError, torch._dynamo.exc.Unsupported):
        step(parameter).backward()
    assert torch.equal(parameter.detach(), logits)


@ANY_CASE
@ANY_BACKEND
def test_loss_and_statistics_may_be_changed_in_place(backend, case, device):
    call, x = make(case, device)
    leaf = x.detach().requires_grad_()
    value, stats = call(leaf, backend=backend, return_stats=True)
    for field in stats[:-1]:  # without the entropy, which nobody has asked for
        field.zero_()
    factor = upstream_of(value)
    value *= factor
    value.sum().backward()
    close(leaf.grad, exact(call, x))


# Compilers


needs_unknowns = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="what the compiler need not know about numbers and sizes wants torch 2.9"
)


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@ANY_CASE
@ANY_BACKEND
def test_compiled_autograd(backend, case, device):
    torch.compiler.reset()
    call, x = make(case, device)
    leaf = x.detach().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        value = call(leaf, backend=backend)
        value.backward(upstream_of(value))
    close(leaf.grad, exact(call, x))


@needs_unknowns
@pytest.mark.parametrize("linear", [False, True])
@ANY_BACKEND
def test_rows_chosen_by_masks_in_a_compiled_graph(backend, linear, device):
    """Two masks, whose sizes the compiler takes for different numbers."""
    call_input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    logits, mask = make_inputs(N, V, torch.float32, device)[0], target != -100

    def step(x, mask, other):
        if linear:
            return linear_truncated(x[mask], weight, bias, target[other], backend=backend)
        return truncated(x[mask], target[other], backend=backend)

    x = call_input if linear else logits
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        close(gradient(lambda x: compiled(step)(x, mask, mask.clone()), x), gradient(lambda x: step(x, mask, mask), x))
        with pytest.raises(RuntimeError):
            compiled(step)(x, mask, mask | True)


NUMBERS = {  # a value, and what it changes by from call to call
    "denominator": (100, 1), "z_loss": (0.01, 0.001), "logit_scale": (1.3, 0.1), "softcap": (9.1, 0.1),
}  # fmt: skip
OF_ONE = {"truncated": {"threshold": (0.5, 0.03), "label_smoothing": (0.1, 0.01)},
          "focal": {"gamma": (1.1, 0.1), "alpha": (0.5, 0.1)}}  # fmt: skip


@needs_unknowns
@pytest.mark.parametrize("case", [CASES[0], ("focal", {}), LINEAR_CASES[0]])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_numbers_in_a_compiled_graph(backend, case, device):
    """They neither recompile when they change, nor need they be known when the graph is made."""
    call, x = make(case, device)
    numbers = NUMBERS | OF_ONE[case[0].removeprefix("linear_")]
    values = [[value + i * change for value, change in numbers.values()] for i in range(10)]

    def step(x, *values):
        return call(x, backend=backend, **dict(zip(numbers, values, strict=True)))

    torch.compiler.reset()
    counter = CompileCounter()
    changing = torch.compile(step, fullgraph=True, backend=counter)
    for some in values:
        close(changing(x, *some), step(x, *some))
    assert counter.frame_count <= 2

    def read(x, tensor):
        return step(x, *[number.item() for number in tensor])

    tensor = torch.tensor(values[3])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = gradient(lambda x: compiled(read)(x, tensor), x)
    close(got, gradient(lambda x: read(x, tensor), x))


@pytest.mark.parametrize("module", [
    tce_kernels.TruncatedCrossEntropyLoss(0.6, weight=torch.linspace(0.1, 1, V)),
    tce_kernels.TruncatedCrossEntropyLoss(0.6, label_smoothing=0.1, denominator=7),
    tce_kernels.FocalCrossEntropyLoss(1.5, reduction="none"),
])  # fmt: skip
@pytest.mark.parametrize("dynamic", [True, None])
def test_modules_in_a_compiled_graph_of_dynamic_sizes(dynamic, module):
    """With dynamic=True the numbers that a module holds are symbolic too."""
    step = compiled(module, dynamic=dynamic)
    for n in (4, 5, 9):
        logits, target = make_inputs(n, V, torch.float32, "cpu")
        close(gradient(lambda x: step(x, target), logits), gradient(lambda x: module(x, target), logits))  # noqa: B023


@pytest.mark.parametrize("case", [CASES[0], CASES[3], *LINEAR_CASES[::2]])
@ANY_BACKEND
def test_a_compiled_loss_copies_nothing(backend, case, device):
    """The backward graph holds no clone and no write to what was saved."""
    torch.compiler.reset()
    call, x = make(case, device)
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)
    step = torch.compile(functools.partial(call, backend=backend), fullgraph=True, backend=compiler)
    close(gradient(step, x), exact(call, x))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert any("tce_kernels" in name for name in called)
    assert not [name for name in called if "clone" in name or "copy_" in name or "functionalized" in name]


# Tensors without data, other defaults


@ANY_CASE
def test_fake_and_meta_tensors(case):
    call, x = make(case, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        value, stats = call(fake, return_stats=True)
        value.sum().backward()
        assert fake.grad.shape == x.shape
    call, x = make(case, "meta")
    for backend in ("auto", "reference"):
        value, stats = call(x.requires_grad_(), return_stats=True, backend=backend)
        value.sum().backward()
        assert x.grad.shape == x.shape
        assert value.device.type == stats.accuracy.device.type == "meta"


def test_linear_losses_on_meta_tensors_under_autocast():
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, "meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_truncated(input, weight, bias, target).device.type == "meta"


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("options", [{}, {"token_weight": True}, {"denominator": 7}, {"denominator": torch.tensor(7)}])
@pytest.mark.parametrize("case", [CASES[0], *LINEAR_CASES[::3]])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_other_defaults_change_nothing(backend, case, options, default, device):
    call, x = make(case, device)
    if "token_weight" in options:
        options = {"token_weight": torch.rand(N, generator=torch.Generator().manual_seed(0)).to(device)}
    x.requires_grad_()

    def run():
        value, stats = call(x, return_stats=True, backend=backend, **options)
        shares = stats.accuracy, stats.truncated_fraction, stats.mean_confidence
        return value, *torch.autograd.grad(value, x), *stats[:-1], *shares

    want = run()
    with DEFAULTS[default]():
        got = run()
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# Layouts


FEATURES_APART = {
    "one sequence, transposed": lambda x: x.t().contiguous().t()[None],
    "transposed": lambda x: x.t().contiguous().t(),
    "every other feature": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", FEATURES_APART)
@pytest.mark.parametrize("options", [{}, PER_ROW, {"denominator": "kept"}])
@pytest.mark.parametrize("compile", [False, True])
@ANY_BACKEND
def test_hidden_states_whose_features_lie_apart(backend, compile, options, layout, device):
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, device)
    arrange = FEATURES_APART[layout]
    target = target.view(arrange(input).shape[:-1])

    def call(x, **more):
        return linear_truncated(arrange(x), weight, bias, target, chunk_size=4, **options, **more)

    step = compiled(functools.partial(call, backend=backend)) if compile else functools.partial(call, backend=backend)
    got, want = [], exact(call, input)
    for _ in range(2):  # accumulated, as in training
        got.append(gradient(step, input))
    close(sum(got), 2 * want)


@pytest.mark.parametrize("options", [{}, PER_ROW])
def test_operators_promise_the_strides_that_they_make(options):
    """torch.library.opcheck compares what the fake operator says with what the real one returns."""
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, "cpu")
    form, chunks = ("truncated", None, 1.0, -100, 0.0, 0.0, None, 1.0), (4, torch.float32, 0.0, torch.float32, "torch")
    row_scale, param = torch.rand(N), torch.tensor(-0.5)
    for hidden in (arrange(input) for arrange in FEATURES_APART.values() if arrange(input).dim() == 2):
        for head in (weight, weight.t().contiguous().t()):
            arguments = (hidden, head, bias, target, row_scale, param, *form, *chunks, [True] * 3)
            torch.library.opcheck(torch.ops.tce_kernels.linear_loss.default, arguments)


@ANY_BACKEND
def test_empty_logits_without_strides(backend, device):
    logits = torch.empty(0, V, device=device).as_strided((0, V), (0, 0)).requires_grad_()
    value = truncated(logits, torch.zeros(0, dtype=torch.int64, device=device), backend=backend)
    assert value == 0
    assert torch.autograd.grad(value, logits)[0].shape == (0, V)


# Work that is counted


def test_floating_point_operations_of_the_linear_losses():
    """As if every row were kept: 2 N D V forward, and as much for each gradient that is needed."""
    input, weight, bias, target = make_linear_inputs(N, D, V, torch.float32, "cpu")
    input, target = input.view(2, 3, D), target.view(2, 3)
    matmul = 2 * N * D * V
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        for options, again in (({}, 0), (PER_ROW, 1)):
            tensors = [t.clone().requires_grad_(needed) for t, needed in zip((input, weight), needs, strict=True)]
            with FlopCounterMode(display=False) as counter:
                value = linear_truncated(*tensors, None, target, **options).sum()
                if any(needs):
                    value.backward()
            assert counter.get_total_flops() == matmul * (1 + sum(needs) + (again if any(needs) else 0))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(F.linear(*tensors).flatten(0, 1), target.flatten())
    assert counter.get_total_flops() == matmul


def test_gradients_are_right_while_operations_are_counted():
    for case in CASES + LINEAR_CASES:
        call, x = make(case, "cpu")
        with FlopCounterMode(display=False):
            got = gradient(call, x)
        close(got, exact(call, x))


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_tensors_beside_plain_ones_are_refused_by_name(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    logits, target = make_inputs(N, V, torch.float32, "cpu")
    input, weight, _, linear_target = make_linear_inputs(N, D, V, torch.float32, "cpu")
    per_row = dict(token_weight=torch.rand(N))
    per_call = dict(weight=torch.rand(V), threshold=torch.tensor(0.5), denominator=torch.tensor(3.0))
    head = dict(input=input, linear_weight=weight, target=linear_target, **per_row, **per_call)
    for function, arguments in (
        (tce_kernels.truncated_cross_entropy, dict(logits=logits, target=target, **per_row, **per_call)),
        (tce_kernels.linear_truncated_cross_entropy, head),
        (
            tce_kernels.linear_truncated_cross_entropy,
            head | dict(linear_weight=distribute_tensor(weight, mesh, [Shard(0)])),
        ),
    ):
        for name in ("target", *per_row, *per_call):
            placement = Shard(0) if arguments[name].dim() else Replicate()
            distributed = distribute_tensor(arguments[name], mesh, [placement])
            advice = "full_tensor" if name in per_call else "to_local"
            with pytest.raises(TypeError, match=rf"^{name} must be a plain .* placements .*{name}\.{advice}\(\)"):
                function(**arguments | {name: distributed})
    with pytest.raises(TypeError, match="^linear_weight must be a DTensor where input"):
        linear_truncated(distribute_tensor(input, mesh, [Replicate()]), weight, None, linear_target)


def test_the_memory_of_distributed_logits_is_not_written_to(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    logits, target = make_inputs(N, V, torch.float32, "cpu")
    distributed, target = distribute_tensor(logits, mesh, [Shard(1)]), distribute_tensor(target, mesh, [Replicate()])
    for options in SCALAR[:2]:
        x = distributed.clone().requires_grad_() * 1
        tce_kernels.truncated_cross_entropy(x, target, inplace=True, **options).backward()
        assert torch.equal(x.full_tensor(), logits)
