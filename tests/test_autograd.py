"""Backward, twice and for second derivatives; registered operators, torch.compile, autocast, memory."""

import contextlib
import shutil

import pytest
import torch
from cases import (
    FAST,
    INTERPRETED,
    assert_inductor_gives,
    assert_matches_reference,
    focal,
    loss_and_gradient,
    make_inputs,
    needs_triton,
    truncated,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tce_kernels
from tce_kernels import context

N, V = 6, 50
ONCE = [{}, {"reduction": "sum"}, {"inplace": True}, {"inplace": True, "reduction": "none"}]
REPEATABLE = [{"allow_retain_graph": True}, {"reduction": "none"}, {"denominator": "kept"}]


@pytest.mark.parametrize("options", ONCE)
@pytest.mark.parametrize("backend", FAST)
def test_second_backward_raises_and_names_the_way_out(backend, options, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    value = truncated(logits * 1, target, backend=backend, **options).sum()
    (first,) = torch.autograd.grad(3 * value, logits, retain_graph=True)
    first = first.clone()
    with pytest.raises(RuntimeError, match="allow_retain_graph=True"):
        torch.autograd.grad(value, logits)
    _, want = loss_and_gradient(truncated, logits, target, backend="reference", **options)
    assert first.ne(0).eq(want.ne(0)).all()


@pytest.mark.parametrize("options", REPEATABLE)
@pytest.mark.parametrize("backend", FAST)
def test_second_backward_is_right_where_the_logits_are_kept(backend, options, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    value = truncated(logits, target, backend=backend, **options).sum()
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    (third,) = torch.autograd.grad(3 * value, logits, retain_graph=True)
    (again,) = torch.autograd.grad(value, logits)
    assert torch.equal(first, again)
    torch.testing.assert_close(third, 3 * first)


@pytest.mark.parametrize("loss", [truncated, focal])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}])
@pytest.mark.parametrize("backend", FAST)
def test_double_backward_says_that_the_reference_has_it(backend, options, loss, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    value = loss(logits * 1, target, backend=backend, **options).sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported.*backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), logits)
    value = loss(logits * 1, target, backend=backend, **options).sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_double_backward_on_the_reference(device):
    logits, target = make_inputs(N, V, torch.float64, device)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(truncated(logits, target, backend="reference"), logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    step = 1e-6 * torch.randn_like(logits)

    def penalty(x):
        (gradient,) = torch.autograd.grad(truncated(x, target, backend="reference"), x)
        return gradient.square().sum()

    slope = (penalty(logits + step) - penalty(logits - step)) / 2
    torch.testing.assert_close((second * step).sum(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.37, -2.0])
@pytest.mark.parametrize("backend", FAST)
def test_upstream_gradient_scales_the_gradient(backend, factor, device):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    logits.requires_grad_()
    (unit,) = torch.autograd.grad(truncated(logits, target, backend="reference"), logits)
    (scaled,) = torch.autograd.grad(truncated(logits, target, backend=backend) * factor, logits)
    torch.testing.assert_close(scaled, unit * factor, atol=1e-6, rtol=2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"denominator": "kept"}])
