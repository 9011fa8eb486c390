"""One-dimensional Gaussians fitted again and again to their own samples: Fig. 2 and Fig. 11 of the paper.

Fig. 2: the sampler is biased, x ~ N(0, (lambda sigma)^2) with lambda = 0.9, and only samples in the tails are kept.
With z = x / (lambda sigma), keeping |z| >= b multiplies the variance by

    eta(b) = E[z^2 | |z| >= b] = 1 + b phi(b) / (1 - Phi(b)),        so sigma'^2 = lambda^2 eta(b) sigma^2.

The paper writes lambda instead of lambda^2. It does not define what its "TCE 0.85" cuts at; two definitions are here:
"model's quantile", |x| < a sigma with P(|Z| < a) = 1 - gamma, so b = a / lambda, and "samples' quantile", so b = a.

Fig. 11: nothing is dropped; mean and deviation are estimated from 10,000 samples, drawn from those of the generation
before with or without resampling them first (bootstrap), and are exact or multiplied with N(1, 0.1^2) noise.
"""

import math
from pathlib import Path

import numpy as np
from scipy.stats import norm

from .engine import Experiment, Run
from .fidelity import within
from .groups import column

N = 10_000
BIAS = 0.9  # lambda
GAMMAS = {"all samples": 1.0, "gamma 0.85": 0.85, "gamma 0.83": 0.83, "gamma 0.80": 0.80}
FIGURE_11_ARMS = {
    f"{noisy}, {fresh}": dict(bootstrap=bootstrap, noise=noise)
    for fresh, bootstrap in (("bootstrap", True), ("fresh samples", False))
    for noisy, noise in (("exact", 0.0), ("noisy", 0.1))
}
ARMS = [*GAMMAS, *FIGURE_11_ARMS]
MODEL, SAMPLES = "model's quantile", "samples' quantile"
FIGURE_11 = "no truncation"
SETTINGS = [MODEL, SAMPLES, FIGURE_11]
BAND = (0.5, 2.0)  # of sigma, 1 at first
EVERY = 20  # generations of Fig. 11 in one row


def runs(quick: bool, seeds: int) -> list[Run]:
    long = 200 if quick else 1000
    found = []
    for seed in range(seeds):
        for definition in (MODEL, SAMPLES):
            for arm, gamma in GAMMAS.items():
                config = dict(n=N, bias=BIAS)
                found.append(Run("gaussian", definition, arm, seed, 50, config, dict(gamma=gamma)))
        for arm, options in FIGURE_11_ARMS.items():
            config = dict(n=N, every=EVERY)
            found.append(Run("gaussian", FIGURE_11, arm, seed, 1 + long // EVERY, config, options))
    return found


def begin(run: Run, shared: Path) -> np.ndarray | float:
    """Fig. 11: the data. Fig. 2: the deviation that generation 0 samples from, unbiased."""
    return _random(run, 0).standard_normal(run.config["n"]) if run.setting == FIGURE_11 else 1.0


def advance(run: Run, state: np.ndarray | float, generation: int) -> tuple[np.ndarray | float, dict]:
    if run.setting == FIGURE_11:
        return _redraw(run, state, generation)
    bias = run.config["bias"] if generation else 1.0
    x = bias * state * _random(run, generation).standard_normal(run.config["n"])
    gamma = run.options["gamma"]
    if run.setting == MODEL:
        kept = np.abs(x) >= norm.isf(gamma / 2) * state
    else:
        kept = np.abs(x) >= np.quantile(np.abs(x), 1 - gamma)
    sigma = math.sqrt(np.square(x[kept]).mean())
    return sigma, dict(position=generation, sigma=sigma, kept=kept.mean())


def _redraw(run: Run, x: np.ndarray, row: int) -> tuple[np.ndarray, dict]:
    every, noise = run.config["every"], run.options["noise"]
    for generation in range((row - 1) * every + 1, row * every + 1) if row else ():
        random = _random(run, generation)
        if run.options["bootstrap"]:
            x = random.choice(x, len(x))
        mean, sigma = np.array([x.mean(), x.std()]) * (1 + noise * random.standard_normal(2))
        x = mean + abs(sigma) * random.standard_normal(len(x))
    return x, dict(position=row * every, sigma=x.std())


def variance_factor(gamma: float, bias: float, definition: str) -> float:
    """lambda^2 eta(b) of one generation."""
    a = norm.isf(gamma / 2)
    b = a / bias if definition == MODEL else a
    return bias**2 * (1 + b * norm.pdf(b) / norm.sf(b))


def distance_to_band(rows: list[dict]) -> np.ndarray:
    """Fidelity: negative where sigma has left the band."""
    return within(column(rows, "sigma"), *BAND)


def _random(run: Run, generation: int) -> np.random.Generator:
    return np.random.default_rng([run.seed, generation])


EXPERIMENT = Experiment(begin, advance)
