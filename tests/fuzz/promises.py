"""What a call of a loss promises, checked: values, dtypes, shapes, layouts, refusals, memory, second backwards."""

import contextlib

import numpy as np
import torch

import tce_kernels
from tce_kernels import LossStats, torch_ops
from tests.fuzz.drawing import Case
from tests.fuzz.expected import Undecided, array, expect

FUNCTIONS = {
    ("truncated", False): tce_kernels.truncated_cross_entropy,
    ("focal", False): tce_kernels.focal_cross_entropy,
    ("truncated", True): tce_kernels.linear_truncated_cross_entropy,
    ("focal", True): tce_kernels.linear_focal_cross_entropy,
}
MODULES = {
    ("truncated", False): tce_kernels.TruncatedCrossEntropyLoss,
    ("focal", False): tce_kernels.FocalCrossEntropyLoss,
    ("truncated", True): tce_kernels.LinearTruncatedCrossEntropyLoss,
}
NAMES = {False: ["logits"], True: ["input", "linear_weight", "linear_bias"]}


class Wrong(Exception):
    """A promise that a call broke: its kind, and the numbers."""

    def __init__(self, kind, detail=""):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def require(condition, kind, detail=""):
    if not condition:
        raise Wrong(kind, detail)


@contextlib.contextmanager
def surroundings(case):
    """The default dtype, and sizes of blocks at which splits, programs of several rows and single blocks come up."""
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch_ops, "BLOCK_LOGITS", torch_ops.BLOCK_LOGITS)
        torch_ops.BLOCK_LOGITS = case.block_logits
        if case.backend == "triton":
            from tce_kernels import triton_ops

            for name, value in (("WARP", 1), ("_device_figures", lambda device: case.figures)):
                stack.callback(setattr, triton_ops, name, getattr(triton_ops, name))
                setattr(triton_ops, name, value)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(case.default_dtype)
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory reads as NaN
        if case.autocast:
            stack.enter_context(torch.autocast("cpu", dtype=case.autocast))
        yield


def call_of(case: Case):
    """The loss as a function of the tensors that are differentiated."""
    name = case.rule, case.linear
    first = {"threshold": case.threshold} if case.rule == "truncated" else {"gamma": case.gamma, "alpha": case.alpha}
    options = {"backend": case.backend, **case.options}
    if not case.as_module:

        def call(*tensors):
            if case.linear:
                return FUNCTIONS[name](*tensors[:2], case.target, **first, linear_bias=tensors[2], **options)
            return FUNCTIONS[name](*tensors, case.target, **first, **options)
    else:
        later = {key: options.pop(key) for key in ("token_weight", "z_loss") if key in options}
        before = {"z_loss": 0.5} if "z_loss" in later else {}  # options of the call go before the module's

        def call(*tensors):
            module = MODULES[name](**first, **options, **before)
            if case.linear:
                return module(*tensors[:2], case.target, tensors[2], **later)
            return module(*tensors, case.target, **later)

    return call


def make_leaves(case):
    """The tensors of the call, each in memory of its own; with `inplace` logits that nobody needs afterwards."""
    leaves = []
    for laid, needs in zip(case.inputs, case.needs, strict=True):
        if laid is None:
            leaves.append(None)
        elif case.on_leaf:
            case.root = laid.memory.clone().requires_grad_()
            leaves.append(case.root.as_strided(laid.size, laid.stride, laid.offset))
        elif case.options.get("inplace") is True and needs and case.context != "checkpoint":
            case.root = laid.memory.clone().requires_grad_()
            leaves.append(case.root.clone().as_strided(laid.size, laid.stride, laid.offset))
            leaves[-1].register_hook(case.arrived.append)
        else:
            memory = laid.memory.clone()
            leaves.append(memory.as_strided(laid.size, laid.stride, laid.offset).requires_grad_(needs))
    return leaves


