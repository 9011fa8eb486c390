"""A Trainer on each of two processes that torchrun has started: how far it is from the stock one, and its log."""

import json
import sys

import torch.distributed as dist

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.trainer import ThresholdSchedule, attach, quantile
from tests.integrations.tiny import llama, relative
from tests.integrations.training import arguments, losses, trainer_of


def trained(folder, threshold, **options):
    model = llama()
    loss = None if threshold is None else truncate(model, threshold)
    trainer, keep = trainer_of(model, arguments(folder, 2, 2, ddp_backend="gloo", **options))
    if loss is not None:
        # Each rank sees other tokens, and all have to come to the same threshold.
        attach(trainer, loss, ThresholdSchedule(loss, quantile(0.5), at_least=0.001) if threshold < 1 else None)
    trainer.train()
    return keep, loss


found = {}
for average in (True, False):
    (want, _), (got, _) = (trained(sys.argv[1], t, average_tokens_across_devices=average) for t in (None, 1.0))
    found[f"average {average}"] = (
        (losses(got) / losses(want) - 1).abs().max().item(),
        relative(got.gradients, want.gradients),
    )
keep, loss = trained(sys.argv[1], 0.0099)
logs = [{name: log[name] for name in ("truncated", "confidence", "threshold")} for log in keep.logs if "loss" in log]
everywhere = [None, None]
dist.all_gather_object(everywhere, (logs, loss.threshold.item(), loss.observed["train"].since("own").confidence))
if dist.get_rank() == 0:
    print(json.dumps({**found, "logs": everywhere}))
dist.destroy_process_group()
