"""What a loss has seen of its tokens, summed up for whoever asks."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from tce_kernels import LossStats

N_BINS = 20
N_SUMS = 9 + N_BINS


class Statistics(NamedTuple):
    """Of the tokens between two looks: their number, means over them, and how many have each confidence.

    truncated: share that has no gradient.  accuracy: share whose target is the most probable class.
    confidence, confidence_std: mean and standard deviation of the target's probability.
    cross_entropy: mean of -log p, truncated tokens included, in nats.
    histogram: how many tokens have a confidence in each of 20 equal bins of [0, 1].
    entropy: mean entropy of the predicted distribution, in nats; None unless the loss was asked for it.
    n_calls: how many calls of the loss they are from.
    All are 0 where there are no tokens, but n_calls, and entropy, which is None.
    """

    n_tokens: int
    truncated: float
    accuracy: float
    confidence: float
    confidence_std: float
    cross_entropy: float
    histogram: tuple[int, ...]
    entropy: float | None = None
    n_calls: int = 0


class Observed:
    """Sums over the tokens of all calls, on the device of the loss. They only grow: no reader resets another's.

    Left out are ignored tokens, and those whose log-probability is not finite: one NaN would stay in the sums for good.
    """

    def __init__(self):
        self.sums: torch.Tensor | None = None
        self.marks: dict[str, torch.Tensor] = {}

    def add(self, stats: LossStats) -> None:
        """The tokens of one call. No synchronisation."""
        counted = stats.valid & stats.log_prob.isfinite()
        log_prob = stats.log_prob.where(counted, 0.0)
        p = log_prob.exp().where(counted, 0.0)
        nothing = torch.zeros_like(p)
        of_entropy = (nothing, nothing) if stats.entropy is None else (stats.entropy.where(counted, 0.0), counted)
        fields = counted, counted & ~stats.kept, counted & stats.correct, p, p * p, -log_prob, *of_entropy
        bins = (p * N_BINS).floor().clamp(max=N_BINS - 1).where(counted, -1.0)
        in_bin = bins.reshape(-1, 1) == torch.arange(N_BINS, device=bins.device)
        dtype = torch.float32 if p.device.type == "mps" else torch.float64  # which has nothing wider
        sums = [torch.stack([field.to(dtype).reshape(-1) for field in fields]).sum(1), in_bin.sum(0).to(dtype)]
        one = torch.ones(1, dtype=dtype, device=p.device)
        with torch.inference_mode(False):  # or they could not be added to outside of it
            nothing = torch.zeros(N_SUMS, dtype=dtype, device=p.device)
            self.sums = nothing if self.sums is None else self.sums.to(p.device)
        self.sums += torch.cat([one, *sums])

    def since(self, mark: str, reduce: bool = False) -> Statistics:
        """The tokens since the last call with the same mark, or all if there was none; waits for the device.

        reduce: of all ranks, if there are several; call it on all of them.
        """
        several = reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        sums = self.sums
        if sums is None:  # other ranks may have some
            device = "cuda" if several and "nccl" in dist.get_backend() else "cpu"
            sums = torch.zeros(N_SUMS, dtype=torch.float64, device=device)
        new = sums - self.marks[mark].to(sums) if mark in self.marks else sums.clone()
        self.marks[mark] = sums.clone()
        if several:
            dist.all_reduce(new)
        n_calls, n, truncated, correct, p, p_squared, cross_entropy, entropy, n_entropy, *histogram = new.tolist()
        if not n:
            return Statistics(0, 0.0, 0.0, 0.0, 0.0, 0.0, (0,) * N_BINS, n_calls=int(n_calls))
        mean = p / n
        return Statistics(
            n_tokens=int(n),
            truncated=truncated / n,
            accuracy=correct / n,
            confidence=mean,
            confidence_std=max(p_squared / n - mean * mean, 0.0) ** 0.5,
            cross_entropy=cross_entropy / n,
            histogram=tuple(map(int, histogram)),
            entropy=entropy / n_entropy if n_entropy else None,
            n_calls=int(n_calls),
        )
