"""Train a small causal language model with each loss: what truncation does to confidence, accuracy and speed.

The text is the documentation that every CPython carries, `pydoc_data.topics`: real English, nothing to download.
"""

import argparse
import functools
import math
import random
import re
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm

from tce_kernels import LossStats, linear_focal_cross_entropy, linear_truncated_cross_entropy

from .. import INTERRUPTED, plots, report
from . import tolerances
from .loop import BATCH, CONTEXT, new_model, training_steps
from .transformer import windows

THRESHOLD = 0.9
LOG_THRESHOLD = math.log(THRESHOLD)
LOSSES = {
    "cross-entropy": functools.partial(linear_truncated_cross_entropy, threshold=1.0, return_stats=True),
    f"truncated, {THRESHOLD}": functools.partial(
        linear_truncated_cross_entropy, threshold=THRESHOLD, return_stats=True
    ),
    "focal, gamma 2": functools.partial(linear_focal_cross_entropy, gamma=2.0, return_stats=True),
}
COLOURS = [plots.COLOURS[i] for i in (1, 0, 3)]
STYLES = ["-", "--", ":"]

VOCABULARY = 2048
SPLIT_SEED = 3


class Training(NamedTuple):
    name: str
    model: nn.Module
    truncated: list[float]  # share of each batch's tokens above the threshold
    tokens_per_second: float


def load_text() -> tuple[str, str]:
    """Training and held-out text: nine topics in ten, and the others."""
    names = sorted(topics)
    random.Random(SPLIT_SEED).shuffle(names)
    n_held_out = len(names) // 10
    held_out = [p for name in names[:n_held_out] for p in paragraphs(topics[name])]
    # Topics quote each other; what is held out must not be learnt from another page.
    known = {" ".join(p.split()) for p in held_out}
    train = [p for name in names[n_held_out:] for p in paragraphs(topics[name]) if " ".join(p.split()) not in known]
    return "\n\n".join(train), "\n\n".join(held_out)


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def train(name: str, tokens: Tensor, steps: int, seed: int) -> Training:
    """Same seed: same initial weights and same batches, whatever the loss."""
    model = new_model(VOCABULARY, tokens.device, seed)
    truncated, seconds = [], []
    done = training_steps(model, LOSSES[name], tokens, steps, seed)
    with tqdm(done, desc=name, total=steps, unit="step", leave=False) as progress:
        began = time.perf_counter()
        for loss, stats in progress:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
            truncated.append((stats.log_prob > LOG_THRESHOLD).double().mean().item())
            ended = time.perf_counter()
            seconds.append(ended - began)
            began = ended
    return Training(name, model, truncated, BATCH * CONTEXT / statistics.median(seconds))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor) -> LossStats:
    """Statistics of all held-out tokens under the truncated loss."""
    inputs, target = windows(tokens, CONTEXT)
    hidden = torch.cat([model(batch) for batch in inputs.split(BATCH)])
    return linear_truncated_cross_entropy(hidden, model.head.weight, target, THRESHOLD, return_stats=True)[1]


def result(training: Training, held_out: LossStats) -> dict:
    late = training.truncated[-max(len(training.truncated) // 10, 1) :]
    return dict(
        loss=training.name,
        held_out_cross_entropy=-held_out.log_prob.mean().item(),
        held_out_accuracy=held_out.accuracy.item(),
        held_out_confidence=held_out.mean_confidence.item(),
        held_out_truncated=held_out.truncated_fraction.item(),
        late_training_truncated=statistics.fmean(late),
        tokens_per_second=training.tokens_per_second,
    )


def as_table(results: list[dict]) -> list[dict]:
    return [
        {
            "trained with": row["loss"],
            "held-out CE nats": f"{row['held_out_cross_entropy']:.3f}",
            "accuracy": f"{row['held_out_accuracy']:.1%}",
            "mean p_t": f"{row['held_out_confidence']:.3f}",
            f"p_t > {THRESHOLD}": f"{row['held_out_truncated']:.1%}",
            f"in training, p_t > {THRESHOLD}": f"{row['late_training_truncated']:.1%}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
        }
        for row in results
    ]


def plot(heading: list[str], finished: list[tuple[Training, LossStats]], path: Path) -> None:
    """Left: how confident the models are on held-out text. Right: the share above the threshold over training."""
    figure, (left, right) = plots.new_figure(2, 4.4)
    for (training, held_out), colour, style in zip(finished, COLOURS, STYLES, strict=False):
        line = dict(color=colour, linestyle=style, linewidth=1.8, label=training.name)
        confidence = held_out.log_prob.flatten().exp().double().cpu()
        counts = torch.histc(confidence, bins=20, min=0, max=1)
        left.stairs((100 * counts / len(confidence)).numpy(), torch.linspace(0, 1, 21).numpy(), baseline=None, **line)
        width = max(len(training.truncated) // 25, 1)
        means = torch.tensor(training.truncated).unfold(0, width, width).mean(1)
        right.plot((torch.arange(len(means)) + 0.5) * width, 100 * means, **line)
    left.axvline(THRESHOLD, color="0.6", linewidth=1)
    left.text(THRESHOLD - 0.01, 0.97, "threshold", color="0.4", ha="right", transform=left.get_xaxis_transform())
    left.set(yscale="log", xlim=(0, 1), xlabel="probability of the right token, $p_t$")
    left.set_ylabel("share of held-out tokens (%)")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="training step", ylabel=f"training tokens with $p_t$ > {THRESHOLD} (%)")
    right.set_ylim(bottom=0)
    right.legend(title="trained with")
    plots.finish(figure, heading, path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half of the steps, and fewer yet with --tolerances")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the batches; the first with --tolerances"
    )
    parser.add_argument(
        "--tolerances",
        action="store_true",
        help="instead, on five seeds: cross-entropy with the exact gradient, tolerances, and small entries left out",
    )
    args = parser.parse_args(arguments)
    if args.tolerances:
        return tolerances.compare(args.quick, args.seed)
    steps = 1200 if args.quick else 2400

    device = report.default_device()
    train_text, held_out_text = load_text()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([train_text], vocab_size=VOCABULARY, show_progress=False)
    train_tokens, held_out_tokens = (
        torch.tensor(tokenizer.encode(text).ids, device=device) for text in (train_text, held_out_text)
    )
    heading = [
        report.describe(device),
        f"{len(train_tokens)} training and {len(held_out_tokens)} held-out tokens, vocabulary {VOCABULARY}, "
        f"{steps} steps of {BATCH} x {CONTEXT} tokens, seed {args.seed}",
    ]
    print(*heading, sep="\n")
    finished = []
    status = 0
    try:
        for name in LOSSES:
            training = train(name, train_tokens, steps, args.seed)
            finished.append((training, evaluate(training.model, held_out_tokens)))
    except KeyboardInterrupt:
        status = INTERRUPTED
    if finished:
        results = [result(*each) for each in finished]
        report.publish(report.results_path(device, "train.csv", args.quick), heading, results, as_table(results))
        path = report.results_path(device, "train.png", args.quick)
        plot(heading, finished, path)
        report.announce(path)
    return status
