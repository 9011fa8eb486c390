"""A Trainer on each of two processes that torchrun has started: how far it is from the stock one, and its log.

TRL's too, where it is installed.
"""

import importlib.util
import json
import sys

import torch.distributed as dist

from tce_kernels.integrations.causal_lm import truncate
from tce_kernels.integrations.trainer import ThresholdSchedule, attach, mean_plus_std
from tests.integrations.tiny import llama, relative
from tests.integrations.training import arguments, losses, trainer_of

OF_TRL = "loss", "num_tokens", "entropy", "mean_token_accuracy"


def trained(folder, threshold, **options):
    model = llama()
    loss = None if threshold is None else truncate(model, threshold)
    trainer, keep = trainer_of(model, arguments(folder, 2, 2, ddp_backend="gloo", **options))
    if loss is not None:
        # Each rank sees other tokens, and all have to come to the same threshold.
        attach(trainer, loss, ThresholdSchedule(loss, mean_plus_std(0.0), at_least=0.001) if threshold < 1 else None)
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
if importlib.util.find_spec("trl") is not None:
    from tests.integrations.test_trl import trained as trained_by_trl

    stock, ours = (trained_by_trl(sys.argv[1], t, batch=2, ddp_backend="gloo")[1].logs for t in (None, 1.0))
    found["trl"] = [{name: [log[name] for log in logs if name in log] for name in OF_TRL} for logs in (stock, ours)]
everywhere = [None, None]
dist.all_gather_object(everywhere, (logs, loss.threshold.item(), loss.observed["train"].since("own").confidence))
if dist.get_rank() == 0:
    print(json.dumps({**found, "logs": everywhere}))
dist.destroy_process_group()