def forward(case):
    call = call_of(case)
    if case.context == "no_grad":
        with torch.no_grad():
            return call(*case.leaves)
    if case.context == "checkpoint":
        if case.options.get("inplace") is True:
            return torch.utils.checkpoint.checkpoint(lambda x: call(x * 1), *case.leaves, use_reentrant=False)
        return torch.utils.checkpoint.checkpoint(call, *case.leaves, use_reentrant=False)
    if case.context == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return call(*case.leaves)
    return call(*case.leaves)


def bits(tensor):
    return tensor.detach().reshape(-1).clone().view(torch.uint8)


def check(case: Case):
    """Make the call, and raise Wrong for the first promise that it breaks."""
    case.leaves = make_leaves(case)
    target = case.target
    if isinstance(target, torch.Tensor):
        target = target.clone()
    with surroundings(case):
        if case.refused:
            return check_refusal(case)
        returned = forward(case)
        has_stats = case.options.get("return_stats", False)
        require(isinstance(returned, tuple) == has_stats, "returned", type(returned).__name__)
        loss, stats = returned if has_stats else (returned, None)
        try:
            with np.errstate(all="ignore"):
                wanted = expect(case, stats)
        except Undecided:
            case.options["return_stats"] = True
            return check(case)
        check_loss(case, loss, wanted)
        if has_stats:
            check_statistics(case, stats, wanted)
        needed = [leaf for leaf in case.leaves if leaf is not None and leaf.requires_grad]
        connected = bool(needed) and case.context != "no_grad"
        require(loss.requires_grad == connected, "requires_grad of the loss", loss.requires_grad)
        if connected:
            check_gradients(case, loss, needed, wanted)
        check_untouched(case, connected)
        require(torch.equal(case.target, target), "the target was written to")


def check_refusal(case):
    try:
        forward(case)
    except case.refused as error:
        require(len(str(error)) > 20, "refused without a reason", str(error))
        check_untouched(case, False)
    except Exception as error:
        raise Wrong(f"refused with {type(error).__name__}", f"{case.why}: {error}") from error
    else:
        raise Wrong("not refused", case.why)


def compare(name, tensor, wanted):
    value, bound = wanted
    got = array(tensor)
    require(got.shape == value.shape, f"{name}: shape", f"{got.shape}, not {value.shape}")
    largest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else np.inf
    with np.errstate(all="ignore"):
        ok = np.isinf(bound) | (np.isnan(value) & np.isnan(got)) | (value == got) | (np.abs(got - value) <= bound)
        ok |= np.isinf(got) & (np.abs(value) + bound >= largest) & (np.sign(got) == np.sign(value))  # overflow
        if ok.all():
            return
        excess = np.where(ok, 0, np.abs(got - value) / np.where(bound > 0, bound, np.finfo(float).tiny))
    kind = "inexact"
    if (np.isnan(got) & ~np.isnan(value) & ~ok).any():
        kind = "NaN"
    elif (~np.isnan(got) & np.isnan(value)).any():
        kind = "no NaN"
    elif ((value == 0) & (bound == 0) & ~ok).any():
        kind = "not exactly 0"
    at = np.unravel_index(np.argmax(np.where(ok, -1, np.nan_to_num(excess, nan=1e300, posinf=1e300))), ok.shape)
    at = tuple(int(i) for i in at)
    raise Wrong(
        f"{name}: {kind}",
        f"{(~ok).sum()} of {ok.size} wrong, at {list(at)} {got[at]:.9g}, not {value[at]:.9g} +- {bound[at]:.2g}",
    )


def check_loss(case, loss, wanted):
    compute = torch.float64 if case.matmul_dtype == torch.float64 else torch.float32
    require(loss.dtype == compute, "loss: dtype", loss.dtype)
    shape = case.target.shape if case.reduction == "none" else ()
    require(loss.shape == shape, "loss: shape", tuple(loss.shape))
    require(loss.is_contiguous(), "loss: not contiguous")
    compare("loss", loss, wanted["loss"])


