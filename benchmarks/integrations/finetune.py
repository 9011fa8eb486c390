"""Fine-tune a language model for a few steps with the truncated loss, and keep Trainer's log.

The text is the documentation that every CPython carries, `pydoc_data.topics`.
"""

import itertools
import random
import tempfile
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from transformers import Trainer, TrainingArguments

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.trainer import ThresholdSchedule, attach, linear

from ..states.command import load
from ..states.rows import windows

CONTEXT = 128
BATCH = 2
LEARNING_RATE = 5e-5
END = 0.7  # of the threshold, reached at half of the steps
LOGGED = "loss", "truncated", "confidence", "accuracy", "threshold"


def finetune(name: str, steps: int, device: torch.device) -> list[dict]:
    """The log: one row a step, and what is held out before and after them; `name` as in states.command."""
    model, tokenizer = load(name, torch.float32, device)
    model.is_quantized = False  # which those from GGUF files say for ever, and Trainer would refuse
    names = sorted(topics)
    random.Random(0).shuffle(names)
    n_held_out = len(names) // 10
    held_out, train = (
        list(itertools.islice(examples(tokenizer, some), number))
        for some, number in ((names[:n_held_out], 4 * BATCH), (names[n_held_out:], steps * BATCH))
    )

    loss = truncate(model, threshold=1.0)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=train, eval_dataset=held_out)
        attach(trainer, loss, ThresholdSchedule(loss, linear(1.0, END, warmup=0.5)))
        trainer.evaluate()
        before = trainer.state.log_history  # which training begins anew
        trainer.train()
        trainer.evaluate()
    return [
        {"step": log["step"], "tokens": "held out" if "eval_loss" in log else "training"}
        | {key: log.get(f"eval_{key}", log.get(key)) for key in LOGGED}
        for log in before + trainer.state.log_history
        if "loss" in log or "eval_loss" in log
    ]


def examples(tokenizer, names: list[str]) -> Iterator[dict[str, list[int]]]:
    """Whole windows of CONTEXT tokens, all of them labels."""
    for tokens in windows(tokenizer, "\n\n".join(topics[name] for name in names), CONTEXT - 1):
        if len(tokens) == CONTEXT:
            yield {"input_ids": tokens.tolist(), "labels": tokens.tolist()}
