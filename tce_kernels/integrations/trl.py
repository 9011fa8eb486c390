"""TRL's trainer for supervised fine-tuning, with the loss of the model instead of one of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from .causal_lm import CausalLMLoss, inner_model, truncate
from .trainer import ThresholdSchedule, attach


class TruncatedSFTTrainer(SFTTrainer):
    """An SFTTrainer that trains with truncated cross-entropy, logs the same metrics, and those of `attach`.

    The loss is `trainer.truncated_loss`. A model that `truncate` has been given before keeps its other options.

    Args:
        *args, **kwargs: of SFTTrainer.
        threshold: as in `truncate`.
        schedule: a ThresholdSchedule of the model's loss, or a rule (`linear`, `quantile`, ...) to make one of.

    Raises:
        ValueError: what would replace the loss: loss_type other than "nll", compute_loss_func, label_smoothing_factor.
        TypeError: a model that `truncate` refuses.
    """

    def __init__(
        self, *args, threshold: float | Tensor = 0.9, schedule: ThresholdSchedule | Callable | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(f"loss_type must be 'nll', which the truncated loss replaces, got {self.args.loss_type!r}")
        earlier, options = inner_model(self.model).loss_function, {}
        if isinstance(earlier, CausalLMLoss):
            options = earlier.options | {"rule": earlier.rule, "lazy_logits": earlier.is_lazy}
        self.truncated_loss = truncate(self.model, threshold, **options | {"return_stats": "entropy"})
        if schedule is not None and not isinstance(schedule, ThresholdSchedule):
            schedule = ThresholdSchedule(self.truncated_loss, schedule)
        attach(self, self.truncated_loss, schedule)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        inputs = inputs | {"use_cache": False}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.aux_loss_enabled and num_items_in_batch is not None:
            # In `loss` once for each rank and micro-batch; SFTTrainer means the mean over them.
            n = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            share = 1 / self.current_gradient_accumulation_steps
            loss = loss - (n - share) * self.router_aux_loss_coef * outputs.aux_loss

        metrics = self._metrics[mode]
        statistics = self.truncated_loss.observed[mode].since("metrics", reduce=True)
        metrics["entropy"].append(statistics.entropy or 0.0)
        metrics["mean_token_accuracy"].append(statistics.accuracy)
        if mode == "train":
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            tokens = torch.as_tensor(tokens, device=loss.device)
            self._total_train_tokens += self.accelerator.gather_for_metrics(tokens).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item())
        return (loss, outputs) if return_outputs else loss
