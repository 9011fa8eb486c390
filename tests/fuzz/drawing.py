"""Random calls of the public losses: what is drawn for each argument, and the case that comes of it."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.fuzz.expected import array
from tests.fuzz.layouts import LAYOUTS, lay
from tests.fuzz.refusals import make_mistake, refusal
from tests.fuzz.values import CLASSES, Draw, draw_head, draw_logits, draw_shape

LOSSES = ("truncated", "focal", "linear_truncated", "linear_focal")
BACKENDS = ("torch", "reference", "triton")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass
class Case:
    """One call: what is drawn, and, once it runs, the tensors that were given (`leaves`)."""

    rule: str
    linear: bool
    backend: str
    dtype: torch.dtype
    matmul_dtype: torch.dtype
    as_module: bool
    target: torch.Tensor
    options: dict
    inputs: list  # Laid: logits, or input, linear_weight and linear_bias, which may be None
    needs: list
    upstream: torch.Tensor | None = None
    threshold: object = None
    gamma: object = None
    alpha: object = None
    context: str = "plain"
    autocast: torch.dtype | None = None
    figures: tuple = (2, 2**18)
    block_logits: int = 2**21
    default_dtype: torch.dtype = F32
    again: bool = False  # differentiate twice
    refused: tuple = ()  # exceptions of which one must be raised
    why: str = ""
    on_leaf: bool = False  # with `inplace`: logits that require grad themselves, or a view of such a tensor
    leaves: list = field(default_factory=list)
    root: torch.Tensor | None = None  # of `inplace`: what the logits that may be overwritten were made from
    arrived: list = field(default_factory=list)  # and the gradients that came to them

    @property
    def logits(self):
        return self.inputs[0].tensor

    def matmul_inputs(self):
        """Input [N, D], weight and bias as the matmul gets them."""
        x, W, b = (None if laid is None else array(laid.tensor.to(self.matmul_dtype)) for laid in self.inputs)
        return x.reshape(self.target.numel(), W.shape[1]), W, b

    @property
    def reduction(self):
        return self.options.get("reduction", "mean")

    @property
    def retains(self):
        return self.options.get("allow_retain_graph", False)

    @property
    def in_forward(self):
        """Whether a linear loss makes its gradients before it knows the upstream gradient."""
        return self.linear and self.reduction != "none" and not self.retains and self.backend != "reference"

    @property
    def n_chunks(self):
        size = self.options.get("chunk_size", "auto")
        return 1 if size == "auto" or self.backend == "reference" else math.ceil(self.target.numel() / size) + 1


THRESHOLD = [
    (0.9, 3), (1.0, 3), (1, 0.5), (0.5, 2), (lambda d: d.uniform(0.01, 1), 4), (1e-30, 0.3), (1e-3, 1),
    (lambda d: torch.tensor(d.choice([0.9, 0.3, 1.0]), dtype=d.choice([F32, F64, BF16])), 2),
]  # fmt: skip
GAMMA = [(0, 1), (0.3, 1), (1, 1), (2.0, 3), (5, 1), (lambda d: d.uniform(0, 4), 1)]
ALPHA = [(1.0, 5), (0.25, 2), (0, 0.5), (3, 1)]
DENOMINATOR = [
    ("valid", 5), ("kept", 3), (31, 1), (0, 0.5), (2.5, 1), (2**17, 0.5), (1, 1),
    (lambda d: torch.tensor(d.choice([0, 17, 3]), dtype=d.choice([torch.int64, torch.int32])), 1.5),
    (lambda d: torch.tensor(d.choice([0.0, 17.0, 0.5]), dtype=d.choice([F32, F64, BF16])), 1.5),
]  # fmt: skip
OPTIONS = {  # name: (share of calls that give it, values)
    "ignore_index": (0.4, [(lambda d: d.randint(0, 3), 2), (-1, 2), (2**40, 1), (-100, 1)]),
    "reduction": (0.7, {"mean": 2, "sum": 2, "none": 3}),
    "label_smoothing": (0.2, [(0.1, 3), (lambda d: d.uniform(0, 1), 2), (1, 1), (0.0, 1)]),
    "z_loss": (0.25, {1e-4: 2, 1e-2: 2, 1: 1, 0.0: 1}),
    "softcap": (0.2, [(30.0, 2), (5, 2), (0.5, 1), (1e4, 1), (1e8, 1), (None, 1)]),
    "logit_scale": (0.2, [(0.5, 2), (1.3, 2), (4, 1), (lambda d: d.uniform(0.05, 3), 2)]),
    "allow_retain_graph": (0.2, {True: 4, False: 1}),
    "return_stats": (0.6, {True: 6, False: 1}),
    "inplace": (0.25, {True: 4, False: 1}),
    "chunk_size": (0.6, [(lambda d: d.randint(1, 8), 3), (lambda d: d.randint(1, 45), 2), ("auto", 1)]),
    "accumulate_dtype": (0.2, {F32: 1, F64: 1, BF16: 1, F16: 1}),
}
GRID = np.arange(-8, 17) / 8


def draw_weight(draw, n, signed):
    """Weights on a grid, so that sums of them are exact where they cancel; or any positive ones."""
    kind = draw.weighted({"grid": 4, "positive": 2, "zeros": 0.3, "int": 0.7})
    if kind == "zeros":
        return torch.zeros(n)
    if kind == "int":
        return torch.from_numpy(draw.arrays.integers(-1 if signed else 0, 3, n))
    if kind == "positive":
        return torch.from_numpy(draw.arrays.random(n) * 2).to(draw.choice([F32, F32, F64]))
    values = draw.arrays.choice(GRID if signed and draw.chance(0.4) else GRID[8:], n)
    return torch.from_numpy(values).to(draw.choice([F32, F32, F64, BF16, F16]))


def draw_options(draw, linear, V, rule):
    options = {}
    for name, (share, table) in OPTIONS.items():
        if linear and name == "inplace" or not linear and name in ("chunk_size", "accumulate_dtype"):
            continue
        if draw.chance(share):
            options[name] = draw.weighted(table)
    if draw.chance(0.2):
        options["weight"] = lay(draw_weight(draw, V, False), draw, draw.choice(["contiguous", "every second"])).tensor
    if draw.chance(0.5):
        options["denominator"] = draw.weighted(DENOMINATOR)
    if draw.chance(0.97):  # mostly what goes together; the rest is refused
        if rule == "focal" or options.get("weight") is not None:
            options.pop("label_smoothing", None)
        if options.get("inplace"):
            options.pop("allow_retain_graph", None)
        if options.get("reduction", "mean") != "mean":
            options.pop("denominator", None)
    return options


def draw_target(draw, shape, V, ignore_index):
    n = math.prod(shape)
    dtype = draw.choice([torch.int64, torch.int64, torch.int32])
    target = draw.arrays.integers(0, V, n)
    ignored = draw.arrays.random(n) < draw.weighted({0: 2, 0.25: 4, 0.8: 0.5, 1: 0.4})
    if dtype == torch.int64 or abs(ignore_index) < 2**31:
        target[ignored] = ignore_index
    return torch.from_numpy(target).view(shape).to(dtype)


def draw_upstream(draw, reduction, shape, dtype):
    if reduction == "none":
        values = draw.arrays.standard_normal(shape)
        kind = draw.weighted({"any": 3, "zeros": 2, "powers": 1})
        if kind == "powers":
            values = 2.0 ** np.round(values * 3)
        if kind == "zeros":
            values = values * (draw.arrays.random(shape) < 0.5)
        return torch.as_tensor(values, dtype=dtype)
    table = [(1.0, 4), (0.0, 0.5), (-1.0, 1), (0.25, 1), (-8.0, 0.5), (65536.0, 0.3), (lambda d: d.gauss(0, 2), 4)]
    return torch.tensor(float(draw.weighted(table)), dtype=dtype)


def reads_past(size):
    """Whether PyTorch's bfloat16 matmul on CPUs with AMX reads past rows of this size, which are summed over.

    It multiplies by 0 what it reads there, so that NaN in the next row, or in padding, spoils a row of the result.
    """
    return size % 2 or size > 32 and size % 32


def draw_case(seed, number, loss, backend) -> Case:
    """The case of this number: the same again for the same four arguments."""
    draw = Draw(f"{seed} {number} {loss} {backend}")
    linear, rule = loss.startswith("linear"), loss.removeprefix("linear_")
    triton = backend == "triton"
    dtype = draw.weighted({F32: 5, BF16: 3, F16: 2, F64: 0.02 if triton else 1.5})
    shape, V = draw_shape(draw, triton), draw.weighted(CLASSES)
    D = draw.choice([1, 2, 3, 7, 8, 16, 24])
    autocast = draw.choice([BF16, F16]) if linear and draw.chance(0.12) else None
    matmul_dtype = autocast if autocast and dtype != F64 else dtype  # which float64 keeps
    spoils = linear and matmul_dtype == BF16 and (reads_past(D) or reads_past(V))
    if spoils and triton:  # whose buffers have padding too
        D, V, spoils = D + D % 2, V + -V % (32 if V > 32 else 2), False
    options = draw_options(draw, linear, V, rule)
    ignore_index = options.get("ignore_index", -100)
    if 0 <= ignore_index < 2**31:
        options["ignore_index"] = ignore_index = min(ignore_index, V - 1)
    target = draw_target(draw, shape, V, ignore_index)
    n = target.numel()
    ignored = target.numpy().reshape(-1).astype(np.int64) == ignore_index
    dead = ignored.copy()
    if draw.chance(0.35):
        token_weight = draw_weight(draw, n, True)
        dead |= (token_weight == 0).numpy()
        if token_weight.is_floating_point() and draw.chance(0.5):
            token_weight[torch.from_numpy(ignored)] = math.nan
        kind = draw.choice(["contiguous", "sliced", "every second"])
        options["token_weight"] = lay(token_weight.view(shape), draw, kind).tensor
    flat_target = target.numpy().reshape(-1)
    if options.get("weight") is not None and n:
        dead |= (options["weight"][torch.from_numpy(np.clip(flat_target, 0, V - 1)).long()] == 0).numpy()
    dead &= draw.chance(0.5) and not spoils
    hostile = draw.chance(0.12) and not spoils
    target = lay(target, draw, draw.choice(["contiguous", "contiguous", "sliced", "transposed", "every second"])).tensor

    threshold = draw.weighted(THRESHOLD) if rule == "truncated" else None
    near = None if rule == "focal" or threshold == 1 else float(threshold)
    if linear:
        bias = draw.chance(0.6)
        tensors = draw_head(draw, flat_target, dead, V, D, hostile, bias)
        dtypes = [dtype] * 3
        if autocast and dtype == F64:
            dtypes[1] = draw.choice([F64, F64, F32])  # refused
        elif autocast:  # numbers that its dtype holds, so that a processor without such matmuls gives the same
            tensors = [t if t is None else array(torch.from_numpy(t).to(BF16).to(autocast)) for t in tensors]
            dtypes = [draw.choice([dtype, F32, BF16]) for _ in range(3)]
        shapes = [(*shape, D), (V, D), (V,)]
        kinds = [
            ["contiguous", "contiguous", "padded", "sliced", "features apart", "expanded", "unaligned", "overlapping"],
            ["contiguous", "contiguous", "features apart", "padded", "unaligned"],
            ["contiguous", "every second"],
        ]
        inputs = [
            t if t is None else lay(torch.from_numpy(t).view(size).to(of), draw, draw.choice(kind), spoils)
            for t, size, of, kind in zip(tensors, shapes, dtypes, kinds, strict=True)
        ]
        needs = [draw.chance(0.75) and laid is not None for laid in inputs]
    else:
        logits = torch.from_numpy(draw_logits(draw, flat_target, dead, V, hostile, near)).view(*shape, V)
        inputs = [lay(logits.to(dtype), draw, draw.weighted(LAYOUTS))]
        needs = [draw.chance(0.93)]

    case = Case(
        rule, linear, backend, dtype, matmul_dtype, draw.chance(0.3) and loss != "linear_focal", target, options,
        inputs, needs,
        figures=draw.choice([(2, 2**18), (64, 2**30), (16, 2**12), (1, 2**11), (132, 2**25)]),
        block_logits=draw.choice([16, 256, 1024, 2**21]),
        default_dtype=draw.weighted({F32: 30, F64: 1, BF16: 1}),
        context=draw.weighted({"plain": 10, "no_grad": 1, "checkpoint": 1, "hooks": 1}),
        threshold=threshold, autocast=autocast, again=draw.chance(0.4),
    )  # fmt: skip
    if rule == "focal":
        case.gamma, case.alpha = draw.weighted(GAMMA), draw.weighted(ALPHA)
        if not inputs[0].tensor.isfinite().all():
            case.alpha = case.alpha or 1  # whether 0 * NaN is 0 there is left open
    if options.get("inplace") and case.inputs[0].kind not in ("contiguous", "unaligned"):
        case.context = case.context.replace("checkpoint", "plain")  # which works on a copy, laid out otherwise
    compute = F64 if case.matmul_dtype == F64 else F32
    case.upstream = draw_upstream(draw, case.reduction, shape, compute)
    case.why, case.refused = refusal(case)
    if not case.refused and draw.chance(0.04):
        make_mistake(case, draw)
    elif not case.refused and options.get("inplace") and needs[0] and n and backend != "reference":
        if case.context != "no_grad" and draw.chance(0.08):
            case.context, case.on_leaf = "plain", True
            case.why, case.refused = "inplace on a tensor that autograd has to leave alone", (ValueError, RuntimeError)
    return case
