"""TruncatedSFTTrainer: an SFTTrainer in all but the loss."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe
from tce_kernels.integrations.trainer import ThresholdSchedule, attach, linear, quantile
from tce_kernels.integrations.trl import TruncatedSFTTrainer

from .models import spread
from .tiny import V, llama, mixtral, relative
from .training import Keep, arguments, losses

EXACT = 1e-6
WORDS = [f"w{i}" for i in range(V - 3)]
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")


@pytest.fixture
def made(monkeypatch):
    compute, seen = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: seen.append(recipe) or compute(recipe))
    return seen


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences():
    generator = torch.Generator().manual_seed(3)

    def text(n):
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))

    return Dataset.from_list([{"prompt": text(3 + i % 4), "completion": " " + text(4 + i % 9)} for i in range(16)])


def trained(tmp_path, threshold, model=None, batch=8, accumulate=1, steps=2, **options):
    """By stock SFTTrainer where there is no threshold."""
    of_trainer = {name: options.pop(name) for name in ("schedule", "peft_config", "compute_metrics") if name in options}
    if threshold is not None:
        of_trainer["threshold"] = threshold
    args = arguments(tmp_path, batch, accumulate, steps, SFTConfig, bf16=False, max_length=32, **options)
    keep = Keep()
    trainer = (SFTTrainer if threshold is None else TruncatedSFTTrainer)(
        model=llama() if model is None else model, args=args, train_dataset=sentences(),
        eval_dataset=sentences().select(range(6)), processing_class=tokenizer(), callbacks=[keep], **of_trainer,
    )  # fmt: skip
    trainer.train()
    return trainer, keep


@pytest.mark.parametrize("options", [
    {}, {"packing": True, "packing_strategy": "bfd"}, {"completion_only_loss": False}, {"gradient_checkpointing": True},
])  # fmt: skip
def test_threshold_one_is_sft_trainer(options, tmp_path, made):
    """Losses, gradients, and all that it logs."""
    _, want = trained(tmp_path, None, batch=2, accumulate=4, **options)
    _, got = trained(tmp_path, 1.0, batch=2, accumulate=4, **options)
    torch.testing.assert_close(losses(got), losses(want), rtol=EXACT, atol=0)
    assert relative(got.gradients, want.gradients) < EXACT
    assert not made
    for stock, ours in zip(want.logs[:2], got.logs[:2], strict=True):
        assert stock.keys() - {"grad_norm"} <= ours.keys()
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert ours[name] == pytest.approx(stock[name], rel=1e-5), name
        assert ours["truncated"] == 0 and ours["threshold"] == 1 and 0 < ours["confidence"] < 1
        assert 4 < ours["entropy"] < 4.7


@pytest.mark.parametrize("threshold", [1.0, 0.0099])
def test_accumulation_is_the_whole_batch(threshold, tmp_path):
    _, parts = trained(tmp_path, threshold, batch=2, accumulate=4)
    _, whole = trained(tmp_path, threshold, batch=8)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=EXACT, atol=0)
    assert relative(parts.gradients, whole.gradients) < EXACT
    assert parts.logs[0]["truncated"] == whole.logs[0]["truncated"]
    assert threshold == 1 or 0.1 < whole.logs[0]["truncated"] < 0.9


@pytest.mark.parametrize("accumulate", [1, 4])
def test_experts_are_weighed_as_by_sft_trainer(accumulate, tmp_path):
    _, want = trained(tmp_path, None, mixtral(), batch=2, accumulate=accumulate)
    _, got = trained(tmp_path, 1.0, mixtral(), batch=2, accumulate=accumulate)
    torch.testing.assert_close(losses(got), losses(want), rtol=EXACT, atol=0)
    assert relative(got.gradients, want.gradients) < EXACT
    assert got.logs[0]["aux_loss"] == pytest.approx(want.logs[0]["aux_loss"], rel=EXACT)


def test_evaluation(tmp_path, made):
    found = [
        trained(tmp_path, threshold, spread(llama()), eval_strategy="steps", eval_steps=2) for threshold in (None, 1.0)
    ]
    want, got = ([log for log in keep.logs if "eval_loss" in log][0] for _, keep in found)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert got[name] == pytest.approx(want[name], rel=1e-5), name
    assert got["eval_confidence"] > 0 and not made


def test_lora(tmp_path, made):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    found = []
    for threshold in (None, 1.0):
        torch.manual_seed(0)
        found.append(trained(tmp_path, threshold, peft_config=peft.LoraConfig(**config))[1])
    want, got = found
    torch.testing.assert_close(losses(got), losses(want), rtol=EXACT, atol=0)
    assert relative(got.gradients, want.gradients) < EXACT and not made


def test_schedules_and_rules(tmp_path):
    trainer, keep = trained(tmp_path, 0.9, schedule=linear(1.0, 0.6, 1.0), steps=4)
    assert [log["threshold"] for log in keep.logs if "loss" in log] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    model = llama()
    schedule = ThresholdSchedule(truncate(model, 0.9), quantile(0.8), at_least=0.001)
    trainer, keep = trained(tmp_path, 0.9, model, schedule=schedule, steps=3)
    assert trainer.truncated_loss is schedule.loss
    thresholds = [log["threshold"] for log in keep.logs if "loss" in log]
    assert thresholds[0] == pytest.approx(0.9) and thresholds[1] < 0.1


def test_a_model_that_has_been_truncated_keeps_its_options(tmp_path):
    model, focal = llama(), llama()
    truncate(model, 0.5, z_loss=0.01, lazy_logits=False)
    trainer, _ = trained(tmp_path, 0.9, model)
    loss = trainer.truncated_loss
    assert loss.options["z_loss"] == 0.01 and not loss.is_lazy and loss.threshold == torch.tensor(0.9)
    truncate(focal, rule="focal", gamma=3.0)
    trainer, keep = trained(tmp_path, 0.9, focal)
    assert trainer.truncated_loss.rule == "focal" and trainer.truncated_loss.options["gamma"] == 3.0
    assert losses(keep)[0] > 0


REFUSED = [
    ({"loss_type": "dft"}, "loss_type must be 'nll'"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
]


@pytest.mark.parametrize("options, text", REFUSED)
def test_what_would_replace_the_loss(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trained(tmp_path, 0.9, **options)


def test_stock_sft_trainer_is_refused(tmp_path):
    model = llama()
    loss = truncate(model, 0.9)
    trainer = SFTTrainer(
        model=model, args=arguments(tmp_path, kind=SFTConfig, bf16=False), train_dataset=sentences(),
        processing_class=tokenizer(),
    )  # fmt: skip
    with pytest.raises(TypeError, match="SFTTrainer computes the loss itself.*TruncatedSFTTrainer"):
        attach(trainer, loss)
