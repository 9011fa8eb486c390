"""Thresholds that change in training: with its progress, or with the confidence that the tokens have had so far.

A rule is called with the progress of training, in [0, 1], and the `Statistics` of the tokens since its last call, or
None if there were none. It returns a threshold, or None: leave it as it is. Rules that follow the statistics keep
running sums, so each training needs one of its own; they can be copied and pickled half-way. What they return may lie
outside (0, 1]: who sets the threshold clamps it, with a floor, or it would follow down the confidence that it holds
down.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from numbers import Real

from .observed import N_BINS, Statistics


@dataclass
class linear:
    """From `start` to `end` in the first `warmup` of training, and `end` from then on. It needs no statistics.

    Args:
        start, end: thresholds, in (0, 1].
        warmup: a share of training, in (0, 1]. What is at its end at once is no schedule.

    Raises ValueError and TypeError for other values.
    """

    start: float
    end: float
    warmup: float

    def __post_init__(self):
        for name in ("start", "end", "warmup"):
            _check(name, getattr(self, name), lambda value: 0 < value <= 1, "in (0, 1]")

    def __call__(self, progress: float, statistics: Statistics | None = None) -> float:
        done = min(progress / self.warmup, 1)
        return (1 - done) * self.start + done * self.end  # exact at both ends


@dataclass
class quantile:
    """The confidence that a share `keep` of the observed tokens does not exceed.

    Taken from the histogram's 20 bins, by straight lines inside them: a cap in [0.95, 1] says little but that.

    Args:
        keep: share of the tokens, in (0, 1).
        decay: how much the tokens seen so far count at the next call, in [0, 1]. 0: not at all; 1: as much as new ones.

    Raises ValueError and TypeError for other values.
    """

    keep: float
    decay: float = 0.9
    counts: list[float] = field(default_factory=lambda: [0.0] * N_BINS, init=False, repr=False)

    def __post_init__(self):
        _check("keep", self.keep, lambda value: 0 < value < 1, "in (0, 1)")
        _check_decay(self.decay)

    def __call__(self, progress: float, statistics: Statistics | None) -> float | None:
        if statistics is None or not statistics.n_tokens:
            return None
        self.counts = [self.decay * old + new for old, new in zip(self.counts, statistics.histogram, strict=True)]
        up_to = list(accumulate(self.counts, initial=0.0))
        wanted = self.keep * up_to[-1]  # of the same sum, so that it is in some bin whatever the rounding
        i = bisect_left(up_to, wanted)
        return (i - 1 + (wanted - up_to[i - 1]) / (up_to[i] - up_to[i - 1])) / N_BINS


@dataclass
class mean_plus_std:
    """Mean of the observed confidence plus `k` of its standard deviations, of tokens.

    The paper's code has a threshold like it: at the start of each epoch, the mean of the first batches' mean
    confidences plus k deviations of those means. They vary far less than tokens do, so its k is not this one. An older
    version put it where the densities of two fitted Gaussians meet, with a wrong sign under the root. Here is
    one mean and one deviation, so there is no such root.

    Args:
        k: any finite number.
        decay: as in `quantile`. Each call's tokens count by their number: a small batch changes little.

    Raises ValueError and TypeError for other values.
    """

    k: float
    decay: float = 0.9
    sums: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), init=False, repr=False)  # of 1, p and p^2

    def __post_init__(self):
        _check("k", self.k, math.isfinite, "finite")
        _check_decay(self.decay)

    def __call__(self, progress: float, statistics: Statistics | None) -> float | None:
        if statistics is None or not statistics.n_tokens:
            return None
        p, std = statistics.confidence, statistics.confidence_std
        moments = 1, p, p * p + std * std
        self.sums = tuple(
            self.decay * old + statistics.n_tokens * new for old, new in zip(self.sums, moments, strict=True)
        )
        n, of_p, of_squares = self.sums
        mean = of_p / n
        return mean + self.k * max(of_squares / n - mean * mean, 0.0) ** 0.5


def _check(name: str, value, holds: Callable[[float], bool], rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value}")


def _check_decay(value) -> None:
    _check("decay", value, lambda value: 0 <= value <= 1, "in [0, 1]")
