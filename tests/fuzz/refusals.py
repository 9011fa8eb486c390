"""Which drawn calls must be refused, and arguments that must be, by their documentation."""

import math

import torch

from tests.fuzz.layouts import rows_overlap, two_strides_describe


def refusal(case):
    """Why a drawn call must be refused and with what, by its documentation."""
    options = case.options
    if options.get("label_smoothing") and (case.rule == "focal" or options.get("weight") is not None):
        return "label smoothing with focal or with class weights", (ValueError,)
    if options.get("inplace") and options.get("allow_retain_graph"):
        return "inplace with allow_retain_graph", (ValueError,)
    denominator = options.get("denominator", "valid")
    if case.reduction != "mean" and not (isinstance(denominator, str) and denominator == "valid"):
        return "denominator without a mean", (ValueError,)
    if case.backend == "triton" and torch.float64 in [laid.memory.dtype for laid in case.inputs if laid is not None]:
        return "float64 on triton", (TypeError,)
    if case.linear:
        dtypes = {laid.memory.dtype for laid in case.inputs if laid is not None}
        if len(dtypes) > 1 and (not case.autocast or torch.float64 in dtypes):
            return "dtypes of the head that differ", (TypeError,)
    elif case.backend != "reference":
        if not two_strides_describe(case.inputs[0]):
            return "a layout that two strides do not describe", (ValueError,)
        if options.get("inplace") and 0 not in case.inputs[0].size and rows_overlap(case.inputs[0]):
            return "inplace over rows that share memory", (ValueError,)
    return "", ()


def _target(target, draw):
    target[tuple(draw.randrange(size) for size in target.shape)] = draw.choice([-7, 10**6])


MISTAKES = [  # what is wrong, name of the option, values
    ("threshold", [0, -0.5, 1.5, math.nan, "high", True, None, torch.tensor([0.5]), torch.tensor(1)]),
    ("gamma", [-1, math.nan, math.inf, "2", None, torch.tensor(2.0)]),
    ("alpha", [-1, math.nan, math.inf, "1", None]),
    ("reduction", ["avg", None, 3]),
    ("denominator", [-1, math.nan, math.inf, "all", None, torch.tensor([3.0]), torch.tensor(3.0, requires_grad=True)]),
    ("label_smoothing", [-0.1, 1.1, math.nan, "some", None, True]),
    ("z_loss", [-1e-3, math.inf, math.nan, None, "1"]),
    ("softcap", [0, -3, math.inf, math.nan, "30"]),
    ("logit_scale", [0, -1, math.inf, math.nan, None]),
    ("ignore_index", [1.5, None, True]),
    ("return_stats", [1, None]),
    ("allow_retain_graph", [1, None]),
    ("inplace", [1, None]),
    ("backend", ["cuda", None]),
    ("chunk_size", [0, -3, 2.5, None, True, "all"]),
    ("accumulate_dtype", [torch.int32, "float32", None]),
    ("weight", [torch.ones(3000), torch.ones(1, 1), [1.0], torch.ones(2, dtype=torch.complex64)]),
    ("token_weight", [torch.ones(7, 7, 7), 1.0]),
    ("target", [None, "dtype", "shape", "value"]),
]


def make_mistake(case, draw):
    """Spoil one argument of a call that is right."""
    names = {"threshold"} if case.rule == "truncated" else {"gamma", "alpha"}
    unknown = {"inplace"} if case.linear else {"chunk_size", "accumulate_dtype"}
    others = {"threshold", "gamma", "alpha"} - names
    name, values = draw.choice([row for row in MISTAKES if row[0] not in unknown | others])
    value = draw.choice(values)
    case.why, case.refused = f"{name}={value!r}", (TypeError, ValueError)
    if name in ("threshold", "gamma", "alpha"):
        setattr(case, name, value)
    elif name == "backend":
        case.backend = value
    elif name != "target":
        case.options[name] = value
    elif value == "dtype":
        case.target = case.target.to(draw.choice([torch.int16, torch.float32, torch.bool]))
    elif value == "shape":
        case.target = case.target[None].expand(2, *case.target.shape)
    elif value is None:
        case.target = None
    elif case.target.numel() and case.backend != "triton":
        case.target = case.target.clone()
        _target(case.target, draw)
        case.refused = (IndexError,)
    else:
        case.why, case.refused = "", ()
