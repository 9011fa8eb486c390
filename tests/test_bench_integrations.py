"""`python -m benchmarks integrations`: the verdicts of the census, the step that is timed, the log of fine-tuning."""

import functools
import importlib.util

import pytest
import torch

ABSENT = [
    name
    for name in ("accelerate", "matplotlib", "tabulate", "tqdm", "transformers")
    if importlib.util.find_spec(name) is None
]
if ABSENT:
    pytest.skip(f"{', '.join(ABSENT)} not installed, which these benchmarks need", allow_module_level=True)

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from benchmarks import report
from benchmarks.integrations import census, finetune, steps
from benchmarks.integrations.definition import Definition
from benchmarks.timing.measure import OURS, Inexact
from tce_kernels.integrations.causal_lm import truncate

LLAMA = "LlamaForCausalLM"


def verdict(name, mapping="causal"):
    found = census.classes(mapping)
    if name not in found:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return census.examine(*found[name])


def test_verdicts():
    assert verdict(LLAMA) == (census.LAZY, "")
    kind, reason = verdict("XLMWithLMHeadModel")
    assert kind == census.REFUSED and "must compute its loss by self.loss_function" in reason


def test_models_whose_logits_are_divided_and_losses_that_do_not_shift():
    assert verdict("MiniCPM3ForCausalLM")[0] == census.LAZY
    assert verdict("T5Gemma2ForConditionalGeneration", "vision")[0] == census.LAZY


def test_a_model_that_cannot_be_built():
    class Broken(transformers.LlamaForCausalLM):
        def __init__(self, config):
            raise RuntimeError("first line\nlast line")

    assert census.examine(transformers.LlamaConfig, Broken) == (census.NOT_BUILT, "RuntimeError: last line")


def test_a_head_of_its_own_makes_logits(monkeypatch):
    monkeypatch.setattr(census, "truncate", functools.partial(truncate, lazy_logits=False))
    assert verdict(LLAMA) == (census.EQUAL, "")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"z_loss": 1e-4}, "at threshold 1"),
        ({"rule": "focal", "gamma": 0.0}, "where truncated"),  # cross-entropy, which no threshold truncates
    ],
)
def test_what_is_wrong_is_found(monkeypatch, options, reason):
    def other(model, threshold):
        return truncate(model, **options)

    monkeypatch.setattr(census, "truncate", other)
    kind, said = verdict(LLAMA)
    assert kind == census.WRONG and said.endswith(reason)


def test_other_tokens_are_found(monkeypatch):
    class Contrary(transformers.LlamaForCausalLM):
        def generate(self, tokens=None, **options):
            return super().generate(tokens, **options) + hasattr(self.loss_function, "observed")

    assert census.examine(transformers.LlamaConfig, Contrary) == (census.WRONG, "generates other tokens")


def test_the_committed_census_has_nothing_wrong():
    heading, rows = report.load(census.PATH)
    assert heading[0].startswith("transformers ")
    verdicts = [row["verdict"] for row in rows]
    assert set(verdicts) <= set(census.VERDICTS) - {census.WRONG}
    assert verdicts.count(census.LAZY) > len(rows) / 2
    for row in rows:
        assert row["reason"] or row["verdict"] == census.LAZY, row
        assert row["verdict"] != census.REFUSED or "must compute its loss" in row["reason"]


def test_the_definition():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 0.0]]).log_softmax(-1)[None]
    labels = torch.tensor([[9, 0, 1, -100]])
    p = logits.exp()[0]
    definition = Definition(is_shifted=True, threshold=0.5)
    want = -p[1, 1].log() / 2  # of two tokens: the first has p 0.88, the last none
    assert definition(logits, labels).item() == pytest.approx(0.0)
    definition.threshold = 0.8
    assert definition(logits, labels).item() == pytest.approx(want.item())
    assert definition.confidence.tolist() == pytest.approx([p[0, 0].item(), p[1, 1].item()])
    assert p[1, 1] < definition.between(0, 1) < p[0, 0]
    assert definition(logits, labels, num_items_in_batch=4).item() == pytest.approx(want.item() / 2)
    unshifted = Definition(is_shifted=False)
    assert unshifted(logits, torch.tensor([[0, -100, -100, -100]])).item() == pytest.approx(-p[0, 0].log().item())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(steps, "VOCABULARY", 300)
    return steps.Case("tiny", 1, 32, 48, 4, 2, 2, 40)


def measured(case):
    with tqdm(total=0, disable=True) as progress:
        return steps.measure(case, torch.device("cpu"), rounds=2, progress=progress)


def test_steps_are_compared_with_the_definition_and_with_stock(tiny):
    rows, missing = measured(tiny)
    names = [row["provider"] for row in rows]
    assert names[:2] == [steps.STOCK, OURS] and f"{OURS}, 50% truncated" in names
    assert any("Liger" in line for line in missing)
    assert rows[0]["time_over_stock"] == rows[0]["memory_over_stock"] == 1
    stock, lazy = (row["extra_peak_MiB"] for row in rows[:2])
    in_memory = next(row["extra_peak_MiB"] for row in rows if row["provider"].endswith("logits in memory"))
    logits = 80 * 300 * 4 / 2**20
    assert stock > 2 * logits and lazy < in_memory and in_memory > logits


def test_a_wrong_step_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(steps, "truncate", functools.partial(truncate, z_loss=1e-3))
    with pytest.raises(Inexact):
        measured(tiny)


def test_the_log_of_fine_tuning(tmp_path, monkeypatch):
    tokenizer = Tokenizer(models.WordLevel({chr(ord("a") + i): i for i in range(26)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=26, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(finetune, "LEARNING_RATE", 0.1)
    log = finetune.finetune(str(tmp_path), 4, torch.device("cpu"))
    assert [row["tokens"] for row in log] == ["held out", *["training"] * 4, "held out"]
    assert [row["threshold"] for row in log] == pytest.approx([1.0, 1.0, 0.85, 0.7, 0.7, 0.7])
    assert log[-1]["confidence"] > log[0]["confidence"] and log[-1]["accuracy"] > log[0]["accuracy"]
