"""What torchtitan's Trainer asks of a model, and does with its loss."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper

from tce_kernels.integrations.torchtitan import TruncatedLinearLoss

from .tiny import V

generator = torch.Generator().manual_seed(1)
TOKENS, LABELS = (torch.randint(V, (4, 16), generator=generator) for _ in range(2))
LABELS[:, :5] = -100


class Model(nn.Module):
    def __init__(self, tied=False, bias=False):
        torch.manual_seed(0)
        super().__init__()
        self._skip_lm_head = False
        self.embedding = nn.Embedding(V, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.lm_head = nn.Linear(32, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.layer(self.embedding(tokens) * 0.3)
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def gradients(model, config, valid, tokens=TOKENS, labels=LABELS):
    """Loss, gradients by name, and metrics of a step, as the Trainer makes it."""
    loss_function = config.build(compile_config=None)
    if isinstance(loss_function, ChunkedLossWrapper):
        loss_function.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    model.zero_grad()
    loss, metrics = loss_function(model(tokens), labels, valid)
    loss.backward()
    full = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }
    return loss.item(), full, metrics


def sharded(here):
    model, mesh = Model(), here.mesh()
    for part in (model.layer, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    own = slice(2 * here.rank, 2 * here.rank + 2)
    return model, TOKENS[own], LABELS[own]


def trained_on_shards(here, threshold):
    model, tokens, labels = sharded(here)
    for _ in range(2):  # the second one from shards that the first has left
        result = gradients(
            model, TruncatedLinearLoss.Config(threshold=threshold), (LABELS != -100).sum(), tokens, labels
        )
    return result[:2]


def evaluated_on_shards(here):
    model, tokens, labels = sharded(here)
    loss_function = TruncatedLinearLoss.Config(threshold=1.0).build(compile_config=None)
    loss_function.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    with torch.no_grad():
        hidden = model(tokens)
        model.lm_head.unshard()
        whole = model.lm_head.weight
        model.lm_head.reshard()
        loss, _ = loss_function(hidden, labels, (labels != -100).sum())
    return loss.item(), whole.untyped_storage().size()
