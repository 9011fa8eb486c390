"""The Trainer of transformers: equal to stock, its log, schedules, and what goes around the loss."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from transformers import Trainer

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe
from tce_kernels.integrations.trainer import ThresholdSchedule, attach, linear, mean_plus_std, quantile

from .models import spread
from .tiny import collate, llama, mixtral, relative
from .training import arguments, losses, trainer_of

EXACT = 1e-6


@pytest.fixture
def made(monkeypatch):
    compute, seen = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: seen.append(recipe) or compute(recipe))
    return seen


def trained(tmp_path, threshold, make=llama, batch=8, accumulate=1, schedule=None, **options):
    """A training of two steps, of the stock model if there is no threshold."""
    model = make()
    loss = None if threshold is None else truncate(model, threshold)
    trainer, keep = trainer_of(model, arguments(tmp_path, batch, accumulate, **options))
    if loss is not None:
        attach(trainer, loss, schedule and schedule(loss))
    trainer.train()
    return trainer, keep, loss


@pytest.mark.parametrize("options", [
    {}, {"bf16": True}, {"gradient_checkpointing": True}, {"dataloader_drop_last": True, "torch_empty_cache_steps": 1},
])  # fmt: skip
def test_threshold_one_is_the_stock_training(options, tmp_path, made):
    _, want, _ = trained(tmp_path, None, batch=2, accumulate=4, **options)
    _, got, _ = trained(tmp_path, 1.0, batch=2, accumulate=4, **options)
    exact = 1e-2 if "bf16" in options else EXACT  # of bfloat16, whose weight gradient the stock sums in other chunks
    torch.testing.assert_close(losses(got), losses(want), rtol=max(exact / 10, EXACT), atol=0)
    assert relative(got.gradients, want.gradients) < exact
    assert not made


@pytest.mark.parametrize("threshold", [1.0, 0.0099])
def test_accumulation_is_the_whole_batch(threshold, tmp_path):
    _, parts, loss = trained(tmp_path, threshold, batch=2, accumulate=4)
    _, whole, other = trained(tmp_path, threshold, batch=8)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=EXACT, atol=0)
    assert relative(parts.gradients, whole.gradients) < EXACT
    share = loss.observed["train"].since("test").truncated
    assert share == other.observed["train"].since("test").truncated and (threshold == 1 or 0.1 < share < 0.9)


def test_experts_as_the_stock_trainer_has_them(tmp_path):
    _, want, _ = trained(tmp_path, None, make=mixtral, batch=2, accumulate=4)
    _, got, _ = trained(tmp_path, 1.0, make=mixtral, batch=2, accumulate=4)
    torch.testing.assert_close(losses(got), losses(want), rtol=EXACT, atol=0)
    assert relative(got.gradients, want.gradients) < EXACT


def test_the_log_says_what_the_loss_has_seen(tmp_path):
    """Each log of the tokens since the last one, in front of the reporters, and in the history."""
    model = spread(llama())
    loss = truncate(model, 0.02)
    trainer, keep = trainer_of(model, arguments(tmp_path, eval_strategy="steps", eval_steps=1))
    attach(trainer, loss)
    trainer.train()
    history = [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log]
    reported = [log for log in keep.logs if "loss" in log or "eval_loss" in log]
    assert len(history) == len(reported) == 4
    for log, report in zip(history, reported, strict=True):
        assert report.items() <= log.items()
    for prefix, mode in (("", "train"), ("eval_", "eval")):
        logs = [log for log in reported if prefix + "loss" in log]
        whole = loss.observed[mode].since("test")
        names = {prefix + name for name in ("truncated", "confidence", "accuracy", "threshold")}
        assert all(names <= log.keys() for log in logs)
        assert not any(name.startswith("eval_") for log in logs for name in log if not prefix)
        assert logs[0][prefix + "confidence"] != logs[1][prefix + "confidence"]
        assert [log[prefix + "threshold"] for log in logs] == pytest.approx([0.02, 0.02])
        assert 0 < whole.truncated < 1
        for name in ("truncated", "confidence", "accuracy"):
            mean = sum(log[prefix + name] for log in logs) / 2
            # The batches of evaluation are the same each time, those of training have different numbers of tokens.
            assert mean == pytest.approx(getattr(whole, name), abs=1e-9 if prefix else 0.02)
        assert whole.n_calls == 2


@pytest.mark.parametrize("with_metrics", [False, True])
def test_evaluation(with_metrics, tmp_path, made):
    """Without metrics no logits are made; with them, once a batch, and they are the stock model's."""

    def metrics(evaluated):
        return {"sum": float(abs(evaluated.predictions).sum()), "top": float((evaluated.predictions.argmax(-1)).sum())}

    found = []
    for threshold in (None, 1.0):
        model = spread(llama())
        loss = None if threshold is None else truncate(model, threshold)
        args = arguments(tmp_path, per_device_eval_batch_size=3)
        trainer, _ = trainer_of(model, args, compute_metrics=metrics if with_metrics else None)
        if loss is not None:
            attach(trainer, loss)
        found.append(trainer.evaluate())
    want, got = found
    for name in ("eval_loss", *(["eval_sum", "eval_top"] if with_metrics else [])):
        assert got[name] == pytest.approx(want[name], rel=EXACT)
    assert len(made) == (2 if with_metrics else 0)
    assert loss.observed["eval"].since("test").n_calls == 2
    assert loss.observed["train"].since("test").n_calls == 0


