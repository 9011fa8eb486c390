"""Train with the exact gradient of cross-entropy, with `gradient_tolerance`, and with small entries left out.

Seeds are paired: the same initial weights and the same batches. The text is the documentation inside the standard
library, docstrings and topics, which every Python carries; the vocabulary is that of the library's whole source. Like a
large model's it has many classes that a batch has no use for. Classes are left out even where that saves no time, which
is where so small a model has most of its steps.
"""

import ast
import functools
import math
import multiprocessing
import os
import random
import signal
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm

from tce_kernels import gradients, linear_truncated_cross_entropy

from .. import INTERRUPTED, plots, report
from .loop import BATCH, CONTEXT, new_model, training_steps
from .transformer import LanguageModel, windows

FILTER = 2**-12  # where cut-cross-entropy's filter begins in bfloat16
VOCABULARY = 8192
FULL, QUICK = (5, 1000), (2, 100)  # seeds and steps
RARE = 10  # the least frequent tenth of the vocabulary
SPLIT_SEED = 3
# Without them: tests, what is made by programs, and packages that are not Python's own.
NOT_TEXT = {"test", "tests", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages"}


class Text(NamedTuple):
    train: Tensor  # (n,) tokens
    held_out: Tensor
    rare: Tensor  # (VOCABULARY // RARE,) of the tokens that training has, those it has least of


class Trained(NamedTuple):
    variant: str
    seed: int
    cross_entropy: float  # held out, nats, as the next
    cross_entropy_of_rare: float  # where the right token is a rare one
    probability_of_rare: float  # that the model gives to all of them, at each held-out token
    share: float  # of the gradient's entries that took part, mean over training
    late_share: float  # the same over the last tenth of the steps


class FilteredCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy, whose gradient is without the entries of |softmax - onehot| below FILTER; the share left."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(F.linear(input, weight), -1)
        loss = F.nll_loss(log_p, target)
        entries = log_p.exp_()
        entries[torch.arange(len(target), device=target.device), target] -= 1
        small = entries.abs() < FILTER
        dlogits = entries.masked_fill_(small, 0).div_(len(target))
        ctx.save_for_backward(dlogits @ weight, dlogits.t() @ input)
        share = 1 - small.float().mean()
        ctx.mark_non_differentiable(share)
        return loss, share

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _) -> tuple[Tensor, Tensor, None]:
        dinput, dweight = ctx.saved_tensors
        return grad_loss * dinput, grad_loss * dweight, None


