"""Bigram models of characters: truncated cross-entropy against its exact fixed point.

For one context with target distribution q, a softmax p over all categories and a threshold >= 1/2, the expected
gradient of truncated cross-entropy drives p to cap(q): q itself where no category exceeds the threshold, otherwise

    p_top = threshold,   p_j = (1 - threshold) q_j / (1 - q_top).

Proof. Let m_t = [p_t <= threshold]. The expected gradient of logit j is

    g_j = sum_t q_t m_t (p_j - [t == j]) = p_j sum_t q_t m_t - q_j m_j.

(1) As long as all p are at most the threshold, g = p - q, the gradient of cross-entropy, which is convex in the
logits with its minimum at p = q. If q_top <= threshold, p = q is the fixed point.
(2) If q_top > threshold, g_top = p_top - q_top < 0 wherever p_top <= threshold: descent raises the logit. Where
p_top > threshold, m_top = 0 (no other category can exceed a threshold >= 1/2 as well), so g_top = p_top (1 - q_top) > 0
and descent lowers it. The threshold is thus approached from both sides and never left: descent slides along
p_top = threshold, the top category taking part for a share m of the time. There g_j = p_j (m q_top + 1 - q_top) - q_j
for j != top, which is zero for p_j proportional to q_j, and p sums to one. With it, g_top = 0 asks for
m = threshold (1 - q_top) / (q_top (1 - threshold)), which lies in [0, 1] exactly if q_top >= threshold. On the sliding
surface the other logits descend the convex cross-entropy of q_j / (1 - q_top), so they get there from everywhere. QED

So truncation leaves a context alone until its top probability exceeds the threshold, and caps it then, without
changing the argmax or the proportions of the rest. cap(cap(q)) = cap(q): with honest sampling nothing drifts. Sampling
at a temperature T < 1 raises all odds to the power 1 / T, generation after generation: in the end only the top two of
a context are left. The cap protects the share of the rest, and not what is in it.
"""

import functools
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tce_kernels import focal_cross_entropy, truncated_cross_entropy

from . import corpus
from .engine import Experiment, Run
from .groups import column

ALPHABET = string.ascii_lowercase + " .,"  # and one more, for everything else
THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
DECODERS = {"T=1": 1.0, "T=0.7": 0.7}
EXACT, TRAINED = "exact", "trained"
FAILURE = 0.5  # of the real text's entropy per character
CHAINS, LENGTH = 512, 256  # of the text that a generation is trained on


def runs(quick: bool, seeds: int, paths: tuple[str, ...]) -> list[Run]:
    """The exact recursion has no noise, so one seed; a trained model sees a text of its predecessor."""
    generations = 6 if quick else 20
    rules = {"cross-entropy": ("truncated", 1.0)} | {f"TCE {t}": ("truncated", t) for t in THRESHOLDS}
    trained = rules | {"focal 2": ("focal", 2.0)}
    if quick:
        trained = {arm: rules[arm] for arm in ("cross-entropy", "TCE 0.9")}
    config = corpus.identity(paths)
    found = []
    for decoder, temperature in DECODERS.items():
        for kind, arms, n in ((EXACT, rules, 1), (TRAINED, trained, seeds)):
            found += [
                Run(
                    "categorical", f"{kind}, {decoder}", arm, seed, generations,
                    config | dict(temperature=temperature, steps=300), dict(rule=rule),
                )
                for arm, rule in arms.items()
                for seed in range(n)
            ]  # fmt: skip
    return found


@functools.cache
def bigrams(paths: tuple[str, ...], sha256: str) -> Tensor:
    """Which character follows which in the text: (V, V) frequencies, each row of sum 1, in float64."""
    text = corpus.read(paths, sha256).lower()
    index = {character: i for i, character in enumerate(ALPHABET)}
    codes = torch.tensor([index.get(character, len(ALPHABET)) for character in text])
    return normalised(count(codes[:-1], codes[1:], len(ALPHABET) + 1))


def count(context: Tensor, following: Tensor, V: int) -> Tensor:
    return torch.bincount(context * V + following, minlength=V * V).view(V, V).double()


def normalised(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True)