def test_several_evaluation_sets_have_logs_of_their_own(tmp_path):
    model = spread(llama())
    loss = truncate(model, 0.02)
    trainer, keep = trainer_of(model, arguments(tmp_path))
    attach(trainer, loss)
    rows = trainer.eval_dataset
    trainer.evaluate({"a": rows[:2], "b": rows[2:]})
    seen = [name for log in keep.logs for name in log if name.endswith("confidence")]
    assert seen == ["eval_a_confidence", "eval_b_confidence"]


def test_each_log_is_of_its_own_tokens(tmp_path):
    """Not of calls before the training, of predictions, nor of an evaluation under another name."""
    model = spread(llama())
    loss = truncate(model, 0.02)
    trainer, keep = trainer_of(model, arguments(tmp_path))
    rows = trainer.eval_dataset
    model(**collate(rows)).loss.backward()
    with torch.no_grad():
        model(**collate(rows))
    attach(trainer, loss)
    want = trainer.evaluate(rows[:2])
    for other in (trainer.predict, lambda rows: trainer.evaluate(rows, metric_key_prefix="test")):
        other(rows[2:])
        got = trainer.evaluate(rows[:2])
        assert got["eval_confidence"] == want["eval_confidence"] and got["eval_accuracy"] == want["eval_accuracy"]
    assert any("test_confidence" in log for log in keep.logs)
    model(**collate(rows)).loss.backward()
    model.zero_grad()
    trainer.train()
    whole = loss.observed["train"].since("test")
    own = loss.observed["train"].marks["log"]
    assert whole.n_calls == 4 and own[0] == 4
    first, again = ([log["confidence"] for log in logs_of(each)][0] for each in (keep, trained_after_nothing(tmp_path)))
    assert first == pytest.approx(again, rel=EXACT)


def trained_after_nothing(tmp_path):
    _, keep, _ = trained(tmp_path, 0.02, make=lambda: spread(llama()))
    return keep


