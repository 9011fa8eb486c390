"""The options of the losses: one frozen object, which knows their defaults and what they must be.

The public functions list every option by name; below them it travels as `LogitsOptions` or `LinearOptions`, and is
unpacked once, where the operators take plain values (`Form`).
"""

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    DTYPES,
    check_choice,
    check_constant,
    check_flag,
    check_group,
    check_number,
    check_stats,
    check_tensor,
)

# The target of an ignored row where targets count from the first class of a rank, and may be negative.
IGNORED = -(2**63)

BACKENDS = ("auto", "triton", "torch", "reference")


def _negative_or_not_finite(value) -> tuple:
    return value < 0, value == math.inf, value != value


def _not_positive_or_not_finite(value) -> tuple:
    return value == 0, *_negative_or_not_finite(value)


def _to_compare(value) -> float | str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor"
    return float(value) if isinstance(value, Real) else str(value)


@dataclass(frozen=True, eq=False)
class Truncated:
    """Cross-entropy of the rows whose p is at most the threshold."""

    threshold: float | Tensor = 0.9
    name, alpha = "truncated", 1.0

    def __post_init__(self):
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            check_tensor("threshold", threshold)
            if threshold.dim() != 0:
                raise ValueError(f"threshold must be a number or a 0-d tensor, got shape {list(threshold.shape)}")
            if not threshold.is_floating_point():
                raise TypeError(f"threshold must be a floating-point tensor, got {threshold.dtype}")
            check_constant("threshold", threshold)
        else:
            check_number("threshold", threshold, "in (0, 1]", lambda x: (x <= 0, x > 1, x != x))

    def param_number(self) -> float | None:
        """log(threshold), unless `param` has it."""
        if isinstance(self.threshold, Tensor) or torch.compiler.is_compiling():
            return None
        return math.log(self.threshold)

    def param(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """log(threshold) [], rounded once, where it is a tensor."""
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.detach().double()
        elif torch.compiler.is_compiling():  # as a number it would be part of the graph, which each value makes anew
            threshold = torch.full((), threshold, dtype=torch.float64, device=device)
        else:
            return None
        return threshold.log().to(dtype)


@dataclass(frozen=True, eq=False)
class Focal:
    """alpha (1 - p)^gamma times cross-entropy."""

    gamma: float = 2.0
    alpha: float = 1.0
    name = "focal"

    def __post_init__(self):
        check_number("gamma", self.gamma, "a finite number >= 0", _negative_or_not_finite)
        check_number("alpha", self.alpha, "a finite number >= 0", _negative_or_not_finite)

    def param_number(self) -> float:
        return self.gamma

    def param(self, dtype: torch.dtype, device: torch.device) -> None:
        return None


class Form(NamedTuple):
    """What the loss of one row is, in the plain values that operators take; row_scale [N] goes beside it.

    `param_number` is log(threshold) or gamma; None where that is a tensor, param [], which goes beside as well.
    """

    rule: str
    param_number: float | None
    alpha: float
    ignore_index: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    entropy: bool = False  # in `rows`; the last argument of an operator

    def local(self) -> "Form":
        """The same for targets that count from the first class of a rank."""
        return self._replace(ignore_index=IGNORED)

    def plain(self) -> tuple:
        """As FORM_SCHEMA has it."""
        return self[:N_PLAIN]


# The same as arguments of an operator. A Scalar, unlike a float, may be symbolic in a compiled graph.
FORM_SCHEMA = (
    "str rule, Scalar? param_number, Scalar alpha, int ignore_index, Scalar z_loss, Scalar label_smoothing, "
    "Scalar? softcap, Scalar logit_scale"
)


N_PLAIN = len(Form._fields) - 1


def form_of(
    rule, param_number, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale, entropy=False
) -> Form:
    """The form that an operator was called with: numbers of any kind become floats, as the kernels take them."""
    param_number = None if param_number is None else float(param_number)
    softcap = None if softcap is None else float(softcap)
    numbers = float(z_loss), float(label_smoothing), softcap, float(logit_scale)
    return Form(rule, param_number, float(alpha), ignore_index, *numbers, entropy)


@dataclass(frozen=True, eq=False, kw_only=True)
class LossOptions:
    """What is computed, whichever way; what each option means is said in `functional.truncated_cross_entropy`."""

    rule: Truncated | Focal
    weight: Tensor | None = None
    token_weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    denominator: str | float | Tensor = "valid"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    allow_retain_graph: bool = False
    return_stats: bool | str = False
    backend: str = "auto"
    group: "torch.distributed.ProcessGroup | None" = None

    def __post_init__(self):
        """Check the options by themselves and with one another."""
        if self.group is not None:
            check_group(self.group)
            if self.backend == "reference":
                raise ValueError("backend must not be 'reference' with a group: the reference runs in one process")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {type(self.ignore_index).__name__}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must be in the range of int64, got {self.ignore_index}")
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_choice("backend", self.backend, BACKENDS)
        check_flag("allow_retain_graph", self.allow_retain_graph)
        check_stats("return_stats", self.return_stats)
        self._check_denominator()
        check_number("label_smoothing", self.label_smoothing, "in [0, 1]", lambda x: (x < 0, x > 1, x != x))
        check_number("z_loss", self.z_loss, "a finite number >= 0", _negative_or_not_finite)
        check_number("logit_scale", self.logit_scale, "a finite number > 0", _not_positive_or_not_finite)
        if self.softcap is not None:
            check_number("softcap", self.softcap, "None or a finite number > 0", _not_positive_or_not_finite)
        for name, tensor in (("weight", self.weight), ("token_weight", self.token_weight)):
            if tensor is not None:
                check_tensor(name, tensor)
                check_constant(name, tensor)
        if self.weight is not None and self.label_smoothing != 0:
            raise ValueError(f"label_smoothing must be 0 with class weights, got {self.label_smoothing}")
        if isinstance(self.rule, Focal) and self.label_smoothing != 0:
            raise ValueError(f"label_smoothing must be 0 with the focal loss, got {self.label_smoothing}")

    def _check_denominator(self):
        denominator, reduction = self.denominator, self.reduction
        if isinstance(denominator, str):
            check_choice("denominator", denominator, ("valid", "kept"))
        elif isinstance(denominator, Tensor):
            check_tensor("denominator", denominator)
            check_constant("denominator", denominator)
            if denominator.dim() != 0:
                raise ValueError(f"denominator must be a 0-d tensor, got shape {list(denominator.shape)}")
        else:
            check_number("denominator", denominator, "a finite number >= 0", _negative_or_not_finite)
        if reduction != "mean" and not (isinstance(denominator, str) and denominator == "valid"):
            raise ValueError(f"denominator must be left at 'valid' with reduction={reduction!r}, got {denominator!r}")

    @property
    def by_kept(self) -> bool:
        """Whether a mean divides by what is left, which is known only after all rows."""
        return isinstance(self.denominator, str) and self.denominator == "kept"

    @property
    def entropy(self) -> bool:
        """Whether the statistics have the entropy."""
        return self.return_stats == "entropy"

    @property
    def group_name(self) -> str | None:
        """What operators know the group by; None where there is one rank, and nothing to be told."""
        return None if self.group is None or self.group.size() == 1 else self.group.group_name

    @property
    def rows_spread(self) -> bool:
        """Whether each rank has rows of its own."""
        return False

    @property
    def is_weighted(self) -> bool:
        """Whether rows weigh anything but 0 and 1."""
        return self.weight is not None or self.token_weight is not None

    def form(self) -> Form:
        rule = self.rule
        of_rule = rule.name, rule.param_number(), rule.alpha
        numbers = self.z_loss, self.label_smoothing, self.softcap, self.logit_scale
        return Form(*of_rule, self.ignore_index, *numbers, self.entropy)

    def of_reference(self) -> dict:
        """The options that say what is computed, by name; the others say how."""
        how = ("rule", "allow_retain_graph", "backend", "group")
        of_rule = {name: getattr(self.rule, name) for name in self.rule.__dataclass_fields__}
        what = {name: getattr(self, name) for name in LossOptions.__dataclass_fields__ if name not in how}
        return {**of_rule, **what}

    def of_ranks(self) -> dict:
        """The options that must be the same on all ranks of the group, by name: numbers, and texts of the others."""
        own = ("rule", "return_stats", "inplace", "group")
        values = {**vars(self.rule), **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}}
        values["entropy in return_stats"] = self.entropy  # which ranks gather
        return {name: _to_compare(value) for name, value in values.items()}

    def checked_by_ranks(self) -> list:
        """Options that hold the same values on all ranks if they are tensors; token_weight only of the same rows."""
        return [self.token_weight, self.weight, getattr(self.rule, "threshold", None), self.denominator]

    def non_default(self) -> str:
        """As in a call, for the text of modules."""
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("rule", "weight")
        }
        defaults = {field.name: field.default for field in fields(self)}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in values.items()
            if isinstance(value, Tensor) or value != defaults[name]
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitsOptions(LossOptions):
    """Options of a loss of given logits."""

    inplace: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_flag("inplace", self.inplace)
        if self.inplace and self.allow_retain_graph:
            raise ValueError("inplace must be False with allow_retain_graph=True, which keeps the logits, got True")


