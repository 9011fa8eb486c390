"""Training the small language model: the steps, one after another, whatever the loss."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .transformer import LanguageModel

CONTEXT = 64
BATCH = 8
LEARNING_RATE = 3e-3


def new_model(vocabulary: int, device: torch.device, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(vocabulary, CONTEXT).to(device)


def training_steps(
    model: LanguageModel, loss_of: Callable, tokens: Tensor, steps: int, seed: int
) -> Iterator[tuple[Tensor, Any]]:
    """Yields, after each step, the pair that loss_of(hidden, weight, target) has returned: the loss and what it saw.

    The batches follow from the seed.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    starts = torch.randint(len(tokens) - CONTEXT, (steps, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    offsets = torch.arange(CONTEXT + 1)
    for start in starts:
        batch = tokens[(start + offsets).to(tokens.device)]
        loss, seen = loss_of(model(batch[:, :-1]), model.head.weight, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss, seen
