"""Random calls of the public losses: a table of strategies for each kind of argument, and how tensors lie in memory."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from tests.expected import array

LOSSES = ("truncated", "focal", "linear_truncated", "linear_focal")
BACKENDS = ("torch", "reference", "triton")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
POISON = -7777  # of integer memory that is not part of a tensor; floating-point memory holds NaN there


@dataclass
class Laid:
    """A tensor and the memory around it."""

    memory: torch.Tensor
    size: tuple
    stride: tuple
    offset: int
    kind: str

    @property
    def tensor(self):
        return self.memory.as_strided(self.size, self.stride, self.offset)


@dataclass
class Case:
    """One call: what is drawn, and, once it runs, the tensors that were given (`leaves`)."""

    rule: str
    linear: bool
    backend: str
    dtype: torch.dtype
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

    @property
    def matmul_dtype(self):
        return self.autocast if self.autocast and self.dtype != F64 else self.inputs[0].memory.dtype

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


class Draw(random.Random):
    """Random choices, and numpy's arrays from the same seed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.arrays = np.random.default_rng(self.getrandbits(64))

    def chance(self, share):
        return self.random() < share

    def weighted(self, table):
        """A value of {value: weight} or [(value, weight)]; what can be called is called with this object."""
        values, weights = zip(*(table.items() if isinstance(table, dict) else table), strict=True)
        (value,) = self.choices(values, weights)
        return value(self) if callable(value) else value


# Memory ---------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": 8, "unaligned": 3, "padded": 3, "sliced": 3, "transposed": 2, "expanded": 1, "odd size 1": 1,
    "three strides": 0.5, "classes apart": 0.3,
}  # fmt: skip


def lay(values, draw, kind, poison=None):
    """Put a contiguous tensor into memory of its own as `kind` says, as far as its shape allows."""
    shape = list(values.shape)
    n = len(shape)
    order, pads, step, offset = list(range(n)), [0] * n, 1, 0
    expanded = None
    if kind == "unaligned":
        offset = draw.randint(1, 7)
    elif kind == "padded" and n > 1:
        pads[-1] = draw.choice([1, 3, 8, 16])
    elif kind == "sliced" and n > 1:
        pads[-2] = draw.randint(1, 2)
    elif kind == "transposed" and n > 2:
        order[0], order[1] = 1, 0
        pads[0] = draw.choice([0, 1])
    elif kind == "features apart" and n > 1:
        draw.shuffle(order)
    elif kind == "three strides":
        pads = [draw.randint(0, 2) for _ in shape]
    elif kind == "classes apart" and n:
        step = 2
    elif kind == "expanded" and n > 1:
        expanded = draw.randrange(n - 1)
        if shape[expanded]:
            values = values.narrow(expanded, 0, 1)
    elif kind == "every second" and n:
        step = 2
    stride, running = [0] * n, step
    for dim in reversed(order):
        stride[dim] = running if dim != expanded else 0
        if dim != expanded:
            running *= max(shape[dim] + pads[dim], 1)
    if kind == "odd size 1":
        stride = [draw.choice([1, 7, 10**6]) if size == 1 else by for size, by in zip(shape, stride, strict=True)]
    if kind == "expanded" and 0 in shape and draw.chance(0.5):
        stride = [0] * n  # as numpy leaves them where there is nothing to step over
    extent = offset + sum((size - 1) * by for size, by in zip(shape, stride, strict=True) if size > 1) + 1
    extent += draw.randint(0, 5)
    if poison is None:
        poison = math.nan if values.is_floating_point() else POISON
    memory = torch.full((extent if 0 not in shape else offset + 1,), poison, dtype=values.dtype)
    if values.numel():
        memory.as_strided(values.shape, stride, offset).copy_(values)
    return Laid(memory, tuple(shape), tuple(stride), offset, kind)


