"""Language models trained again and again on text that they have rewritten: the paper's headline.

M_-1 is pretrained on a part of the corpus, with cross-entropy. Stage i goes on from M_(i-1), with a new optimiser, on
split 0 to split i; which of them are real, and how often the others have been rewritten, is the data arm's choice.
Then M_i rewrites the splits for the next stage. Fidelity is knowledge retention: the share of items about split 0
whose real continuation is more probable than one with a false word in it.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tce_kernels import LossStats, linear_focal_cross_entropy, linear_truncated_cross_entropy
from tce_kernels.integrations.observed import Observed
from tce_kernels.integrations.schedules import mean_plus_std, quantile

from .. import report
from ..training.transformer import LanguageModel, windows
from . import corpus as texts
from .corpus import Corpus
from .decoding import DECODERS, rewrite
from .engine import Experiment, Missing, Run, replace
from .measures import cross_entropy, model_figures, text_figures

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, LossStats]]  # of hidden states, weight of the head, target


def truncated(threshold: float, **options) -> Loss:
    return functools.partial(linear_truncated_cross_entropy, threshold=threshold, return_stats=True, **options)


def randomly_masked(hidden: Tensor, weight: Tensor, target: Tensor, *, threshold: float) -> tuple[Tensor, LossStats]:
    """Cross-entropy that drops as many tokens of the batch as truncation would, whichever they are."""
    with torch.no_grad():
        _, stats = linear_truncated_cross_entropy(hidden, weight, target, threshold, return_stats=True)
    kept = torch.zeros(target.numel(), device=target.device)
    # From torch's global generator, which is seeded at the start of every stage.
    kept[torch.randperm(target.numel())[: stats.n_kept].to(target.device)] = 1
    return linear_truncated_cross_entropy(
        hidden, weight, target, 1.0, token_weight=kept.view(target.shape), denominator=target.numel(), return_stats=True
    )


class Scheduled:
    """Truncation at a threshold that a rule sets before each batch, from the confidence of the batches before."""

    START, AT_LEAST = 0.9, 0.5

    def __init__(self, rule):
        self.rule, self.observed = rule, Observed()
        self.threshold = torch.tensor(self.START)

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, LossStats]:
        if (chosen := self.rule(0.0, self.observed.since("rule"))) is not None:
            self.threshold.fill_(min(max(chosen, self.AT_LEAST), 1.0))
        loss, stats = linear_truncated_cross_entropy(hidden, weight, target, self.threshold, return_stats=True)
        self.observed.add(stats)
        return loss, stats


CROSS_ENTROPY, EARLY_STOPPING = "cross-entropy", "early stopping"
LOSSES: dict[str, Loss] = {
    CROSS_ENTROPY: truncated(1.0),
    **{f"TCE {threshold}": truncated(threshold) for threshold in (0.7, 0.8, 0.9, 0.95, 0.99)},
    "focal 2": functools.partial(linear_focal_cross_entropy, gamma=2.0, return_stats=True),
    "TCE 0.9 / kept": truncated(0.9, denominator="kept"),
    "random mask 0.9": functools.partial(randomly_masked, threshold=0.9),
    "random mask 0.7": functools.partial(randomly_masked, threshold=0.7),
    "label smoothing 0.1": truncated(1.0, label_smoothing=0.1),
    EARLY_STOPPING: truncated(1.0),  # of the epochs of a stage, the best one on validation text
}
# Quantiles of the confidence, and its mean plus deviations.
RULES: dict[str, Loss] = {
    "quantile 0.9": Scheduled(quantile(0.9)),
    "quantile 0.5": Scheduled(quantile(0.5)),
    "mean + 1 std": Scheduled(mean_plus_std(1.0)),
    "mean + 0 std": Scheduled(mean_plus_std(0.0)),
}
PAPER, ACCUMULATE, SYNTHETIC, REAL = "grow and replace", "accumulate", "fully synthetic", "real only"
DATA = {
    PAPER: "all splits so far, the newest real, the older ones rewritten: the paper's",
    ACCUMULATE: "the same, and the older ones as they were, too",
    SYNTHETIC: "split 0 alone, rewritten again and again",
    REAL: "all splits so far, all as they were: what is lost without any synthetic text",
}
CONFIDENT = 0.9
FAILURE = 1.5  # KL(real || generated) of token frequencies, in nats
MAIN_DECODER = "T=0.7"
SYNTHETIC_STAGES = 4  # for one of the others, which have more to train on
PAPER_STAGES = 6


class Config(NamedTuple):
    corpus: tuple[str, ...] = ()  # paths of text files; none for Python's documentation
    sha256: str = ""  # of the text
    vocabulary: int = 1024
    D: int = 96
    n_blocks: int = 3
    n_heads: int = 4
    context: int = 64
    batch: int = 16
    learning_rate: float = 1.5e-3
    pretraining_epochs: int = 1
    epochs: int = 8  # of a stage
    n_splits: int = 8
    split_tokens: int = 6144
    prompt: int = 32
    block: int = 32
    n_items: int = 600
    n_other_items: int = 10  # of each of the other splits
    item_context: int = 40


FULL = Config()
QUICK = Config(vocabulary=512, D=64, n_blocks=2, n_splits=4, n_items=120, n_other_items=5)
PYDOC_ITEMS = 200  # about as many as a split of Python's documentation has


def planned(
    quick: bool,
    seeds: int | None,
    corpus: tuple[str, ...],
    arms: list[str] | None,
    decoders: list[str] | None,
    data: list[str] | None,
) -> list[Run]:
    config = (QUICK if quick else FULL)._replace(**texts.identity(corpus))
    if not corpus:
        config = config._replace(n_items=min(config.n_items, PYDOC_ITEMS))
    if arms or decoders or data:
        default = [CROSS_ENTROPY, "TCE 0.9"]
        return runs(config, arms or default, decoders or [MAIN_DECODER], data or [PAPER], seeds or (1 if quick else 5))
    if quick:
        return runs(config, [CROSS_ENTROPY, "TCE 0.9", "TCE 0.7"], [MAIN_DECODER], [PAPER, SYNTHETIC], seeds or 1)
    return full(config, seeds or 5, min(seeds or 3, 3))


def full(config: Config, seeds: int, side_seeds: int) -> list[Run]:
    """Fixed before any of it was run, on the grounds of trials with seed 100: see README.md."""
    main = [CROSS_ENTROPY, "TCE 0.8", "TCE 0.9", "TCE 0.95", "focal 2", "random mask 0.9", "label smoothing 0.1"]
    regime = [CROSS_ENTROPY, "TCE 0.7", "TCE 0.9", "focal 2", "random mask 0.7"]
    side = [CROSS_ENTROPY, "TCE 0.9"]
    others = [name for name in DECODERS if name != MAIN_DECODER]
    sides = runs(config, side, others, [PAPER], side_seeds) + runs(
        config, side, [MAIN_DECODER], [ACCUMULATE, REAL], side_seeds
    )
    return [
        *runs(config, main, [MAIN_DECODER], [PAPER], seeds),
        *runs(config, regime, [MAIN_DECODER], [SYNTHETIC], seeds),
        *(run._replace(generations=PAPER_STAGES) for run in sides),
    ]


def runs(config: Config, arms: list[str], decoders: list[str], data: list[str], seeds: int) -> list[Run]:
    """Seeds innermost, so that what runs side by side does not make the same pretrained model."""
    return [
        Run(
            "lm", f"{decoder}, {scheme}", arm, seed,
            (SYNTHETIC_STAGES if scheme == SYNTHETIC else 1) * config.n_splits,
            config._asdict() | dict(decoder=decoder, data=scheme),
        )
        for decoder in decoders for scheme in data for arm in arms for seed in range(seeds)
    ]  # fmt: skip


def begin(run: Run, shared: Path) -> dict:
    """The pretrained model and its figures, the same for all arms of a seed; no split has been rewritten yet."""
    config = _config(run)
    text = _corpus(config)
    path = shared / f"pretrained-{run.seed}-{_digest(config)}.pt"
    model = _model(config, run.seed)
    if path.exists():
        weights, figures = torch.load(path)
        model.load_state_dict(weights)
    else:
        tokens, epochs = text.pretraining.to(_device(model)), config.pretraining_epochs
        figures = _fit(model, tokens, CROSS_ENTROPY, config, epochs, [run.seed], text)
        figures |= model_figures(model, text, config.context)
        replace(path, lambda temporary: torch.save((model.state_dict(), figures), temporary))
    return dict(weights=model.state_dict(), before=figures, rewritten=[])


def advance(run: Run, state: dict, stage: int) -> tuple[dict, dict]:
    config = _config(run)
    text = _corpus(config)
    model = _model(config, run.seed)
    model.load_state_dict(state["weights"])
    scheme, device = run.config["data"], _device(model)
    real = list(text.splits.to(device))
    rewritten = [split.to(device) for split in state["rewritten"]]
    missing = {SYNTHETIC: min(stage, 1), REAL: 0}.get(scheme, stage) - len(rewritten)
    if missing:
        raise Missing(f"stage {stage} lacks {missing} rewritten splits in the saved state: delete it to start again")

    newest = real[stage : stage + 1]
    latest = {SYNTHETIC: rewritten or real[:1], REAL: []}.get(scheme, rewritten + newest)  # versions to train on
    originals = {ACCUMULATE: real[:stage], REAL: real[:stage] + newest}.get(scheme, [])  # beside them
    figures = dict(
        position=stage,
        # Cumulated, as the paper counts: an older split is trained on anew at every stage.
        synthetic_splits={SYNTHETIC: stage, REAL: 0}.get(scheme, stage * (stage + 1) // 2),
        floor=state["before"]["retention"],
    )
    tokens = torch.cat(latest[:-1] + originals + latest[-1:])
    figures |= _fit(model, tokens, run.arm, config, config.epochs, [run.seed, stage], text)
    figures |= model_figures(model, text, config.context)

    rewritten = []
    for k, split in enumerate(latest):
        noise = torch.rand(len(split) // config.block, config.block, generator=_generator(run.seed, stage, k))
        decoder = DECODERS[run.config["decoder"]]
        rewritten.append(rewrite(model, split, decoder, config.prompt, config.block, noise.to(device)))
    if rewritten:
        figures |= text_figures(rewritten[0].cpu(), text.splits[0], config.vocabulary)
    return state | dict(weights=model.state_dict(), rewritten=rewritten), figures


def _fit(
    model: LanguageModel, tokens: Tensor, arm: str, config: Config, epochs: int, seed: list[int], text: Corpus
) -> dict:
    """Train on tokens (n,), in blocks of a context; what the statistics of the last epoch say."""
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
    inputs, targets = windows(tokens, config.context)
    order = _generator(*seed)
    torch.manual_seed(order.initial_seed())
    loss_function = copy.deepcopy((LOSSES | RULES)[arm])  # a rule remembers what it has seen, in this stage alone
    best, best_weights = float("inf"), None
    for _ in range(epochs):
        log_probs, kept = [], 0
        for rows in torch.randperm(len(inputs), generator=order).to(tokens.device).split(config.batch):
            loss, stats = loss_function(model(inputs[rows]), model.head.weight, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log_probs.append(stats.log_prob.flatten())
            kept += stats.n_kept
        if arm == EARLY_STOPPING:
            validation = cross_entropy(model, text.validation, config.context)
            if validation < best:
                best, best_weights = validation, copy.deepcopy(model.state_dict())
    if best_weights:
        model.load_state_dict(best_weights)
    confidence = torch.cat(log_probs).exp()
    figures = dict(
        confidence=confidence.mean().item(),
        above_threshold=(confidence > CONFIDENT).double().mean().item(),
        masked=1 - kept.item() / len(confidence),
    )
    if arm in RULES:
        figures["threshold"] = loss_function.threshold.item()
    return figures


def _config(run: Run) -> Config:
    return Config(**{name: run.config[name] for name in Config._fields})


def _corpus(config: Config) -> Corpus:
    return _split(
        tuple(config.corpus), config.sha256, config.vocabulary, config.n_splits, config.split_tokens, config.n_items,
        config.n_other_items, config.item_context, config.context,
    )  # fmt: skip


@functools.cache
def _split(paths: tuple[str, ...], sha256: str, *numbers: int) -> Corpus:
    return texts.split(texts.read(paths, sha256), *numbers)


def _model(config: Config, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(config.vocabulary, config.context, config.D, config.n_blocks, config.n_heads)
    return model.to(report.default_device())


def _device(model: LanguageModel) -> torch.device:
    return model.head.weight.device


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]


def _generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on these numbers and nothing else: the arms share them, and resumed runs find them."""
    entropy = [number + 1 for number in numbers]  # a zero at the end would count for nothing
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


EXPERIMENT = Experiment(begin, advance)
