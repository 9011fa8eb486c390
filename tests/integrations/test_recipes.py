"""README.md's recipes for trainers, each as it is written, on a tiny model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from .tiny import collate, data, llama

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```py\n(.*?)```", README.read_text(), re.DOTALL)
NEEDED = {"TruncatedSFTTrainer": "trl", "lightning.": "lightning", "TruncatedLinearLoss": "torchtitan"}
pytestmark = [pytest.mark.filterwarnings("ignore:::lightning.*"), pytest.mark.filterwarnings("ignore:.*:FutureWarning")]


def named(code):
    """By what only it mentions."""
    return next((name for name in ("Trainer(model", "accelerator", *NEEDED, "ThresholdSchedule") if name in code), code)


@pytest.mark.parametrize("code", BLOCKS, ids=named)
def test_recipe(code, tmp_path, capsys):
    import accelerate

    from .training import arguments

    for mentioned, package in NEEDED.items():
        if mentioned in code:
            pytest.importorskip(package, reason=f"{package} is not installed")
    model = llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in data(8)]
    names = {
        "model": model,
        "arguments": arguments(tmp_path),
        "dataset": rows,
        "loader": torch.utils.data.DataLoader(data(8), batch_size=2, collate_fn=collate),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "accelerator": accelerate.Accelerator(cpu=True),
        "config": SimpleNamespace(),
    }
    if "sft_arguments" in code:
        from trl import SFTConfig

        from .test_trl import sentences, tokenizer

        names["sft_arguments"] = arguments(tmp_path, kind=SFTConfig, bf16=False)
        names |= {"dialogues": sentences(), "tokenizer": tokenizer()}
    exec(compile(code, "README.md", "exec"), names)
    if "config.loss" in code:
        assert names["config"].loss.build(compile_config=None).threshold == 0.9
        return
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert model.loss_function.observed["train"].since("test").n_tokens > 0
    if "attach" in code:
        assert "truncated" in names["trainer"].state.log_history[0]
    if "print" in code:
        assert "Statistics(n_tokens=" in capsys.readouterr().out


def test_all_recipes_are_there():
    text = "".join(BLOCKS)
    words = (
        "attach",
        "TruncatedSFTTrainer",
        "accelerator",
        "LightningModule",
        "TruncatedLinearLoss",
        "loss.backward()",
    )
    assert len(BLOCKS) == len(words) and all(word in text for word in words)