class Chunks(NamedTuple):
    """What only the linear losses are told, in plain values: options of the same names, None for "auto"."""

    chunk_size: int | None
    accumulate_dtype: torch.dtype
    gradient_tolerance: float


CHUNKS_SCHEMA = "int? chunk_size, ScalarType accumulate_dtype, Scalar gradient_tolerance"


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearOptions(LossOptions):
    """Options of a loss that makes its own logits."""

    chunk_size: int | str = "auto"
    accumulate_dtype: torch.dtype = torch.float32
    gradient_tolerance: float = 0.0
    rows: str = "replicated"

    def __post_init__(self):
        super().__post_init__()
        check_choice("rows", self.rows, ("replicated", "sharded"))
        if self.chunk_size != "auto":
            if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int):
                raise TypeError(f"chunk_size must be 'auto' or an int, got {self.chunk_size!r}")
            if self.chunk_size < 1:
                raise ValueError(f"chunk_size must be 'auto' or at least 1, got {self.chunk_size}")
        if not isinstance(self.accumulate_dtype, torch.dtype):
            raise TypeError(f"accumulate_dtype must be a torch.dtype, got {self.accumulate_dtype!r}")
        check_choice("accumulate_dtype", self.accumulate_dtype, DTYPES)
        check_number("gradient_tolerance", self.gradient_tolerance, "in [0, 1)", lambda x: (x < 0, x >= 1, x != x))

    @property
    def rows_spread(self) -> bool:
        return self.group_name is not None and self.rows == "sharded"

    def chunks(self) -> Chunks:
        values = [getattr(self, name) for name in Chunks._fields]
        return Chunks(*[None if value == "auto" else value for value in values])
