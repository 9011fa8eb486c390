"""The losses as modules without parameters."""

from torch import Tensor, nn

from . import checks
from .functional import focal_cross_entropy, linear_truncated_cross_entropy, truncated_cross_entropy
from .stats import LossStats


class _Loss(nn.Module):
    """Holds the options of a loss. Class weights are a buffer, so that they move with the module."""

    def __init__(self, options: dict):
        super().__init__()
        checks.check_options(**options)
        self.register_buffer("weight", options.pop("weight", None))
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class TruncatedCrossEntropyLoss(_Loss):
    """`truncated_cross_entropy` with its threshold and options, which are checked here.

    Args:
        threshold, **options: as in `truncated_cross_entropy`.
    """

    def __init__(self, threshold: float | Tensor = 0.9, **options):
        checks.check_threshold(threshold)
        super().__init__(options)
        self.threshold = threshold

    def forward(self, logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of logits (..., V) and target (...). Options given here (token_weight, say) go before the module's."""
        options = {"weight": self.weight, **self.options, **options}
        return truncated_cross_entropy(logits, target, self.threshold, **options)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"threshold={self.threshold}", super().extra_repr()]))


class LinearTruncatedCrossEntropyLoss(_Loss):
    """`linear_truncated_cross_entropy` with its threshold and options, which are checked here.

    Args:
        threshold, **options: as in `linear_truncated_cross_entropy`.
    """

    def __init__(self, threshold: float | Tensor = 0.9, **options):
        checks.check_threshold(threshold)
        if "inplace" in options:
            raise TypeError("inplace is not an option of the linear loss, which never has all logits")
        of_chunks = {name: options.pop(name) for name in ("chunk_size", "accumulate_dtype") if name in options}
        checks.check_chunks(**of_chunks)
        super().__init__(options)
        self.options |= of_chunks
        self.threshold = threshold

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of input (..., D), linear_weight (V, D), target (...) and linear_bias (V,).

        Options given here (token_weight, say) go before the module's.
        """
        options = {"weight": self.weight, **self.options, **options}
        return linear_truncated_cross_entropy(
            input, linear_weight, target, self.threshold, linear_bias=linear_bias, **options
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"threshold={self.threshold}", super().extra_repr()]))


class FocalCrossEntropyLoss(_Loss):
    """`focal_cross_entropy` with its gamma, alpha and options, which are checked here.

    Args:
        gamma, alpha, **options: as in `focal_cross_entropy`.
    """

    def __init__(self, gamma: float = 2.0, *, alpha: float = 1.0, **options):
        checks.check_focal(gamma, alpha, options.get("label_smoothing", 0.0))
        super().__init__(options)
        self.gamma, self.alpha = gamma, alpha

    def forward(self, logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of logits (..., V) and target (...). Options given here (token_weight, say) go before the module's."""
        options = {"weight": self.weight, **self.options, **options}
        return focal_cross_entropy(logits, target, self.gamma, alpha=self.alpha, **options)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"gamma={self.gamma}, alpha={self.alpha}", super().extra_repr()]))
