"""Trainings of a few steps: losses of each step, gradients of all, the log."""

import os

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

from .tiny import collate, data


class Keep(TrainerCallback):
    """What the gradients were before the first optimizer step, and the logs as a reporter sees them."""

    def __init__(self):
        self.gradients, self.logs = None, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.gradients is None:
            named = model.named_parameters()
            self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def arguments(tmp_path, batch=8, accumulate=1, steps=2, kind=TrainingArguments, **options):
    # Or bf16 of one training would hold for those after it.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(True)
    options = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | options
    return kind(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=steps, logging_steps=1, learning_rate=1e-2, max_grad_norm=0.0, seed=0, **options,
    )  # fmt: skip


def trainer_of(model, args, kind=Trainer, rows=16, **options):
    keep = Keep()
    trainer = kind(
        model=model, args=args, train_dataset=data(rows), eval_dataset=data(6), data_collator=collate,
        callbacks=[keep], **options,
    )  # fmt: skip
    return trainer, keep


def losses(keep, name="loss"):
    return torch.tensor([log[name] for log in keep.logs if name in log])