def two_strides_describe(laid):
    """Whether the rows of logits (..., V) are [outer, inner] with one stride each, and their classes adjacent."""
    *shape, V = laid.size
    if 0 in shape:
        return True
    if V > 1 and laid.stride[-1] != 1:
        return False
    at = sum((np.indices(shape)[i] * by for i, by in enumerate(laid.stride[:-1])), np.zeros(shape, int)).reshape(-1)
    n, index = len(at), np.arange(len(at))
    for inner in (size for size in range(1, n + 1) if n % size == 0):
        by_inner = at[1] - at[0] if inner > 1 else 0
        by_outer = at[inner] - at[0] if inner < n else 0
        if (at - at[0] == index // inner * by_outer + index % inner * by_inner).all():
            return True
    return False


def rows_overlap(laid):
    at = torch.arange(len(laid.memory)).as_strided(laid.size, laid.stride, laid.offset)
    return at.unique().numel() < at.numel()


# Sizes and values -----------------------------------------------------------------------------------------------------


def draw_shape(draw, small):
    """Leading dimensions (...) of at most 40 rows, 6 where they are to be few."""
    most = 6 if small else 40
    dims = draw.weighted({0: 1, 1: 5, 2: 5, 3: 2, 4: 1})
    if dims == 1:
        return (draw.randint(0, most) if draw.chance(0.95) else 0,)
    shape, left = [], most
    for _ in range(dims):
        size = draw.weighted({0: 0.15, 1: 2, 2: 3, 3: 2, 4: 1, 5: 1, 7: 0.5, 13: 0.3})
        size = min(size, max(left, 1))
        left //= max(size, 1)
        shape.append(size)
    return tuple(draw.sample(shape, len(shape)))


CLASSES = [
    (1, 0.5), (2, 1), (3, 1), (lambda d: d.randint(4, 40), 6), (lambda d: d.randint(41, 200), 4),
    (64, 0.5), (128, 0.5), (256, 0.3), (lambda d: d.randint(201, 700), 2),
]  # fmt: skip


def pick_other(draw, V, t):
    return (t + draw.randint(1, V - 1)) % V if V > 1 else t


# What a row of logits may look like: changes row [V], whose target is t, in place.
def _shifted(low, high):
    def change(row, t, draw):
        row[t] = np.max(row) + draw.uniform(low, high)

    return change


def _set(value, at="some"):
    def change(row, t, draw):
        if at == "all":
            row[:] = value
        elif at == "target":
            row[t] = value
        elif at == "tail":
            row[draw.randint(0, len(row)) :] = value
            row[t] = draw.uniform(-3, 3)
        else:
            where = draw.arrays.random(len(row)) < draw.choice([0.02, 0.3, 0.9])
            where[t] = False
            row[where] = value

    return change


def _huge(row, t, draw):
    row[draw.randrange(len(row))] = draw.choice([1e30, -1e30])
    if draw.chance(0.5):
        row[t] = draw.choice([1e30, -1e30])


def _near_target(row, t, draw):
    row[:] = np.round(row)
    row[t] = row[pick_other(draw, len(row), t)]


def _offset(row, t, draw):
    row += draw.choice([1e4, -1e4, 1e2, 2.0**20])


ORDINARY = [
    (None, 6), (_shifted(0, 3), 4), (_shifted(3, 12), 3), (_shifted(12, 45), 1), (_shifted(-60, -5), 1),
    (_shifted(-103, -88), 0.5), (_shifted(-1e4, -1e3), 0.2), (_near_target, 0.5), (_offset, 0.3),
    (_set(0.7, "all"), 0.3), (_set(-math.inf), 0.6), (_set(-1e30), 0.3), (_set(-math.inf, "tail"), 0.6),
    (_set(1e-41, "all"), 0.1),
]  # fmt: skip
HOSTILE = [
    (_set(math.nan, "target"), 1), (_set(math.nan), 1), (_set(math.inf), 1), (_set(math.inf, "target"), 1),
    (_set(-math.inf, "all"), 1), (_set(-math.inf, "target"), 2), (_huge, 2), (_set(1e30, "all"), 1), (None, 3),
]  # fmt: skip
DEAD = [(_set(math.nan, "all"), 1), (_set(math.inf), 1), (_set(-math.inf, "all"), 1), (_set(math.nan), 1), (None, 3)]


def draw_logits(draw, target, dead, V, hostile):
    rows = draw.arrays.standard_normal((len(target), V)) * draw.choice([0.1, 1, 2, 4])
    for row, t, is_dead in zip(rows, target, dead, strict=True):
        t = t if 0 <= t < V else 0
        table = DEAD if is_dead else HOSTILE if hostile and draw.chance(0.4) else ORDINARY
        (change,) = draw.choices(*zip(*table, strict=True))
        if change is not None:
            change(row, t, draw)
    return rows


def draw_head(draw, target, dead, V, D, hostile, bias):
    """Input [N, D], weight [V, D] and bias [V]; some rows point at their target's weight or away from it.

    In some, logits are multiples of 1/4 below 64, which 16 bits hold: then only gradients are rounded.
    """
    exact = draw.chance(0.4)
    W = draw.arrays.standard_normal((V, D)) / math.sqrt(D) * draw.choice([0.3, 1, 2])
    x = draw.arrays.standard_normal((len(target), D))
    b = draw.arrays.standard_normal(V) * 0.3
    if exact:
        W, x, b = draw.arrays.integers(-4, 5, W.shape) / 4, np.round(x).clip(-2, 2), np.round(b * 8) / 4
    if bias and V > 2 and draw.chance(0.15):
        masked = draw.arrays.random(V) < 0.4
        masked[np.clip(target, 0, V - 1)] = False
        b[masked] = -math.inf
    for n, t in enumerate(target):
        towards = W[t if 0 <= t < V else 0]
        by = draw.choice([0, 0, 2, 6, 12, -6])
        if not exact:
            x[n] += towards / max((towards**2).sum(), 0.1) * by
        elif by:
            x[n] = np.sign(towards) * np.sign(by) * draw.choice([1, 2])
        if dead[n] or (hostile and draw.chance(0.2)):
            x[n, draw.randrange(D)] = draw.choice([math.nan, math.inf, 1.0])
            if draw.chance(0.3):
                x[n] = math.nan if dead[n] else 0
    return x, W, b if bias else None


# Options --------------------------------------------------------------------------------------------------------------

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
    autocast = draw.choice([BF16, F16]) if linear and draw.chance(0.12) and dtype != F64 else None
    spoils = linear and BF16 in (autocast or dtype,) and (reads_past(D) or reads_past(V))
    if spoils and triton:  # whose buffers have padding too
        D, V, spoils = D + D % 2, V + -V % (32 if V > 32 else 2), False
    options = draw_options(draw, linear, V, rule)
    ignore_index = options.get("ignore_index", -100)
    if 0 <= ignore_index < 2**31:
        options["ignore_index"] = ignore_index = min(ignore_index, V - 1)
    target = draw_target(draw, shape, V, ignore_index)
    n = target.numel()
    ignored = (target != ignore_index).logical_not().numpy().reshape(-1) if abs(ignore_index) < 2**31 else (
        (target.long() == ignore_index).numpy().reshape(-1)
    )  # fmt: skip
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

    if linear:
        bias = draw.chance(0.6)
        tensors = draw_head(draw, flat_target, dead, V, D, hostile, bias)
        dtypes = [dtype] * 3
        if autocast:  # numbers that its dtype holds, so that a processor without such matmuls gives the same
            tensors = [t if t is None else array(torch.from_numpy(t).to(BF16).to(autocast)) for t in tensors]
            dtypes = [draw.choice([dtype, F32, BF16]) for _ in range(3)]
        shapes = [(*shape, D), (V, D), (V,)]
        kinds = [
            ["contiguous", "contiguous", "padded", "sliced", "features apart", "expanded", "unaligned"],
            ["contiguous", "contiguous", "features apart", "padded", "unaligned"],
            ["contiguous", "every second"],
        ]
        inputs = [
            None
            if t is None
            else lay(torch.from_numpy(t).view(size).to(of), draw, draw.choice(kind), 0 if spoils else None)
            for t, size, of, kind in zip(tensors, shapes, dtypes, kinds, strict=True)
        ]
        needs = [draw.chance(0.75) and laid is not None for laid in inputs]
    else:
        logits = torch.from_numpy(draw_logits(draw, flat_target, dead, V, hostile)).view(*shape, V)
        inputs = [lay(logits.to(dtype), draw, draw.weighted(LAYOUTS))]
        needs = [draw.chance(0.93)]

    case = Case(
        rule, linear, backend, dtype, draw.chance(0.3) and loss != "linear_focal", target, options, inputs, needs,
        figures=draw.choice([(2, 2**18), (64, 2**30), (16, 2**12), (1, 2**11), (132, 2**25)]),
        block_logits=draw.choice([16, 256, 1024, 2**21]),
        default_dtype=draw.weighted({F32: 30, F64: 1, BF16: 1}),
        context=draw.weighted({"plain": 10, "no_grad": 1, "checkpoint": 1, "hooks": 1}),
        autocast=autocast, again=draw.chance(0.4),
    )  # fmt: skip
    if rule == "truncated":
        case.threshold = draw.weighted(THRESHOLD)
    else:
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


# What is refused ------------------------------------------------------------------------------------------------------


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
    if case.backend == "triton" and F64 in [laid.memory.dtype for laid in case.inputs if laid is not None]:
        return "float64 on triton", (TypeError,)
    if case.linear:
        dtypes = {laid.memory.dtype for laid in case.inputs if laid is not None}
        if len(dtypes) > 1 and not case.autocast:
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