def check_statistics(case, stats, wanted):
    require(isinstance(stats, LossStats), "stats: type", type(stats))
    compute = torch.float64 if case.matmul_dtype == torch.float64 else torch.float32
    dtypes = dict(log_prob=compute, lse=compute, kept=torch.bool, correct=torch.bool, valid=torch.bool)
    dtypes |= dict(n_valid=torch.int64, n_kept=torch.int64, mean_confidence=compute)
    dtypes |= dict(truncated_fraction=compute, accuracy=compute)  # whatever the default dtype
    for name, dtype in dtypes.items():
        value = getattr(stats, name)
        require(value.dtype == dtype, f"stats.{name}: dtype", value.dtype)
        require(not value.requires_grad, f"stats.{name}: requires grad")
        compare(f"stats.{name}", value, wanted[f"stats.{name}"])


def gradients_of(case, loss, needed, upstream, retain_graph):
    """The gradients that arrive at the arguments of the call."""
    if case.root is None:
        return torch.autograd.grad(loss, needed, upstream, retain_graph=retain_graph)
    # Logits that were overwritten are, to autograd, another view of their memory now.
    case.arrived.clear()
    torch.autograd.grad(loss, case.root, upstream, retain_graph=retain_graph)
    return tuple(case.arrived)


def check_gradients(case, loss, needed, wanted):
    upstream = case.upstream.to(loss.dtype)
    gradients = gradients_of(case, loss, needed, upstream, case.again)
    named = zip(NAMES[case.linear], case.leaves, strict=True)
    names = [name for name, leaf in named if leaf is not None and leaf.requires_grad]
    for name, leaf, gradient in zip(names, needed, gradients, strict=True):
        require(gradient.dtype == leaf.dtype, f"d {name}: dtype", gradient.dtype)
        require(gradient.shape == leaf.shape, f"d {name}: shape", tuple(gradient.shape))
        compare(f"d {name}", gradient, wanted[f"d {name}"])
    if not case.linear and case.backend != "reference" and case.context != "checkpoint":
        (leaf,), (gradient,) = needed, gradients
        inplace = case.options.get("inplace", False)
        if leaf.numel():
            same = gradient.data_ptr() == leaf.data_ptr()
            require(same == inplace, "inplace: whose memory", f"gradient {'in' if same else 'not in'} the logits")
        require(inplace or gradient.is_contiguous(), "d logits: not contiguous", gradient.stride())
    if case.again:
        check_second_backward(case, loss, needed, upstream, gradients)


def check_second_backward(case, loss, needed, upstream, gradients):
    """The same bits, or the documented error; the first gradients stay as they are."""
    before = [bits(gradient).clone() for gradient in gradients]
    may_refuse = not case.retains and case.backend != "reference"
    may_refuse &= case.reduction != "none" or case.options.get("inplace", False) is True
    try:
        second = gradients_of(case, loss, needed, upstream, True)
    except RuntimeError as error:
        if case.context == "checkpoint":
            return  # which has thrown away what it made again
        require(may_refuse, "second backward: refused", str(error))
        require("allow_retain_graph" in str(error), "second backward: unhelpful error", str(error))
        second = ()
    for first, was in zip(gradients, before, strict=True):
        require(torch.equal(bits(first), was), "second backward: changes the first gradient")
    for now, was in zip(second, before, strict=False):
        require(torch.equal(bits(now), was), "second backward: other bits")


def check_untouched(case, connected):
    """Memory that is not the call's to write."""
    for laid, leaf in zip(case.inputs, case.leaves, strict=True):
        if laid is None:
            continue
        memory = torch.as_strided(leaf.detach(), laid.memory.shape, (1,), 0)
        same = bits(memory).view(-1, memory.element_size()) == bits(laid.memory).view(-1, memory.element_size())
        same = same.all(1)
        if connected and case.options.get("inplace") and case.backend != "reference":
            same.as_strided(laid.size, laid.stride, laid.offset).fill_(True)
        require(same.all(), "an argument was written to" if not case.options.get("inplace") else "written outside rows")
