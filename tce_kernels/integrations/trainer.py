"""The Trainer of transformers: what truncation does in its log, and thresholds that change as training goes on."""

import math
from collections.abc import Callable

from transformers import Trainer, TrainerCallback

from .causal_lm import CausalLMLoss, inner_model
from .observed import Statistics
from .schedules import linear, mean_plus_std, quantile

__all__ = ["ThresholdSchedule", "attach", "linear", "mean_plus_std", "quantile"]

NOT_CALLED = (
    "the truncated loss has not been called since the last log: the model has been trained without it. Likely causes: "
    "a trainer that computes the loss itself, another model than was given to truncate (model_init makes one), a "
    "forward that somebody has replaced"
)


class ThresholdSchedule(TrainerCallback):
    """Sets the threshold of a loss by a rule, before every `every`-th optimizer step.

    Elsewhere than in a Trainer, call `step(progress)` before each step, on all ranks if there are several. Trainer's
    checkpoints do not keep what a rule has seen: `linear` needs nothing, others learn the confidence anew.

    Args:
        loss: what `truncate` has returned.
        rule: `linear`, `quantile`, `mean_plus_std`, or any rule(progress in [0, 1], Statistics of the training tokens
            since its last call, or None if there were none) -> threshold, or None: leave it as it is.
        every: a positive number of optimizer steps.
        at_least: floor of the threshold, in (0, 1]. Without one, rules that follow the confidence would chase what they
            hold down.

    Raises:
        TypeError: another loss, a rule that cannot be called.
        ValueError: other values; a linear rule that goes below the floor.
    """

    def __init__(
        self, loss: CausalLMLoss, rule: Callable[[float, Statistics | None], float | None], every: int = 1,
        at_least: float = 0.5,
    ):  # fmt: skip
        _check_loss(loss)
        if loss.rule != "truncated":
            raise ValueError(f"the loss must be a truncated one, which has a threshold, got rule={loss.rule!r}")
        if not callable(rule):
            raise TypeError(f"rule must be a function of progress and statistics, got {rule!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}")
        if isinstance(at_least, bool) or not isinstance(at_least, (int, float)) or not 0 < at_least <= 1:
            raise ValueError(f"at_least must be in (0, 1], got {at_least!r}")
        if isinstance(rule, linear) and min(rule.start, rule.end) < at_least:
            raise ValueError(f"a linear rule must not go below at_least={at_least}, got {rule}: change one of them")
        self.loss, self.rule, self.every, self.at_least = loss, rule, every, at_least

    def step(self, progress: float) -> None:
        """Set the threshold, clamped to [at_least, 1]; rules but `linear` wait for the device, and for all ranks."""
        statistics = None
        if not isinstance(self.rule, linear):
            statistics = self.loss.observed["train"].since("schedule", reduce=True)
        value = self.rule(progress, statistics if statistics and statistics.n_tokens else None)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"rule must return a finite threshold or None, got {value} at progress {progress}")
        if value is not None:
            self.loss.threshold.fill_(min(max(value, self.at_least), 1.0))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step % self.every:  # resumed between two steps that set it
            self.step(state.global_step / state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.step(state.global_step / state.max_steps)


class LogStatistics(TrainerCallback):
    """Adds what a loss has observed to every log."""

    def __init__(self, trainer: Trainer, loss: CausalLMLoss):
        self.trainer, self.loss = trainer, loss
        self.start("train", "eval")

    def start(self, *modes: str) -> None:
        """What has been observed until now belongs to no log."""
        for mode in modes:
            self.loss.observed[mode].since("log")

    def on_train_begin(self, args, state, control, **kwargs):
        _check(self.trainer, self.loss)
        self.start("train", "eval")

    def on_predict(self, args, state, control, **kwargs):
        self.start("eval")  # it is not logged

    def on_log(self, args, state, control, logs, **kwargs):
        # Trainer's own logs, which all ranks write: users may call trainer.log on one rank, with a loss of their own.
        sets = [name.removesuffix("runtime") for name in logs if name.endswith("_runtime")]
        sets = [prefix for prefix in sets if prefix + "loss" in logs and prefix != "train_"]
        if not sets and not {"loss", "learning_rate"} <= logs.keys():
            return
        statistics = self.loss.observed["eval" if sets else "train"].since("log", reduce=True)
        if not statistics.n_calls:
            raise RuntimeError(NOT_CALLED)
        prefix = sets[0] if sets else ""
        new = {name: getattr(statistics, name) for name in ("truncated", "confidence", "accuracy")}
        if self.loss.rule == "truncated":
            new["threshold"] = self.loss.threshold.item()
        new = {prefix + name: value for name, value in new.items()} if statistics.n_tokens else {}
        logs.update(new)
        state.log_history[-1].update(new)  # which Trainer has written before it calls anybody


def attach(trainer: Trainer, loss: CausalLMLoss, schedule: ThresholdSchedule | None = None) -> None:
    """Have a Trainer log `truncated`, `confidence`, `accuracy` and `threshold`, with the prefix eval_ in evaluation.

    They are of the tokens since the last log, of all ranks, and stand in `state.log_history` too. A trainer that has
    gone around the loss is found at its first log, which raises a RuntimeError. A second call replaces the first.

    Args:
        trainer: a Trainer of transformers, whose model has the loss.
        loss: what `truncate` has returned.
        schedule: changes the threshold as training goes on.

    Raises:
        TypeError: another loss or schedule; a model that does not have the loss; a trainer with a loss of its own.
        ValueError: options of the trainer that go around the model's loss, label_smoothing_factor for one.
    """
    _check_loss(loss)
    if schedule is not None and not isinstance(schedule, ThresholdSchedule):
        raise TypeError(f"schedule must be a ThresholdSchedule(loss, rule), got {type(schedule).__name__}")
    if schedule is not None and schedule.loss is not loss:
        raise ValueError("schedule must be one of the same loss")
    _check(trainer, loss)
    handler = trainer.callback_handler
    ours = [LogStatistics(trainer, loss)] if schedule is None else [LogStatistics(trainer, loss), schedule]
    others = [each for each in handler.callbacks if not isinstance(each, (LogStatistics, ThresholdSchedule))]
    handler.callbacks = ours + others  # in front of those that report logs


def _check_loss(loss) -> None:
    if not isinstance(loss, CausalLMLoss):
        raise TypeError(f"loss must be what truncate has returned, got {type(loss).__name__}")


def _check(trainer: Trainer, loss: CausalLMLoss) -> None:
    """Refuse what would train without the loss, and not say so."""
    args = trainer.args
    if type(trainer).compute_loss.__module__.startswith("trl."):
        raise TypeError(
            f"{type(trainer).__name__} computes the loss itself, whatever the model's is: for SFTTrainer take "
            "tce_kernels.integrations.trl.TruncatedSFTTrainer"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func must be left out: Trainer would call it instead of the truncated loss")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: Trainer would compute the loss; "
            "give truncate(model, label_smoothing=...)"
        )
    liger = {"fused_linear_cross_entropy": True} | (getattr(args, "liger_kernel_config", None) or {})
    if args.use_liger_kernel and liger["fused_linear_cross_entropy"]:
        raise ValueError(
            "use_liger_kernel replaces the forward of the model, and its loss: pass "
            'liger_kernel_config={"fused_linear_cross_entropy": False} as well'
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if inner_model(getattr(model, "_orig_mod", model)).loss_function is not loss:  # of torch.compile
        raise TypeError("the trainer's model must have this loss: call truncate on it before attach")
