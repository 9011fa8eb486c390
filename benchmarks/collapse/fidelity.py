"""How long a model stays faithful, whatever it models: crossings, censoring, ratios, intervals.

The fidelity interval of a run is where its measure first falls below a level, interpolated linearly between the
generations. A run that never does is censored: its interval is at least its last position.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Crossing(NamedTuple):
    position: np.ndarray
    censored: np.ndarray  # never below the level: position is the last one


class Estimate(NamedTuple):
    """A median over seeds and the ends of its 95% bootstrap interval, NaN if there is none."""

    median: float
    low: float
    high: float
    at_least: bool = False  # a lower bound, since at least half of the seeds are censored

    def __str__(self) -> str:
        if np.isnan(self.median):
            return "n/a"
        return f"{'≥ ' if self.at_least else ''}{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def crossing(positions: np.ndarray, values: np.ndarray, level: float | np.ndarray) -> Crossing:
    """positions: (G,) increasing; values: (..., G); level: a number or (...). Positions and truth values (...).

    A curve that starts below the level crosses it at the first position.
    """
    positions, values = np.asarray(positions, float), np.asarray(values, float)
    level = np.broadcast_to(level, values.shape[:-1])[..., None]
    below = values < level
    first = below.argmax(-1)[..., None]
    after = np.maximum(first, 1)
    left, right = (np.take_along_axis(values, after - shift, -1) for shift in (1, 0))
    share = np.divide(left - level, left - right, out=np.zeros(left.shape), where=(left > right) & (left >= level))
    between = positions[after - 1] + share * (positions[after] - positions[after - 1])
    fell = below.any(-1)
    return Crossing(np.where(fell, between[..., 0], positions[-1]), ~fell)


def within(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Distance to the nearer end of a band, on a logarithmic scale: negative outside, on whichever side."""
    return np.minimum(np.log(values / low), np.log(high / values))


class Sample(NamedTuple):
    """A measure of one arm: first as it is, then with seeds and items drawn again, DRAWS times."""

    means: np.ndarray  # (1 + DRAWS, seeds, G), over the items
    seeds: np.ndarray  # (1 + DRAWS, seeds): which seeds are drawn


def resample(values: np.ndarray) -> Sample:
    """values: (seeds, G), or (seeds, G, items) where the measure is a mean over items.

    The same draws for every arm: arms that are compared share seeds and items, and differ in nothing else. Each draw
    takes items first and then seeds, both with replacement.
    """
    values = np.asarray(values, float)
    if values.ndim == 2:
        values = values[..., None]
    n_seeds, _, n_items = values.shape
    random = np.random.default_rng(0)
    counts = random.multinomial(n_items, np.full(n_items, 1 / n_items), DRAWS)
    counts = np.concatenate([np.ones((1, n_items)), counts])
    seeds = np.concatenate([np.arange(n_seeds)[None], random.integers(n_seeds, size=(DRAWS, n_seeds))])
    # Divided last: 450 of 600 right items are then exactly 0.75, and not below it.
    return Sample(np.moveaxis(values @ counts.T, -1, 0) / n_items, seeds)


def mean_curve(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds (G,) and the ends of its 95% interval."""
    means = np.take_along_axis(sample.means, sample.seeds[..., None], 1).mean(1)
    return means[0], *np.quantile(means[1:], [0.025, 0.975], axis=0)


def interval(positions: np.ndarray, sample: Sample, level: float | np.ndarray) -> Estimate:
    """The fidelity interval. `level`: a number or one for each of (1 + DRAWS, seeds)."""
    found = crossing(positions, sample.means, level)
    return _estimate(found.position, sample.seeds, _mostly(found.censored))


def ratio(
    positions: np.ndarray,
    sample: Sample,
    baseline: Sample,
    level: float | np.ndarray,
    baseline_level: float | np.ndarray | None = None,
) -> Estimate:
    """The fidelity interval over the baseline's, seed by seed. None if the baseline does not fall, or starts below."""
    ours = crossing(positions, sample.means, level)
    theirs = crossing(positions, baseline.means, level if baseline_level is None else baseline_level)
    if _mostly(theirs.censored) or np.median(theirs.position[0]) == positions[0]:
        return Estimate(np.nan, np.nan, np.nan)
    ratios = np.divide(
        ours.position, theirs.position, out=np.full(ours.position.shape, np.nan), where=theirs.position > 0
    )
    return _estimate(ratios, sample.seeds, _mostly(ours.censored))


def _mostly(censored: np.ndarray) -> bool:
    return bool(censored[0].mean() >= 0.5)


def _estimate(values: np.ndarray, seeds: np.ndarray, at_least: bool) -> Estimate:
    """NaN are seeds without a value: they count for nothing, nor do draws of such seeds alone."""
    drawn = np.take_along_axis(values, seeds, 1)
    medians = np.nanmedian(drawn[~np.isnan(drawn).all(1)], 1)
    return Estimate(float(np.nanmedian(values[0])), *np.quantile(medians, [0.025, 0.975]).tolist(), at_least)