@pytest.mark.parametrize("backend", FAST)
def test_inplace_takes_the_memory_of_the_logits(backend, options, device):
    leaf, target = make_inputs(N, V, torch.float32, device)
    logits = leaf.requires_grad_() * 1
    memory = logits.data_ptr()
    (gradient,) = torch.autograd.grad(truncated(logits, target, backend=backend, inplace=True, **options).sum(), logits)
    assert gradient.data_ptr() == memory
    assert torch.equal(gradient, logits.detach())


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", FAST)
def test_inplace_is_noticed_by_operations_that_kept_the_logits(backend, options, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    outer = torch.tanh(logits)  # saves its output
    value = truncated(outer, target, backend=backend, inplace=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_inplace_is_noticed_once_in_forward_and_once_in_backward(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    outer = torch.tanh(logits)
    truncated(outer, target, backend=backend, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outer.sum().backward()
    outer, factor = logits * 1, torch.ones(V, device=device, requires_grad=True)
    value = truncated(outer, target, backend=backend, inplace=True)
    between = (outer.detach() * factor).sum()  # keeps the gradient for an upstream gradient of 1
    value.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        between.backward()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_without_gradient_nothing_is_modified(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    before = logits.clone()
    plain = truncated(logits, target, backend=backend, inplace=True)
    with torch.no_grad():
        guarded = truncated(logits.clone().requires_grad_(), target, backend=backend, inplace=True)
    assert not plain.requires_grad
    assert not guarded.requires_grad
    assert torch.equal(plain, guarded)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", FAST)
def test_under_activation_checkpointing(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    direct = torch.autograd.grad(truncated(logits * 2, target, backend=backend), logits)
    kept = checkpoint(lambda x: truncated(x * 2, target, backend=backend), logits, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(kept, logits)[0], direct[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_changes_nothing(backend, options, dtype, device):
    """The policy: logits are used in the dtype they come in, and the loss is float32, inside autocast and outside."""
    for logits_dtype in (torch.float32, dtype):
        logits, target = make_inputs(N, V, logits_dtype, device)
        outside = loss_and_gradient(truncated, logits, target, backend=backend, **options)
        with torch.autocast(device.type, dtype=dtype):
            inside = loss_and_gradient(truncated, logits, target, backend=backend, **options)
        assert inside[0].dtype == torch.float32
        assert inside[1].dtype == logits_dtype
        assert torch.equal(outside[0], inside[0])
        assert torch.equal(outside[1], inside[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_operators_pass_opcheck(backend, dtype, device):
    logits, target = make_inputs(N, V, dtype, device)
    logits, target = logits.view(2, 3, V), target.view(2, 3)
    row_scale = torch.rand(2, 3, device=device)
    param = torch.tensor(-0.5, device=device)
    form = ("truncated", None, 1.0, -100, 0.1, 0.2, 5.0, 1.5)
    operators = torch.ops.tce_kernels
    torch.library.opcheck(operators.row_loss.default, (logits, target, row_scale, param, *form, backend))
    torch.library.opcheck(operators.loss_and_dlogits.default, (logits, target, row_scale, param, *form, backend))
    rows = operators.row_loss(logits, target, row_scale, param, *form, backend)[1]
    torch.library.opcheck(operators.dlogits.default, (logits, target, row_scale, rows, *form, backend))


COMPILED = [
    {},
    {"reduction": "none"},
    {"inplace": True},
    {"inplace": True, "reduction": "none"},
    {"denominator": "kept", "z_loss": 0.1},
    {"denominator": 5, "label_smoothing": 0.1, "softcap": 5.0},
    {"allow_retain_graph": True, "token_weight": True},
]


@pytest.mark.parametrize("options", COMPILED)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_compiled_gives_what_eager_gives(backend, options, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)
    if "token_weight" in options:
        options = dict(options, token_weight=torch.rand(N, device=device))

    def step(logits):
        return truncated(logits * 2, target, return_stats=True, backend=backend, **options)

    def run(function):
        x = logits.detach().requires_grad_()
        value, stats = function(x)
        return value, *torch.autograd.grad(3 * value.sum(), x), stats.accuracy, *stats[:-1]

    # Capture, functionalisation and fakes need no C++ compiler, unlike TorchInductor.
    for got, want in zip(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True):
        if backend == "reference":
            torch.testing.assert_close(got, want)
        else:  # compiled, the gradient of a scalar comes from another kernel, with another pivot of its exponents
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-8)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "z_loss": 0.1}])
def test_inductor_gives_what_eager_gives(options, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)

    def step(logits):
        return truncated(logits * 2, target, **options).sum()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want, got = step(eager), torch.compile(step, fullgraph=True)(compiled)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # the sum may be taken in another order
    assert_inductor_gives(compiled.grad, eager.grad)


@pytest.mark.parametrize("backend", FAST)
def test_a_tensor_threshold_does_not_recompile(backend, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits, threshold):
        return truncated(logits, target, threshold=threshold, backend=backend)

    for threshold in (0.2, 0.5, 0.9):
        threshold = torch.tensor(threshold, device=device)
        assert torch.equal(step(logits, threshold), truncated(logits, target, threshold=threshold, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", FAST)
def test_compiled_second_backward_is_right_or_raises(backend, device):
    torch.compiler.reset()
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    step = torch.compile(lambda x: truncated(x * 1, target, backend=backend), fullgraph=True, backend="aot_eager")
    value = 3 * step(logits)
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    first = first.clone()
    with contextlib.suppress(RuntimeError):
        (second,) = torch.autograd.grad(value, logits)
        assert torch.equal(first, second)


SYNCHRONISING = [
    "item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "masked_select", "unique",
    "__bool__", "__int__", "__float__", "__index__", "__array__",
]  # fmt: skip


@contextlib.contextmanager
def no_synchronisation():
    """Whatever would make the host wait for a device fails, also inside operators and backward; yields the off switch.

    Tensors on a CPU do not wait, so torch's own detector sees nothing there; on a GPU it watches as well.
    """
    watching = [True]

    def refuse_method(name):
        method = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            assert not watching[0], f"Tensor.{name} synchronises host and device"
            return method(self, *args, **kwargs)

        return watched

    def refuse_masks(name):
        method = getattr(torch.Tensor, name)

        def watched(self, index, *args):
            masks = [
                i for i in (index if isinstance(index, tuple) else (index,)) if getattr(i, "dtype", None) == torch.bool
            ]
            assert not (watching[0] and masks), "indexing with a mask synchronises host and device"
            return method(self, index, *args)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in SYNCHRONISING:
            patch.setattr(torch.Tensor, name, refuse_method(name))
        for name in ("nonzero", "equal", "allclose", "masked_select", "unique"):
            patch.setattr(torch, name, getattr(torch.Tensor, name))
        for name in ("__getitem__", "__setitem__"):
            patch.setattr(torch.Tensor, name, refuse_masks(name))
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield watching
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def test_the_detector_of_synchronisation_detects():
    tensor = torch.ones(3)
    ways = [
        lambda: tensor[0].item(), lambda: tensor.tolist(), lambda: bool(tensor[0]), lambda: tensor.nonzero(),
        lambda: tensor[tensor > 0], lambda: torch.equal(tensor, tensor),
    ]  # fmt: skip
    for synchronise in ways:
        with no_synchronisation(), pytest.raises(AssertionError, match="synchronises"):
            synchronise()
    logits, target = make_inputs(N, V, torch.float32, "cpu")
    logits.requires_grad_()
    with no_synchronisation(), pytest.raises(AssertionError, match="synchronises"):
        truncated(logits, target, backend="torch")  # its operators look at the data, as a CPU may
    value = truncated(logits, target, backend="torch")
    with no_synchronisation(), pytest.raises(AssertionError, match="synchronises"):
        torch.autograd.grad(value, logits)


@needs_triton
@pytest.mark.parametrize("loss", [truncated, focal])
@pytest.mark.parametrize("options", [*ONCE, *REPEATABLE, {"denominator": 7.5, "weight": True}])
def test_the_triton_path_does_not_synchronise(options, loss, device, monkeypatch):
    from tce_kernels import kernels

    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    options = dict(options, weight=torch.ones(V, device=device)) if "weight" in options else options
    threshold = {} if loss is focal else {"threshold": torch.tensor(0.5, device=device)}
    with no_synchronisation() as watching:
        for name in (
            "split_sums_kernel",
            "row_loss_kernel",
            "dlogits_kernel",
            "loss_and_dlogits_kernel",
            "scale_kernel",
        ):
            monkeypatch.setattr(kernels, name, _Unwatched(getattr(kernels, name), watching))
        value, stats = loss(logits * 1, target, backend="triton", return_stats=True, **threshold, **options)
        torch.autograd.grad(value.sum(), logits)
        _ = stats.accuracy, stats.truncated_fraction, stats.mean_confidence


class _Unwatched:
    """A kernel whose launch is not watched: Triton's interpreter reads tensors in order to run them."""

    def __init__(self, kernel, watching):
        self.kernel, self.watching = kernel, watching

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.watching[0] = not INTERPRETED
            self.kernel[grid](*args, **kwargs)
            self.watching[0] = True

        return launch


class _Launches(TorchDispatchMode):
    """What a GPU would be asked to run: operations that neither view nor allocate, and `kernels`, which do not run."""

    ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "promote_types"}

    def __init__(self, monkeypatch):
        super().__init__()
        from tce_kernels import kernels

        self.names = []
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, _Counted(name, self.names))
        # A call that saw the mode would go through the registered operators, as no training step does.
        monkeypatch.setattr(context, "is_in_torch_dispatch_mode", lambda: False)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        aliases = [returned.alias_info for returned in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in self.ALLOCATE:
            self.names.append(name)
        if name == "sum" and result.dtype != args[0].dtype:
            self.names.append("conversion of what is summed up")  # which PyTorch launches by itself
        return result


class _Counted:
    def __init__(self, name, names):
        self.name, self.names = name, names

    def __getitem__(self, grid):
        return lambda *_, **__: self.names.append(self.name)


@needs_triton
@pytest.mark.parametrize("options, forward, backward", [
    ({}, ["ne", "sum", "clamp", "div", "loss_and_dlogits_kernel", "sum"], ["ones_like", "scale_kernel"]),
    ({"reduction": "sum"}, ["ne", "loss_and_dlogits_kernel", "sum"], ["ones_like", "scale_kernel"]),
    ({"reduction": "none"}, ["ne", "row_loss_kernel"], ["mul", "dlogits_kernel"]),
])  # fmt: skip
@pytest.mark.parametrize("loss", [truncated, focal])
def test_launches_of_a_call(loss, options, forward, backward, device, monkeypatch):
    """Small inputs feel each of them."""
    logits, target = make_inputs(N, V, torch.float32, device)
    logits.requires_grad_()
    upstream = torch.ones(N, device=device) if options.get("reduction") == "none" else None
    with _Launches(monkeypatch) as launches:
        value = loss(logits, target, backend="triton", **options)
        assert launches.names == forward
        launches.names.clear()
        torch.autograd.grad(value, logits, upstream)
        assert launches.names == backward


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_with_new_logits(device):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    static = logits.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(truncated(static, target), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = truncated(static, target)
        (gradient,) = torch.autograd.grad(value, static)
    with torch.no_grad():
        static.copy_(logits.flip(1))
    graph.replay()
    want = loss_and_gradient(truncated, logits.flip(1), target, backend="triton", upstream_seed=0)
    torch.testing.assert_close(value, want[0])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_modules_are_the_functions(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    weight, token_weight = torch.rand(V, device=device), torch.rand(N, device=device)
    module = tce_kernels.TruncatedCrossEntropyLoss(0.6, weight=weight, reduction="sum", backend=backend)
    assert not list(module.parameters())
    assert module.to(torch.float64).weight.dtype == torch.float64
    want = truncated(logits, target, weight=weight, reduction="sum", backend=backend)
    torch.testing.assert_close(module(logits, target), want)
    want = truncated(logits, target, weight=weight, token_weight=token_weight, reduction="sum", backend=backend)
    torch.testing.assert_close(module(logits, target, token_weight=token_weight), want)
    want = truncated(logits, target, threshold=0.5, reduction="none", backend=backend)
    assert torch.equal(
        module(logits, target, reduction="none", weight=None),
        truncated(logits, target, reduction="none", backend=backend),
    )  # options of a call go before the module's
    module.threshold = 0.5
    assert torch.equal(module(logits, target, reduction="none", weight=None), want)
    module = tce_kernels.FocalCrossEntropyLoss(1.5, alpha=0.5, denominator="kept", backend=backend)
    want = focal(logits, target, gamma=1.5, alpha=0.5, denominator="kept", backend=backend)
    assert torch.equal(module(logits, target), want)
    assert repr(module) == f"FocalCrossEntropyLoss(gamma=1.5, alpha=0.5, denominator='kept', backend='{backend}')"


@pytest.mark.parametrize("backend", FAST)
def test_module_with_a_threshold_schedule(backend, device):
    logits, target = make_inputs(N, V, torch.float32, device)
    module = tce_kernels.TruncatedCrossEntropyLoss(torch.tensor(0.9, device=device), backend=backend)
    for threshold in (0.9, 0.5):
        module.threshold.fill_(threshold)
        assert torch.equal(module(logits, target), truncated(logits, target, threshold=threshold, backend=backend))


@pytest.mark.parametrize("backend", FAST)
def test_class_weights_of_another_dtype(backend, device):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        weight = torch.randint(0, 3, (V,), device=device).to(dtype)
        assert_matches_reference(truncated, logits, target, backend=backend, weight=weight)
