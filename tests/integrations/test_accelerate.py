"""Loops of accelerate: parts of a batch against the whole, half precision."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.state import AcceleratorState, GradientState

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe

from .tiny import collate, data, llama, relative

EXACT = 1e-6


def gradients(batch, threshold=None, precision="no"):
    """Of eight rows, and their loss; of the stock model if there is no threshold."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    model = llama()
    loss = None if threshold is None else truncate(model, threshold)
    steps = 8 // batch
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps, mixed_precision=precision)
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    rows = data(8)
    n = (collate(rows)["labels"][:, 1:] != -100).sum()
    total = 0.0
    for i in range(steps):
        with accelerator.accumulate(wrapped):
            value = wrapped(**collate(rows[batch * i : batch * (i + 1)]), num_items_in_batch=n, use_cache=False).loss
            accelerator.backward(value * steps)  # it divides by the steps, the loss by all tokens of all of them
            total += value.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}, loss


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("threshold", [1.0, 0.0099])
def test_accumulation_is_the_whole_batch(threshold, precision, monkeypatch):
    compute, made = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: made.append(recipe) or compute(recipe))
    want, want_gradients, _ = gradients(8, threshold, precision)
    got, got_gradients, loss = gradients(2, threshold, precision)
    exact = EXACT if precision == "no" else 2e-2  # bfloat16 has 8 bits, and a gradient passes many roundings
    assert got == pytest.approx(want, rel=max(EXACT, exact / 10))
    assert relative(got_gradients, want_gradients) < exact
    assert loss.observed["train"].since("test").n_calls == 4 and not made
    if threshold == 1.0:
        stock, stock_gradients, _ = gradients(8, None, precision)
        assert want == pytest.approx(stock, rel=max(EXACT, exact / 10))
        assert relative(want_gradients, stock_gradients) < exact
