"""torchtitan's seam for a loss that takes hidden states: config.loss = TruncatedLinearLoss.Config(threshold=0.9)."""

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss

from tce_kernels import linear_truncated_cross_entropy


class TruncatedLinearLoss(ChunkedLossWrapper):
    """lm-head and truncated cross-entropy in one, which the Trainer gives the head as it does to a ChunkedLossWrapper.

    `loss_fn(hidden, labels, global_valid_tokens)` is the loss, and what it adds to truncated share, confidence and
    accuracy of the step. With FSDP2 the head has to be a unit of its own, as in torchtitan's models. Never compiled.

    Raises:
        TypeError: a `loss_fn` in the configuration, whose place it takes; heads that tensor parallelism has split.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        threshold: float = 0.9
        """Tokens whose probability is above it are dropped, in (0, 1]."""

    def __init__(self, config: Config, *, compile_config=None):
        if type(config.loss_fn) is not CrossEntropyLoss.Config:
            raise TypeError(
                f"loss_fn must be left out, got {type(config.loss_fn).__qualname__}: this is the loss itself"
            )
        super().__init__(config)
        self.threshold = config.threshold

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        head = self.lm_head
        is_sharded = isinstance(head, FSDPModule)
        if is_sharded:
            head.unshard()  # which its forward would do
        if isinstance(pred, DTensor) or isinstance(head.weight, DTensor):
            raise TypeError("the lm-head must be whole, got one of tensor parallelism: leave ChunkedLossWrapper there")
        how = {"reduction": "sum"} if global_valid_tokens is None else {"denominator": global_valid_tokens}
        loss, stats = linear_truncated_cross_entropy(
            pred, head.weight, labels, self.threshold, linear_bias=head.bias, ignore_index=IGNORE_INDEX,
            chunk_size=-(-labels.numel() // self.num_chunks) or 1, return_stats=True, **how,
        )  # fmt: skip
        if is_sharded and not torch.is_grad_enabled():
            head.reshard()  # which backward would do
        n = stats.n_valid if global_valid_tokens is None else global_valid_tokens
        confidence = stats.log_prob.exp().where(stats.valid, 0.0).sum()
        sums = {"truncated": stats.n_valid - stats.n_kept, "confidence": confidence, "accuracy": stats.correct.sum()}
        return loss, {name: value / n for name, value in sums.items()}
