"""Gaussian mixtures fitted again and again to their own samples: Algorithm 2 of the paper, and what would balance it.

Real data are 1,000 points of one Gaussian N(0, I) in the plane; the model is a mixture of two. Without truncation
the fit shrinks a little at every generation, since 1,000 points are a finite sample. Algorithm 2 drops the points of
which the model is most confident: those of the highest density, a share 1 - gamma. For one Gaussian these are the
points with r^2 < -2 ln gamma, and since r^2 / 2 is exponentially distributed,

    E[r^2 | kept] / E[r^2] = 1 - ln gamma,

1.22 for the paper's gamma = 0.8: the variance grows by that factor at every generation, and the model explodes. A gamma
that balances a shrinking by the factor s is exp(1 - 1/s), next to 1.
"""

import math
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.mixture import GaussianMixture

from .engine import Experiment, Run

N = 1000
BALANCED, DENSITY = "balanced", "density below 0.8"
ARMS = {"no truncation": None, "gamma 0.8": 0.8, "gamma 0.95": 0.95, "gamma 0.99": 0.99, BALANCED: None, DENSITY: None}
CALIBRATION = 10  # generations, and as many mixtures, whose shrinking the balanced gamma undoes
FAILURE = 0.1  # KL(real || model) in nats: two-sided, it grows when the model contracts and when it explodes
REAL_POINTS = 5000


def runs(quick: bool, seeds: int) -> list[Run]:
    arms = ARMS | {BALANCED: balanced_gamma()}
    config = dict(n=N)
    return [
        Run("gmm", "percentile", arm, seed, 60 if quick else 200, config, dict(gamma=gamma))
        for arm, gamma in arms.items()
        for seed in range(seeds)
    ]


def balanced_gamma() -> float:
    """exp(1 - 1/s), s measured on mixtures that are not among the runs."""
    log_shrinking = []
    for i in range(CALIBRATION):
        random = np.random.default_rng([1_000_000, i])
        x = random.standard_normal((N, 2))
        first = fit(x, 0)
        mixture = first
        for generation in range(CALIBRATION):
            mixture = fit(sample(mixture, N, i * CALIBRATION + generation), 0)
        log_shrinking.append(math.log(scale(mixture) / scale(first)) * 2 / CALIBRATION)
    return math.exp(1 - math.exp(-np.mean(log_shrinking)))


def fit(x: np.ndarray, seed: int) -> GaussianMixture:
    return GaussianMixture(2, tol=1e-5, max_iter=2000, random_state=seed).fit(x)


def sample(mixture: GaussianMixture, n: int, seed: int) -> np.ndarray:
    mixture.set_params(random_state=seed)
    return mixture.sample(n)[0]


def scale(mixture: GaussianMixture) -> float:
    """Standard deviation of the whole mixture in one dimension."""
    weights, means = mixture.weights_, mixture.means_
    spread = np.einsum("k,kii->", weights, mixture.covariances_)
    return math.sqrt((spread + weights @ np.square(means - weights @ means).sum(1)) / 2)


def begin(run: Run, shared: Path) -> np.ndarray:
    return np.random.default_rng([run.seed, 0]).standard_normal((run.config["n"], 2))


def advance(run: Run, x: np.ndarray, generation: int) -> tuple[np.ndarray, dict]:
    """Fit x, look at the fit, and sample the next generation's x from it, truncated."""
    mixture = fit(x, run.seed)
    real = np.random.default_rng([run.seed, 1]).standard_normal((REAL_POINTS, 2))
    log_p0 = -np.square(real).sum(1) / 2 - math.log(2 * math.pi)
    points = sample(mixture, run.config["n"], 1000 * run.seed + generation)
    figures = dict(
        position=generation,
        real_over_model=(log_p0 - mixture.score_samples(real)).mean(),
        scale=scale(mixture),
        energy_distance=energy_distance(real[: len(points)], points),
    )
    log_density = mixture.score_samples(points)
    if run.arm == DENSITY:
        kept = np.exp(log_density) <= 0.8
    elif run.options["gamma"] is None:
        kept = np.ones(len(points), bool)
    else:
        kept = log_density <= np.quantile(log_density, run.options["gamma"])
    return points[kept], figures | dict(kept=kept.mean())


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


EXPERIMENT = Experiment(begin, advance)
