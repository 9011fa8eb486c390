"""The losses as modules without parameters."""

from dataclasses import replace

from torch import Tensor, nn

from .functional import linear_loss, logits_loss
from .options import Focal, LinearOptions, LogitsOptions, LossOptions, Truncated
from .stats import LossStats


class _Loss(nn.Module):
    """Holds the options of a loss. Class weights are a buffer, so that they move with the module."""

    def __init__(self, options: LossOptions):
        super().__init__()
        self.register_buffer("weight", options.weight)
        self.options = replace(options, weight=None)

    def _options(self, rule, options: dict) -> LossOptions:
        """The module's options, with those of a call in place of them."""
        return replace(self.options, rule=rule, **{"weight": self.weight, **options})

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [self.rule_repr(), self.options.non_default()]))


class _TruncatedLoss(_Loss):
    def __init__(self, options: LossOptions):
        super().__init__(options)
        self.threshold = options.rule.threshold

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
        return logits_loss(logits, target, self._options(Truncated(self.threshold), options))


class LinearTruncatedCrossEntropyLoss(_TruncatedLoss):
    """`linear_truncated_cross_entropy` with its threshold and options, which are checked here.

    Args:
        threshold, **options: as in `linear_truncated_cross_entropy`.
    """

    def __init__(self, threshold: float | Tensor = 0.9, **options):
        if "inplace" in options:
            raise TypeError("inplace is not an option of the linear loss, which never has all logits")
        super().__init__(LinearOptions(rule=Truncated(threshold), **options))

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of input (..., D), linear_weight (V, D), target (...) and linear_bias (V,).

        Options given here (token_weight, say) go before the module's.
        """
        options = self._options(Truncated(self.threshold), options)
        return linear_loss(input, linear_weight, linear_bias, target, options)


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
        return logits_loss(logits, target, self._options(Focal(self.gamma, self.alpha), options))

    def rule_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}"
