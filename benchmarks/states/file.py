"""The file of hidden states: what a model's lm-head multiplies, by what, and which token was right."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class States(NamedTuple):
    """logits = logit_scale * (input @ linear_weight.T + linear_bias), then softcap * tanh(logits / softcap)."""

    input: Tensor  # [N, D]
    linear_weight: Tensor  # [V, D], of the same dtype
    target: Tensor  # [N] int64
    linear_bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    description: str  # one line: model, text, sizes


def save(states: States, path: Path) -> None:
    torch.save({name: _alone(value) for name, value in states._asdict().items()}, path)


def load(path: Path, device: torch.device) -> States:
    """Raises ValueError if the file holds something else."""
    saved = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(saved, dict) or set(saved) != set(States._fields):
        raise ValueError(f"a file of hidden states has {', '.join(States._fields)}, which {path.name} has not")
    return States(**saved)


def _alone(value):
    """Without the rest of the memory that a view is of, and without a graph."""
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
