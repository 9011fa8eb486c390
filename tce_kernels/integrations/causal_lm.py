"""Language models of transformers with a loss of this package: one line, whatever trains them."""

import inspect
import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from tce_kernels import (
    focal_cross_entropy,
    linear_focal_cross_entropy,
    linear_truncated_cross_entropy,
    truncated_cross_entropy,
)

from .lazy import LazyHead, LazyLogits, Recipe
from .observed import Observed

RULES = {
    "truncated": (truncated_cross_entropy, linear_truncated_cross_entropy),
    "focal": (focal_cross_entropy, linear_focal_cross_entropy),
}
OF_THE_MODEL = {
    "softcap", "logit_scale", "linear_bias", "ignore_index", "reduction", "denominator", "token_weight", "inplace",
    "group", "rows",
}  # fmt: skip
ONLY_LINEAR = {"chunk_size", "accumulate_dtype", "gradient_tolerance"}
BYPASSED = (
    "logits of a model in training are made, and its loss has not been called: whoever computes the loss does it "
    "without truncation. Likely causes: Trainer's label_smoothing_factor (give label_smoothing to truncate), its "
    "compute_loss_func or use_liger_kernel, a trainer with a loss of its own"
)


class CausalLMLoss:
    """The loss function of a model: called as transformers calls ForCausalLMLoss, with its shift and its denominator.

    Attributes:
        threshold: 0-d float32 tensor, on the device of the logits from the first call on; to be changed by `fill_`.
        observed: {"train": Observed, "eval": Observed}, of calls with gradients enabled and without; not of those
            inside the transforms of torch.func.
        calls: how often it has been called, not from compiled code; the statistics count those too.
        fused: whether the last call did without logits in memory.
    """

    __name__ = "TruncatedLoss"  # unsloth asks for one, and takes its own plain loss if it ends in ForCausalLMLoss

    def __init__(self, model: PreTrainedModel):
        self.stock, self.model_type = model.loss_function, type(model)
        self.observed = {"train": Observed(), "eval": Observed()}
        self.calls, self.fused = 0, False
        self._made_by, self._warned = "", set()

    def set_options(self, threshold: float | Tensor, rule: str, lazy_logits: bool, options: dict[str, Any]) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
        if not isinstance(lazy_logits, bool):
            raise TypeError(f"lazy_logits must be True or False, got {lazy_logits!r}")
        for name in OF_THE_MODEL & set(options):
            raise TypeError(f"{name} must be left out: it follows from the model and its batches")
        options = {"return_stats": True} | options
        if not options["return_stats"]:
            raise ValueError("return_stats must be True or 'entropy', got False")
        of_rule = {"threshold": threshold} if rule == "truncated" else {}
        if not of_rule and (isinstance(threshold, Tensor) or threshold != 0.9):
            raise ValueError(
                f"threshold must be left out with rule='focal', which has gamma and alpha, got {threshold}"
            )
        # The loss itself says what is wrong with the others.
        weight = options.get("weight")
        n_classes, device = (len(weight), weight.device) if isinstance(weight, Tensor) and weight.dim() else (1, "cpu")
        hidden, head = (torch.zeros(n, 1, dtype=torch.float32, device=device) for n in (1, n_classes))
        target = torch.zeros(1, dtype=torch.int64, device=device)
        anywhere = {"backend": "auto"} if options.get("backend") == "triton" else {}
        RULES[rule][1](hidden, head, target, **{**options, **anywhere, **of_rule})

        is_kept = isinstance(threshold, Tensor) and threshold.dtype == torch.float32  # whoever gave it may change it
        value = threshold if of_rule else 1.0
        self.threshold = threshold if is_kept else torch.tensor(float(value), dtype=torch.float32, device="cpu")
        self.rule, self.is_lazy, self.options = rule, lazy_logits, options

    def __call__(
        self, logits: Tensor, labels: Tensor | None, vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None, ignore_index: int = -100, shift_labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:  # fmt: skip
        """Mean over the tokens that are not ignored, or sum over num_items_in_batch; logits (..., V), labels (...)."""
        if shift_labels is None:
            is_shifted = self.stock is ForCausalLMLoss
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if is_shifted else labels
        device = logits.device
        options = self.options | {"ignore_index": ignore_index}
        if self.rule == "truncated":
            if self.threshold.device != device:
                self.threshold = self.threshold.to(device)
            options["threshold"] = self.threshold
        if isinstance(num_items_in_batch, Tensor):  # on any device, [1] from DataParallel
            num_items_in_batch = num_items_in_batch.to(device).reshape(())
        if num_items_in_batch is not None:
            options["denominator"] = num_items_in_batch
        target = shift_labels.to(device).reshape(-1)

        of_logits, of_hidden = RULES[self.rule]
        recipe = logits.recipe if isinstance(logits, LazyLogits) and logits.is_lazy else None
        if recipe is None:
            self._warn_of_memory()
            options = {name: value for name, value in options.items() if name not in ONLY_LINEAR}
            loss, stats = of_logits(logits.reshape(-1, logits.shape[-1]), target, **options)
        else:
            _, weight, bias = recipe.product.tensors
            options |= {"linear_bias": bias, "logit_scale": recipe.scale, "softcap": recipe.softcap}
            recipe.product.is_used = recipe.requires_grad
            with recipe.product.at_hand(), torch.set_grad_enabled(recipe.requires_grad):
                loss, stats = of_hidden(recipe.hidden.reshape(-1, recipe.hidden.shape[-1]), weight, target, **options)
        if not torch.compiler.is_compiling():  # which would compile each number anew
            self.calls += 1
        self.fused = recipe is not None
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():  # nothing leaves those
            self.observed["train" if torch.is_grad_enabled() else "eval"].add(stats)
        return loss

    def logits_made(self, recipe: Recipe, by: str) -> None:
        """Told by the head: a function of this name has read them."""
        self._made_by = by
        product = recipe.product
        if recipe.requires_grad and product.head.training and self.calls == product.calls and not self._in_forward():
            self._warn_once(BYPASSED)

    def _in_forward(self) -> bool:
        code, frame = inspect.unwrap(self.model_type.forward).__code__, sys._getframe()
        while frame and frame.f_code is not code:
            frame = frame.f_back
        return frame is not None

    def _warn_of_memory(self) -> None:
        if self.is_lazy and not torch.compiler.is_compiling():
            cause = f"by {self._made_by}" if self._made_by else "by the head, or by what its weight or input is"
            self._warn_once(f"the loss of {self.model_type.__name__} has got logits that are in memory, made {cause}; "
                            "they cost memory, and change nothing else")  # fmt: skip

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)


