"""torchtitan's seam: as its own losses, on one process and with FSDP2."""

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss

from tce_kernels.head import Head
from tce_kernels.integrations.torchtitan import TruncatedLinearLoss

from .tiny import relative
from .titan import LABELS, TOKENS, Model, evaluated_on_shards, gradients, trained_on_shards

EXACT = 1e-6
THRESHOLD = 0.011
N = (LABELS != -100).sum()


@pytest.mark.parametrize("valid", [None, N, torch.tensor(100.0)])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": True}])
def test_threshold_one_is_cross_entropy(options, valid):
    want, want_gradients, _ = gradients(Model(**options), CrossEntropyLoss.Config(), valid)
    chunked, chunked_gradients, _ = gradients(Model(**options), ChunkedLossWrapper.Config(num_chunks=8), valid)
    got, got_gradients, metrics = gradients(Model(**options), TruncatedLinearLoss.Config(threshold=1.0), valid)
    assert got == pytest.approx(want, rel=EXACT) and chunked == pytest.approx(want, rel=EXACT)
    assert relative(got_gradients, want_gradients) < EXACT and relative(chunked_gradients, want_gradients) < EXACT
    assert metrics["truncated"] == 0


def test_truncation_is_that_of_the_definition():
    model = Model()
    log_prob = model(TOKENS).float().log_softmax(-1).gather(-1, LABELS.clamp(min=0)[..., None])[..., 0]
    valid = LABELS != -100
    kept = valid & (log_prob.exp() <= THRESHOLD)
    assert 0 < kept.sum() < valid.sum()
    want = -(log_prob * kept).sum() / N
    want_gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(want, list(model.parameters())), strict=True)
    )
    got, got_gradients, metrics = gradients(model, TruncatedLinearLoss.Config(threshold=THRESHOLD, num_chunks=3), N)
    assert got == pytest.approx(want.item(), rel=EXACT) and relative(got_gradients, want_gradients) < EXACT
    assert metrics["truncated"].item() == pytest.approx(1 - kept.sum().item() / N.item())
    assert metrics["confidence"].item() == pytest.approx(log_prob.exp()[valid].mean().item(), rel=1e-5)
    assert 0 <= metrics["accuracy"] < 1


def test_chunks_are_as_many_as_the_configuration_says(monkeypatch):
    """Chunks of a share of all tokens, of which the ignored ones make no logits."""
    write_logits, rows = Head.write_logits, []
    monkeypatch.setattr(
        Head, "write_logits", lambda self, some, out: rows.append(len(some)) or write_logits(self, some, out)
    )
    gradients(Model(), TruncatedLinearLoss.Config(threshold=1.0, num_chunks=8), N)
    assert sum(rows) == N and max(rows) == LABELS.numel() // 8


def test_what_it_cannot_be():
    with pytest.raises(TypeError, match="loss_fn must be left out, got MSELoss.Config: this is the loss"):
        TruncatedLinearLoss.Config(loss_fn=MSELoss.Config()).build(compile_config=None)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 1.5"):
        gradients(Model(), TruncatedLinearLoss.Config(threshold=1.5), N)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("threshold", [1.0, THRESHOLD])
def test_fsdp(ranks, threshold):
    """Two ranks with a half of the rows each, which gloo averages, against one process with all of them."""
    want, want_gradients, _ = gradients(Model(), TruncatedLinearLoss.Config(threshold=threshold), N)
    results = ranks.run(trained_on_shards, 2, threshold)
    assert sum(loss for loss, _ in results) == pytest.approx(want, rel=EXACT)
    for _, found in results:
        assert relative({name: 2 * gradient for name, gradient in found.items()}, want_gradients) < EXACT


@pytest.mark.xdist_group("distributed")
def test_evaluation_puts_the_head_away_again(ranks):
    for loss, size in ranks.run(evaluated_on_shards, 2):
        assert loss > 4 and size == 0