def cap(q: Tensor, threshold: float) -> Tensor:
    """The fixed point of truncated cross-entropy, for targets q (..., V)."""
    top, at = q.max(-1, keepdim=True)
    capped = (q * ((1 - threshold) / (1 - top).clamp(min=torch.finfo(q.dtype).tiny))).scatter(-1, at, threshold)
    return torch.where(top > threshold, capped, q)


def sharpened(q: Tensor, temperature: float) -> Tensor:
    return normalised(q ** (1 / temperature))


def descend(logits: Tensor, draw: Callable[[], tuple[Tensor, Tensor]], rule: tuple[str, float], steps: int) -> Tensor:
    """Stochastic gradient descent on the logits (C, V); `draw` gives a batch of contexts and targets.

    The gradient of a context is divided by how often the batch has it, so that rare ones learn as fast. Steps fall from
    50, since probabilities near 0 hardly move their logits, to 0.01, since p goes up and down at the threshold. Returns
    the mean distributions of the last third of the steps.
    """
    loss_function = {"truncated": truncated_cross_entropy, "focal": focal_cross_entropy}[rule[0]]
    table, mean = logits.clone(), torch.zeros_like(logits)
    for step in range(steps):
        context, target = draw()
        weight = 1 / torch.bincount(context, minlength=len(table))[context]
        table.requires_grad_()
        loss = loss_function(table[context], target, rule[1], token_weight=weight.to(table.dtype), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, table)
        table = table.detach() - 50 * 5000 ** (-step / steps) * gradient
        if step >= steps * 2 // 3:
            mean += table.softmax(-1)
    return normalised(mean)


def begin(run: Run, shared: Path) -> Tensor:
    return bigrams(tuple(run.config["corpus"]), run.config["sha256"])


def advance(run: Run, q: Tensor, generation: int) -> tuple[Tensor, dict]:
    """The model of generation 0 has learnt the real bigrams, each later one those of its predecessor."""
    if run.setting.startswith(EXACT):
        source = sharpened(q, run.config["temperature"]) if generation else q
        p = cap(source, run.options["rule"][1])
    else:
        random = torch.Generator().manual_seed(1000 * run.seed + generation)
        context, following = _text(q, run.config["temperature"] if generation else 1.0, random)
        p = _trained(context, following, run, random)
    real = bigrams(tuple(run.config["corpus"]), run.config["sha256"])
    frequency = _stationary(real)
    return p, dict(
        position=generation,
        entropy=(frequency * _entropy(p)).sum().item(),
        real_entropy=(frequency * _entropy(real)).sum().item(),
        real_over_model=(frequency * _divergence(real, p)).sum().item(),
        model_over_real=(frequency * _divergence(p, real)).sum().item(),
        above_threshold=(p.amax(-1) > 0.9).double().mean().item(),
    )


def entropy_kept(rows: list[dict]) -> np.ndarray:
    """Fidelity: entropy per character, over that of the real text."""
    return column(rows, "entropy") / column(rows, "real_entropy")


def _text(q: Tensor, temperature: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contexts and what follows, of CHAINS texts of LENGTH characters each."""
    below = sharpened(q, temperature).cumsum(-1)
    codes = [torch.randint(len(q), (CHAINS,), generator=random)]
    for _ in range(LENGTH):
        noise = torch.rand(CHAINS, 1, generator=random, dtype=q.dtype)
        codes.append(torch.searchsorted(below[codes[-1]], noise, right=True).squeeze(1).clamp(max=len(q) - 1))
    codes = torch.stack(codes)
    return codes[:-1].flatten(), codes[1:].flatten()


def _trained(context: Tensor, following: Tensor, run: Run, random: torch.Generator) -> Tensor:
    """A new model of the text; a context that does not occur in it is left at equal probabilities."""
    V = len(ALPHABET) + 1

    def draw():
        batch = torch.randint(len(context), (4096,), generator=random)
        return context[batch], following[batch]

    return normalised(descend(torch.zeros(V, V), draw, tuple(run.options["rule"]), run.config["steps"]).double())


def _stationary(q: Tensor) -> Tensor:
    frequency = torch.full((len(q),), 1 / len(q), dtype=q.dtype)
    for _ in range(200):
        frequency = frequency @ q
    return frequency


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, with q's zeros taken for 1e-10."""
    return torch.special.xlogy(p, p / q.clamp(min=1e-10)).sum(-1)


EXPERIMENT = Experiment(begin, advance)