def truncate(
    model: PreTrainedModel, threshold: float | Tensor = 0.9, *, rule: str = "truncated", lazy_logits: bool = True,
    **options,
) -> CausalLMLoss:  # fmt: skip
    """Give a causal or vision-language model of transformers a loss of this package; in all else it stays as it was.

    The model's forward calls the loss with its logits, which are not in memory unless somebody reads them.

    Args:
        model: a PreTrainedModel whose loss is ForCausalLMLoss or, unshifted, ForMaskedLMLoss; or a PEFT model of one.
            On a model that has been truncated already, threshold and options replace those that it has.
        threshold: as in `truncated_cross_entropy`; a 0-d float32 tensor is used as it is.
        rule: "truncated" or "focal", with options `gamma` and `alpha`.
        lazy_logits: False has the logits made always, as the stock model does.
        **options: of `linear_truncated_cross_entropy` or `linear_focal_cross_entropy`, but those that follow from the
            model and its batches. chunk_size, accumulate_dtype and gradient_tolerance hold while logits are lazy, and
            are left out where they are made. return_stats="entropy" adds the entropy to what is observed.

    Returns:
        The loss function, which knows what it has observed.

    Raises:
        TypeError: a model whose loss is another one, or is not computed by its `loss_function`. Errors of options are
            those of the losses.
    """
    inner = inner_model(model)
    loss = inner.loss_function
    if not isinstance(loss, CausalLMLoss):
        _check(inner)
        loss = CausalLMLoss(inner)
    loss.set_options(threshold, rule, lazy_logits, options)
    inner.loss_function = loss
    _eager(inner)
    if lazy_logits:
        head = inner.get_output_embeddings()
        is_copied = hasattr(head, "modules_to_save")  # by PEFT
        for part in [head.original_module, *head.modules_to_save.values()] if is_copied else [head]:
            if type(part) is nn.Linear and "forward" not in part.__dict__:  # where accelerate may have put its own
                part.__class__ = LazyHead
            if isinstance(part, LazyHead):
                part.loss = loss
            else:
                kind = "one with a forward of its own" if type(part) is nn.Linear else type(part).__name__
                warnings.warn(
                    f"logits will be made: the lm-head must be a torch.nn.Linear to do without, got {kind}",
                    stacklevel=2,
                )
    return loss


def restore(model: PreTrainedModel) -> None:
    """Give a model its own loss and logits back; nothing happens to one that has them."""
    inner = inner_model(model)
    if isinstance(inner.loss_function, CausalLMLoss):
        inner.loss_function = inner.loss_function.stock
        _eager(inner)


def _eager(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LazyHead):
            module.loss = None
            if type(module) is LazyHead:  # not so if FSDP2 has made another class of it
                module.__class__ = nn.Linear
                del module.loss


def inner_model(model) -> PreTrainedModel:
    """The model of transformers that is meant, of PEFT's too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, or a PEFT model of one, got {type(inner).__name__}: "
            "pass the model itself, not what DDP, torch.compile or a trainer have wrapped around it"
        )
    return inner


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if "loss_function" in model._modules:
        raise TypeError(
            f"loss_function of {name} must not be a torch.nn.Module, which transformers never calls: "
            "del model.loss_function, and give the options of the loss to truncate"
        )
    if model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
        raise TypeError(f"the loss of {name} must be ForCausalLMLoss or ForMaskedLMLoss, got {model.loss_function}")
    forward = inspect.unwrap(model.forward)
    if "loss_function" not in forward.__code__.co_names:
        raise TypeError(f"{name} must compute its loss by self.loss_function in its forward, which it does not")
    if "liger_kernel" in forward.__module__:
        raise TypeError(
            f"the forward of {name} must be that of transformers, got Liger's, which computes the loss itself: apply "
            "Liger with fused_linear_cross_entropy=False"
        )
