"""Lightning modules around a truncated model."""

import logging

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.lazy import Recipe

from .tiny import collate, data, llama

THRESHOLD = 0.0099
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:::lightning.*")


class Module(lightning.LightningModule):
    def __init__(self, threshold, by_definition=False):
        super().__init__()
        self.model, self.seen = llama(), []
        self.threshold, self.by_definition = threshold, by_definition
        self.truncated = None if by_definition else truncate(self.model, threshold)

    def training_step(self, batch, index):
        if self.by_definition:
            logits, labels = self.model(**batch).logits[:, :-1].float(), batch["labels"][:, 1:]
            log_prob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            kept = (labels != -100) & (log_prob.exp() <= self.threshold)
            loss = -log_prob.where(kept, 0.0).sum() / (labels != -100).sum()
        else:
            loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("threshold", [1.0, THRESHOLD])
def test_it_trains_as_the_definition_does(threshold, tmp_path, monkeypatch):
    compute, made = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda recipe: made.append(recipe) or compute(recipe))
    seen = []
    rows = data(8)
    batches = [collate(rows[i : i + 2]) for i in range(0, 8, 2)]
    for by_definition in (True, False):
        module = Module(threshold, by_definition)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        seen.append((module.seen, module.model.state_dict()))
    (want, want_state), (got, got_state) = seen
    assert got == pytest.approx(want, rel=1e-5) and len(set(got)) == 4 and not made
    for name in want_state:
        torch.testing.assert_close(got_state[name], want_state[name], atol=1e-6, rtol=0)