def filtered(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return FilteredCrossEntropy.apply(hidden.flatten(0, -2), weight, target.flatten())


def tolerant(hidden: Tensor, weight: Tensor, target: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    loss, seen = linear_truncated_cross_entropy(
        hidden, weight, target, 1.0, gradient_tolerance=tolerance, return_stats=True
    )
    return loss, seen.class_fraction


# Each returns the mean loss and the share of the gradient's entries that takes part.
EXACT = "exact"
VARIANTS: dict[str, Callable] = {
    EXACT: functools.partial(tolerant, tolerance=0.0),
    "tolerance 0.003": functools.partial(tolerant, tolerance=0.003),
    "tolerance 0.01": functools.partial(tolerant, tolerance=0.01),
    "filtered below 2^-12": filtered,
}
# Columns of the table, and the digits after the point.
SHARES = {"share": "entries used", "late_share": "at the end"}
MEASURES = {
    "cross_entropy": ("held-out CE nats", 4),
    "cross_entropy_of_rare": ("of rare tokens", 3),
    "probability_of_rare": ("probability of rare tokens", 5),
}


def compare(quick: bool, first_seed: int) -> int:
    """The whole comparison, printed and saved; returns the exit status."""
    seeds, steps = QUICK if quick else FULL
    device = report.default_device()
    text = load_text()
    heading = [
        report.describe(device),
        f"{len(text.train)} training and {len(text.held_out)} held-out tokens, of which "
        f"{torch.isin(text.held_out, text.rare).sum()} are of the rarest {len(text.rare)} of vocabulary {VOCABULARY}; "
        f"{steps} steps of {BATCH} x {CONTEXT} tokens, seeds {first_seed} to {first_seed + seeds - 1}",
    ]
    print(*heading, sep="\n")
    tasks = [(variant, seed, steps) for seed in range(first_seed, first_seed + seeds) for variant in VARIANTS]
    finished = []
    path = report.results_path(device, "tolerances.csv", quick)
    status = 0
    try:
        for trained in in_processes(text, tasks, 1 if device.type == "cuda" else os.cpu_count()):
            finished.append(trained)
            finished.sort(key=lambda each: (each.seed, list(VARIANTS).index(each.variant)))
            report.save(path, heading, [each._asdict() for each in finished])
    except KeyboardInterrupt:
        status = INTERRUPTED
    if finished:
        publish(heading, finished, device, quick)
    return status


def load_text() -> Text:
    """Nine modules and topics in ten are trained on, the others are held out; the same for the same Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if not NOT_TEXT & set(path.relative_to(folder).parts))
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sources, vocab_size=VOCABULARY, show_progress=False)

    documents = [docstrings(source) for source in sources] + [topics[name] for name in sorted(topics)]
    random.Random(SPLIT_SEED).shuffle(documents)
    n_held_out = len(documents) // 10
    held_out, train = (
        torch.tensor([token for encoded in tokenizer.encode_batch(some) for token in encoded.ids])
        for some in (documents[:n_held_out], documents[n_held_out:])
    )
    return Text(train, held_out, rarest(train, VOCABULARY))


def docstrings(source: str) -> str:
    """All of a module, in the order of ast.walk."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(filter(None, found))


def rarest(tokens: Tensor, vocabulary: int) -> Tensor:
    """A tenth of the vocabulary, the least frequent of what occurs at all."""
    counts = tokens.bincount(minlength=vocabulary)
    order = counts.argsort(stable=True)
    return order[counts[order] > 0][: vocabulary // RARE]


def in_processes(text: Text, tasks: list[tuple[str, int, int]], jobs: int) -> Iterator[Trained]:
    """Side by side, one thread each, so that results do not depend on how many there are."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _start, (text,)) as pool, tqdm(total=len(tasks), unit="training", leave=False) as progress:
        for trained in pool.imap_unordered(_run, tasks):
            progress.update()
            progress.set_postfix_str(f"{trained.variant}, seed {trained.seed}: {trained.cross_entropy:.3f} nats")
            yield trained


def _start(text: Text) -> None:
    global _text
    _text = text
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process


def _run(task: tuple[str, int, int]) -> Trained:
    return run(_text, *task)


def run(text: Text, variant: str, seed: int, steps: int) -> Trained:
    text = Text(*(tokens.to(report.default_device()) for tokens in text))
    model = new_model(VOCABULARY, text.train.device, seed)
    gradients.DENSE_ABOVE = 1.0  # so that classes are left out wherever they may be, whether or not it saves time
    shares = [share.item() for _, share in training_steps(model, VARIANTS[variant], text.train, steps, seed)]
    return Trained(
        variant,
        seed,
        *evaluate(model, text),
        statistics.fmean(shares),
        statistics.fmean(shares[-max(steps // 10, 1) :]),
    )


@torch.no_grad()
def evaluate(model: LanguageModel, text: Text) -> tuple[float, float, float]:
    """Held-out cross-entropy of all tokens and of the rare ones, and the mean probability of a rare one."""
    inputs, target = windows(text.held_out, CONTEXT)
    losses, of_rare = [], []
    for batch, batch_target in zip(inputs.split(BATCH), target.split(BATCH), strict=True):
        log_p = F.log_softmax(model.head(model(batch)), -1)
        losses.append(-log_p.gather(-1, batch_target[..., None])[..., 0])
        of_rare.append(log_p[..., text.rare].exp().sum(-1))
    losses, of_rare = torch.cat(losses).double(), torch.cat(of_rare).double()
    return losses.mean().item(), losses[torch.isin(target, text.rare)].mean().item(), of_rare.mean().item()


class Difference(NamedTuple):
    """To the exact gradient, over paired seeds. NaN where a single seed cannot tell."""

    mean: float
    half_width: float  # of the 95% interval
    detectable: float  # what an experiment as noisy as this one finds in four cases out of five

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"


def difference(finished: list[Trained], variant: str, measure: str) -> Difference:
    """By Student's t distribution, over the seeds that both the variant and the exact gradient have finished."""
    values, exact = (
        {each.seed: getattr(each, measure) for each in finished if each.variant == name} for name in (variant, EXACT)
    )
    differences = [values[seed] - exact[seed] for seed in values.keys() & exact.keys()]
    n = len(differences)
    if n < 2:
        return Difference(differences[0] if differences else math.nan, math.nan, math.nan)
    error = statistics.stdev(differences) / n**0.5
    certain, likely = stats.t.ppf([0.975, 0.8], n - 1)
    return Difference(statistics.fmean(differences), certain * error, (certain + likely) * error)


def as_table(finished: list[Trained]) -> list[dict]:
    rows = []
    for name in VARIANTS:
        of_name = [each for each in finished if each.variant == name]
        if not of_name:
            continue
        row = {"gradient": name, "seeds": len(of_name)}
        for measure in SHARES:
            row[SHARES[measure]] = f"{statistics.fmean(getattr(each, measure) for each in of_name):.1%}"
        for measure, (title, digits) in MEASURES.items():
            row[title] = f"{statistics.fmean(getattr(each, measure) for each in of_name):.{digits}f}"
            row[f"minus exact, {title}"] = "" if name == EXACT else str(difference(finished, name, measure))
        rows.append(row)
    return rows


def publish(heading: list[str], finished: list[Trained], device: torch.device, quick: bool) -> None:
    rows = [trained._asdict() for trained in finished]
    report.publish(report.results_path(device, "tolerances.csv", quick), heading, rows, as_table(finished))
    for name in VARIANTS:
        for measure in ("cross_entropy", "cross_entropy_of_rare"):
            detectable = difference(finished, name, measure).detectable
            if name != EXACT and not math.isnan(detectable):
                print(f"{name}: a difference of {detectable:.4f} in {MEASURES[measure][0]} would be found")
    path = report.results_path(device, "tolerances.png", quick)
    plot(heading, finished, path)
    report.announce(path)


def plot(heading: list[str], finished: list[Trained], path: Path) -> None:
    """Paired differences to the exact gradient: a dot per seed, the mean and its 95% interval."""
    names = [name for name in VARIANTS if name != EXACT]
    figure, panels = plots.new_figure(2, 3)
    exact = {each.seed: each for each in finished if each.variant == EXACT}
    titles = ("all held-out tokens", "rare tokens: the least frequent tenth of the vocabulary")
    for panel, measure, title in zip(panels, ("cross_entropy", "cross_entropy_of_rare"), titles, strict=True):
        for y, name in enumerate(names):
            of_name = [each for each in finished if each.variant == name and each.seed in exact]
            values = [getattr(each, measure) - getattr(exact[each.seed], measure) for each in of_name]
            panel.plot(values, [y + 0.2] * len(values), ".", color="0.6")
            mean, half_width, _ = difference(finished, name, measure)
            panel.errorbar(mean, y, xerr=half_width, fmt="o", color=plots.COLOURS[(0, 1, 3)[y]], capsize=4)
        panel.axvline(0, color="0.4", linewidth=1)
        panel.set_xscale("symlog", linthresh=0.1)  # what is biased is so by far
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yticks(range(len(names)), names)
        panel.set(
            title=title, xlabel="cross-entropy minus that with the exact gradient (nats)", ylim=(len(names) - 0.5, -0.5)
        )
    plots.finish(figure, heading, path)
