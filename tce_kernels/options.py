"""The options of the losses: one frozen object, which knows their defaults and what they must be.

The public functions list every option by name; below them it travels as `LogitsOptions` or `LinearOptions`, and is
unpacked once, where the operators take plain values (`Form`).
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import DTYPES, check_choice, check_constant, check_flag, check_number, check_tensor

BACKENDS = ("auto", "triton", "torch", "reference")


def _negative_or_not_finite(value) -> tuple:
    return value < 0, value == math.inf, value != value


def _not_positive_or_not_finite(value) -> tuple:
    return value == 0, *_negative_or_not_finite(value)


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

    def param(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """log(threshold) [], rounded once."""
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.detach().double()
        elif torch.compiler.is_compiling():  # as a number it would be part of the graph, which each value makes anew
            threshold = torch.full((), threshold, dtype=torch.float64, device=device)
        else:
            return torch.full((), math.log(threshold), dtype=dtype, device=device)
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

    def param(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """gamma []."""
        return torch.full((), self.gamma, dtype=dtype, device=device)


class Form(NamedTuple):
    """What the loss of one row is, in the plain values that operators take; param [] and row_scale [N] go beside it."""

    rule: str
    alpha: float
    ignore_index: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    logit_scale: float


# The same as arguments of an operator. A Scalar, unlike a float, may be symbolic in a compiled graph.
FORM_SCHEMA = (
    "str rule, Scalar alpha, int ignore_index, Scalar z_loss, Scalar label_smoothing, Scalar? softcap, "
    "Scalar logit_scale"
)


def form_of(rule, alpha, ignore_index, z_loss, label_smoothing, softcap, logit_scale) -> Form:
    """The form that an operator was called with: numbers of any kind become floats, as the kernels take them."""
    softcap = None if softcap is None else float(softcap)
    return Form(rule, float(alpha), ignore_index, float(z_loss), float(label_smoothing), softcap, float(logit_scale))


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
    return_stats: bool = False
    backend: str = "auto"

    @classmethod
    def among(cls, rule: Truncated | Focal, arguments: dict):
        """The options among the arguments of a call."""
        return cls(rule=rule, **{name: arguments[name] for name in cls.__dataclass_fields__ if name != "rule"})

    def __post_init__(self):
        """Check the options by themselves and with one another."""
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {type(self.ignore_index).__name__}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must be in the range of int64, got {self.ignore_index}")
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_choice("backend", self.backend, BACKENDS)
        check_flag("allow_retain_graph", self.allow_retain_graph)
        check_flag("return_stats", self.return_stats)
        self._check_denominator()
        check_number("label_smoothing", self.label_smoothing, "in [0, 1]", lambda x: (x < 0, x > 1, x != x))
        check_number("z_loss", self.z_loss, "a finite number >= 0", _negative_or_not_finite)
        check_number("logit_scale", self.logit_scale, "a finite number > 0", _not_positive_or_not_finite)
        if self.softcap is not None:
            check_number("softcap", self.softcap, "None or a finite number > 0", _not_positive_or_not_finite)
        for name in ("weight", "token_weight"):
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name))
                check_constant(name, getattr(self, name))
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

    def form(self) -> Form:
        rule = self.rule
        return Form(
            rule.name, rule.alpha, self.ignore_index, self.z_loss, self.label_smoothing, self.softcap, self.logit_scale
        )

    def of_reference(self) -> dict:
        """The options that say what is computed, by name; the others say how."""
        how = ("rule", "allow_retain_graph", "backend")
        of_rule = {name: getattr(self.rule, name) for name in self.rule.__dataclass_fields__}
        what = {name: getattr(self, name) for name in LossOptions.__dataclass_fields__ if name not in how}
        return {**of_rule, **what}

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

    def __post_init__(self):
        super().__post_init__()
        if self.chunk_size != "auto":
            if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int):
                raise TypeError(f"chunk_size must be 'auto' or an int, got {self.chunk_size!r}")
            if self.chunk_size < 1:
                raise ValueError(f"chunk_size must be 'auto' or at least 1, got {self.chunk_size}")
        if not isinstance(self.accumulate_dtype, torch.dtype):
            raise TypeError(f"accumulate_dtype must be a torch.dtype, got {self.accumulate_dtype!r}")
        check_choice("accumulate_dtype", self.accumulate_dtype, DTYPES)
        check_number("gradient_tolerance", self.gradient_tolerance, "in [0, 1)", lambda x: (x < 0, x >= 1, x != x))

    def chunks(self) -> Chunks:
        values = [getattr(self, name) for name in Chunks._fields]
        return Chunks(*[None if value == "auto" else value for value in values])
