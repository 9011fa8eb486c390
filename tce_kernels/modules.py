"""The losses as modules without parameters, and an lm-head that knows its loss."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .functional import linear_loss, logits_loss
from .options import Focal, LinearOptions, LogitsOptions, LossOptions, Truncated
from .ranks import all_or_none
from .stats import LossStats


def _call(loss: Callable, module: nn.Module, class_weight: Tensor | None, given: dict, *tensors):
    """The loss with the module's options, and those of a call in place of them."""

    def options():
        rule = module.rule()
        of_rule = {name: given[name] for name in rule.__dataclass_fields__ if name in given}
        others = {name: value for name, value in given.items() if name not in of_rule}
        return replace(module.options, rule=replace(rule, **of_rule), **{"weight": class_weight, **others})

    group = given.get("group", module.options.group)
    return loss(*tensors, all_or_none(group, list(tensors), loss is linear_loss, options))


class _Loss(nn.Module):
    """Holds the options of a loss. Class weights are a buffer, so that they move with the module."""

    def __init__(self, options: LossOptions):
        super().__init__()
        self.register_buffer("weight", options.weight)
        self.options = replace(options, weight=None)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [self.rule_repr(), self.options.non_default()]))


class _TruncatedLoss(_Loss):
    def __init__(self, options: LossOptions):
        super().__init__(options)
        self.threshold = options.rule.threshold

    def rule(self) -> Truncated:
        return Truncated(self.threshold)

    def rule_repr(self) -> str:
        return f"threshold={self.threshold}"


class TruncatedCrossEntropyLoss(_TruncatedLoss):
    """`truncated_cross_entropy` with its threshold and options, which are checked here.

    Args:
        threshold, **options: as in `truncated_cross_entropy`.
    """

    def __init__(self, threshold: float | Tensor = 0.9, **options):
        super().__init__(LogitsOptions(rule=Truncated(threshold), **options))

    def forward(self, logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of logits (..., V) and target (...). Options given here (token_weight, say) go before the module's."""
        return _call(logits_loss, self, self.weight, options, logits, target)


def _linear_options(threshold: float | Tensor, options: dict) -> LinearOptions:
    if "inplace" in options:
        raise TypeError("inplace is not an option of the linear loss, which never has all logits")
    return LinearOptions(rule=Truncated(threshold), **options)


class LinearTruncatedCrossEntropyLoss(_TruncatedLoss):
    """`linear_truncated_cross_entropy` with its threshold and options, which are checked here.

    Args:
        threshold, **options: as in `linear_truncated_cross_entropy`.
    """

    def __init__(self, threshold: float | Tensor = 0.9, **options):
        super().__init__(_linear_options(threshold, options))

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of input (..., D), linear_weight (V, D), target (...) and linear_bias (V,).

        Options given here (token_weight, say) go before the module's.
        """
        return _call(linear_loss, self, self.weight, options, input, linear_weight, linear_bias, target)


class FocalCrossEntropyLoss(_Loss):
    """`focal_cross_entropy` with its gamma, alpha and options, which are checked here.

    Args:
        gamma, alpha, **options: as in `focal_cross_entropy`.
    """

    def __init__(self, gamma: float = 2.0, *, alpha: float = 1.0, **options):
        super().__init__(LogitsOptions(rule=Focal(gamma, alpha), **options))
        self.gamma, self.alpha = gamma, alpha

    def forward(self, logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of logits (..., V) and target (...). Options given here (token_weight, say) go before the module's."""
        return _call(logits_loss, self, self.weight, options, logits, target)

    def rule(self) -> Focal:
        return Focal(self.gamma, self.alpha)

    def rule_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}"


class TruncatedCrossEntropyHead(nn.Linear):
    """An lm-head, `torch.nn.Linear`, whose forward also computes `linear_truncated_cross_entropy` of its logits.

    The loss of a head that is wrapped (FSDP2, DDP) belongs inside its forward, where hooks have made its parameters
    whole and wait for their gradients; read from outside, or by `full_tensor()`, they are neither. The keys in a state
    dict are those of a Linear, `weight` and `bias`.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`, but without bias by default.
        threshold, **options: as in `linear_truncated_cross_entropy`, checked here. Class weights are the attribute
            `class_weight`, which moves with the module and is not in its state dict; `threshold` may be set anew.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, threshold: float | Tensor = 0.9,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        options = _linear_options(threshold, options)
        self.register_buffer("class_weight", options.weight, persistent=False)
        self.threshold, self.options = threshold, replace(options, weight=None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> "TruncatedCrossEntropyHead":
        """A head that shares the parameters of a Linear, tied ones too. options: those of the loss, `threshold` too.

        Raises:
            TypeError: not a `torch.nn.Linear`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor, target: Tensor | None = None, **options) -> Tensor | tuple[Tensor, LossStats]:
        """Logits (..., V) of input (..., D) without a target, with target (...) the loss.

        Options given here (token_weight, say) go before the head's.
        """
        if target is None:
            if options:
                raise TypeError(f"options are those of the loss, which needs a target, got {', '.join(options)}")
            return super().forward(input)
        denominator = options.get("denominator")
        if isinstance(denominator, Tensor) and denominator.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"denominator must not be in {denominator.dtype}, which counts no tokens: pass a number or a tensor of "
                "integers, or, if FSDP2 has converted it, its MixedPrecisionPolicy with cast_forward_inputs=False"
            )
        return _call(linear_loss, self, self.class_weight, options, input, self.weight, self.bias, target)

    def rule(self) -> Truncated:
        return Truncated(self.threshold)

    def extra_repr(self) -> str:
        return ", ".join(
            filter(None, [super().extra_repr(), f"threshold={self.threshold}", self.options.non_default()])
        )