def test_logs_of_the_user_are_left_alone(tmp_path):
    """They may have a loss, come at any time, and from one rank only."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            self.log({"loss": 1.0, "eval_loss": 2.0})
            self.log({"step_runtime": 1.0})
            return super().compute_loss(model, inputs, return_outputs, **options)

    model = llama()
    loss = truncate(model, 0.9)
    trainer, keep = trainer_of(model, arguments(tmp_path, batch=2, accumulate=4), Own)
    attach(trainer, loss)
    trainer.train()
    own = [log for log in keep.logs if log.get("loss") == 1.0]
    assert len(own) == 8 and not any("confidence" in log for log in own)
    assert sum("confidence" in log for log in keep.logs) == 2


def test_a_compiled_model(tmp_path):
    _, want, _ = trained(tmp_path, 1.0)
    torch._dynamo.reset()
    model = llama()
    loss = truncate(model, 1.0)
    args = arguments(tmp_path, remove_unused_columns=False)  # whose names it cannot read off a compiled model
    trainer, got = trainer_of(torch.compile(model, backend="eager"), args)
    attach(trainer, loss)
    trainer.train()
    assert losses(got).tolist() == pytest.approx(losses(want).tolist(), rel=EXACT)
    assert logs_of(got)[1]["confidence"] == pytest.approx(logs_of(want)[1]["confidence"], rel=EXACT)


def test_tokens_that_are_all_ignored_log_nothing(tmp_path):
    model = llama()
    loss = truncate(model, 0.9)
    trainer, keep = trainer_of(model, arguments(tmp_path, steps=1))
    attach(trainer, loss)
    for row in trainer.train_dataset:
        row["labels"] = [-100] * len(row["labels"])
    trainer.train()
    assert not any("truncated" in log for log in keep.logs) and losses(keep) == 0


def test_attaching_again_replaces(tmp_path):
    model = llama()
    loss = truncate(model, 0.9)
    trainer, keep = trainer_of(model, arguments(tmp_path))
    before = len(trainer.callback_handler.callbacks)
    attach(trainer, loss, ThresholdSchedule(loss, linear(1.0, 0.6, 1.0)))
    attach(trainer, loss, ThresholdSchedule(loss, linear(0.8, 0.7, 1.0)))
    assert len(trainer.callback_handler.callbacks) == before + 2
    attach(trainer, loss)
    assert len(trainer.callback_handler.callbacks) == before + 1
    trainer.train()
    assert loss.threshold == pytest.approx(0.9)


def test_a_linear_schedule_follows_the_steps(tmp_path):
    schedule = functools.partial(ThresholdSchedule, rule=linear(1.0, 0.6, 0.5))
    _, keep, loss = trained(tmp_path, 0.9, schedule=schedule, steps=4)
    seen = [log["threshold"] for log in keep.logs if "threshold" in log]
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.6])
    assert loss.observed["train"].since("schedule").n_calls == 4  # nobody has looked


@pytest.mark.parametrize("make_rule", [lambda: quantile(0.8), lambda: mean_plus_std(1.0)])
def test_a_schedule_by_confidence_follows_what_was_observed(make_rule, tmp_path):
    """The threshold of step i is that of the rule on the tokens of the steps before."""
    seen, rule = [], make_rule()

    def recorded(progress, statistics):
        seen.append((progress, statistics, rule(progress, statistics)))
        return seen[-1][2]

    schedule = functools.partial(ThresholdSchedule, rule=recorded, at_least=0.01)
    _, keep, _ = trained(tmp_path, 0.9, make=lambda: spread(llama()), schedule=schedule, steps=3)
    thresholds = [log["threshold"] for log in keep.logs if "threshold" in log]
    assert [progress for progress, _, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3])
    assert seen[0][1] is None and thresholds[0] == pytest.approx(0.9)
    again = make_rule()
    for (_, statistics, value), threshold, log in zip(seen[1:], thresholds[1:], logs_of(keep)[:-1], strict=True):
        assert statistics.confidence == pytest.approx(log["confidence"])
        assert again(0.0, statistics) == value
        assert threshold == pytest.approx(min(max(value, 0.01), 1.0))
    assert thresholds[1] != thresholds[2]


def logs_of(keep):
    return [log for log in keep.logs if "loss" in log]


def test_the_threshold_is_clamped_and_every_counts(tmp_path):
    values = iter([0.2, 3.0, None])
    rule = lambda progress, statistics: next(values)  # noqa: E731
    schedule = functools.partial(ThresholdSchedule, rule=rule, every=2, at_least=0.6)
    _, keep, _ = trained(tmp_path, 0.9, schedule=schedule, steps=6)
    assert [log["threshold"] for log in logs_of(keep)] == pytest.approx([0.6, 0.6, 1.0, 1.0, 1.0, 1.0])
    assert next(values, "all used") == "all used"


def test_a_schedule_of_a_plain_loop():
    model = llama()
    loss = truncate(model, 0.9)
    schedule = ThresholdSchedule(loss, quantile(0.5, decay=0.0), at_least=0.001)
    batch = {"input_ids": torch.arange(12)[None] + 3, "labels": torch.arange(12)[None] + 3}
    schedule.step(0.0)
    assert loss.threshold == pytest.approx(0.9)  # nothing is known
    model(**batch)
    statistics = copy.deepcopy(loss.observed["train"]).since("schedule")
    schedule.step(0.5)
    assert loss.threshold.item() == pytest.approx(max(quantile(0.5)(0.5, statistics), 0.001))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rule_that_says_no_number(value):
    schedule = ThresholdSchedule(truncate(llama(), 0.9), lambda progress, statistics: value)
    with pytest.raises(ValueError, match="rule must return a finite threshold or None, got (nan|inf)"):
        schedule.step(0.5)


def test_focal_loss_has_no_threshold_to_log(tmp_path):
    model = llama()
    loss = truncate(model, rule="focal")
    trainer, keep = trainer_of(model, arguments(tmp_path, steps=1))
    attach(trainer, loss)
    trainer.train()
    assert "confidence" in keep.logs[0] and "threshold" not in keep.logs[0]


REFUSED_SCHEDULES = [
    ({"rule": None}, TypeError, "rule must be a function"),
    ({"every": 0}, ValueError, "every must be a positive number of steps, got 0"),
    ({"every": True}, ValueError, "every must be"),
    ({"every": 1.5}, ValueError, "every must be"),
    ({"at_least": True}, ValueError, "at_least must be"),
    ({"at_least": "0.5"}, ValueError, "at_least must be"),
    ({"at_least": 0.0}, ValueError, r"at_least must be in \(0, 1\], got 0.0"),
    ({"at_least": 1.5}, ValueError, "at_least must be in"),
    ({"rule": linear(1.0, 0.4, 0.5)}, ValueError, "must not go below at_least=0.5"),
    ({"rule": linear(0.4, 0.9, 0.5)}, ValueError, "must not go below at_least=0.5"),
    ({"loss": torch.nn.CrossEntropyLoss()}, TypeError, "loss must be what truncate has returned, got CrossEntropyLoss"),
]


@pytest.mark.parametrize("changed, error, text", REFUSED_SCHEDULES)
def test_schedules_that_make_no_sense(changed, error, text):
    with pytest.raises(error, match=text):
        ThresholdSchedule(**{"loss": truncate(llama(), 0.9), "rule": quantile(0.8)} | changed)


def test_focal_loss_has_no_threshold_to_set():
    with pytest.raises(ValueError, match="must be a truncated one, .* got rule='focal'"):
        ThresholdSchedule(truncate(llama(), rule="focal"), quantile(0.8))


# Traps: what would train without the loss, and say nothing.


def refused(tmp_path, error, text, kind=Trainer, options=None, **trainer_options):
    model = llama()
    loss = truncate(model, 0.9)
    trainer, _ = trainer_of(model, arguments(tmp_path, **options or {}), kind, **trainer_options)
    with pytest.raises(error, match=text):
        attach(trainer, loss)


def test_label_smoothing_of_trainer(tmp_path):
    text = "label_smoothing_factor must be 0, got 0.1.*truncate"
    refused(tmp_path, ValueError, text, options={"label_smoothing_factor": 0.1})
    model = llama()
    loss = truncate(model, 0.9)
    trainer, _ = trainer_of(model, arguments(tmp_path))
    attach(trainer, loss)
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()


def test_compute_loss_func(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().mean()

    refused(tmp_path, ValueError, "compute_loss_func must be left out", compute_loss_func=own)


def test_liger(tmp_path):
    model = llama()
    loss = truncate(model, 0.9)
    trainer, _ = trainer_of(model, arguments(tmp_path))
    trainer.args.use_liger_kernel = True  # Trainer asks for the package, if it is told before
    with pytest.raises(ValueError, match="use_liger_kernel replaces the forward .*fused_linear_cross_entropy"):
        attach(trainer, loss)
    trainer.args.liger_kernel_config = {"fused_linear_cross_entropy": False}
    attach(trainer, loss)


def test_a_loss_in_an_override_is_found_at_the_first_log(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            return model(**inputs).logits.mean()

    model = llama()
    loss = truncate(model, 0.9)
    trainer, _ = trainer_of(model, arguments(tmp_path), Own)
    attach(trainer, loss)
    with pytest.warns(UserWarning, match="its loss has not been called"):
        with pytest.raises(RuntimeError, match="has not been called since the last log.*model_init"):
            trainer.train()


def test_a_model_of_model_init_is_another_one(tmp_path):
    losses = []

    def model_init():
        model = llama()
        losses.append(truncate(model, 0.9))
        return model

    trainer, _ = trainer_of(None, arguments(tmp_path), model_init=model_init)
    with pytest.raises(TypeError, match="model must have this loss"):
        attach(trainer, truncate(llama(), 0.9))
    attach(trainer, losses[-1])
    with pytest.raises(TypeError, match="model must have this loss"):
        trainer.train()  # which calls model_init again


def test_a_model_without_the_loss(tmp_path):
    trainer, _ = trainer_of(llama(), arguments(tmp_path))
    with pytest.raises(TypeError, match="model must have this loss: call truncate"):
        attach(trainer, truncate(llama(), 0.9))
    with pytest.raises(TypeError, match="loss must be what truncate has returned, got float"):
        attach(trainer, 0.9)


def test_schedules_of_other_losses(tmp_path):
    model = llama()
    loss = truncate(model, 0.9)
    trainer, _ = trainer_of(model, arguments(tmp_path))
    with pytest.raises(TypeError, match=r"schedule must be a ThresholdSchedule\(loss, rule\), got linear"):
        attach(trainer, loss, linear(1.0, 0.9, 0.5))
    with pytest.raises(ValueError, match="schedule must be one of the same loss"):
        attach(trainer, loss, ThresholdSchedule(truncate(llama(), 0.9), linear(1.0, 0.9, 0.5)))


def test_peft_in_trainer(tmp_path, made):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = []
    for threshold in (None, 1.0):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        loss = None if threshold is None else truncate(model, threshold)
        trainer, keep = trainer_of(model, arguments(tmp_path))
        if loss is not None:
            attach(trainer, loss)
        trainer.train()
        found.append(keep)
    assert relative(found[1].gradients, found[0].gradients) < EXACT and not made


def test_checkpoints_go_on_with_the_threshold_of_the_progress(tmp_path):
    def training(steps, **options):
        model = llama()
        loss = truncate(model, 0.9)
        args = arguments(tmp_path, steps=4, save_strategy="steps", save_steps=2)
        trainer, keep = trainer_of(model, args)
        attach(trainer, loss, ThresholdSchedule(loss, linear(1.0, 0.6, 1.0)))
        trainer.train(**options)
        return keep, model

    whole, model = training(4)
    assert [log["threshold"] for log in logs_of(whole)] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    rest, again = training(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log["threshold"] for log in logs_of(rest)] == pytest.approx([0.8, 0.7])
    assert torch.equal(losses(rest), losses(whole)[2:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_training_that_goes_on_between_two_settings_of_the_threshold(tmp_path):
    def training(**options):
        model = llama()
        loss = truncate(model, 0.9)
        trainer, keep = trainer_of(model, arguments(tmp_path, steps=4, save_strategy="steps", save_steps=1))
        attach(trainer, loss, ThresholdSchedule(loss, linear(1.0, 0.6, 0.25), every=2))
        trainer.train(**options)
        return [log["threshold"] for log in logs_of(keep)]

    assert training() == pytest.approx([1.0, 1.0, 0.6, 0.6])
    assert training(resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == pytest.approx([0.6])
