"""Time and error of a head on the hidden states of a real model: gradients exact, or within a tolerance."""

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator
from torch import Tensor
from tqdm import tqdm

import tce_kernels

from .. import INTERRUPTED, plots, report
from ..states import file
from . import heads
from .measure import OURS, Inexact, Observed, Provider, compete
from .measure import run as run_once
from .suite import DTYPES, THRESHOLD

THRESHOLDS = (1.0, THRESHOLD)
TOLERANCES = (0.0, 0.001, 0.003, 0.01)
ROUNDS = 5
CHECKED_ROWS = 256

Inputs = tuple[Tensor, Tensor, Tensor]


class Found(NamedTuple):
    """What the check of a provider has found: relative errors in norm, and the share of the classes that took part."""

    dinput_error: float
    dweight_error: float
    class_fraction: float


class Rounding(NamedTuple):
    """Relative errors of plain PyTorch, which truncates nothing."""

    loss: float
    gradients: float  # the larger one, in norm


class Exact(NamedTuple):
    """In float64, of the mean over all rows."""

    loss: float
    gradients: tuple[Tensor, Tensor]  # of input and weight
    truncated: float  # share of the rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks linear --states FILE", description=__doc__)
    parser.add_argument("--states", type=Path, required=True, help="a file that python -m benchmarks states has made")
    parser.add_argument("--quick", action="store_true", help=f"threshold {THRESHOLD} and fewer rounds")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(arguments)
    device = report.default_device()
    try:
        states = file.load(args.states, device)
    except (OSError, ValueError) as error:
        print(error)
        return 1
    if states.linear_bias is not None or states.softcap is not None:
        print("The heads of the peers have neither bias nor softcap: nothing to compare with.")
        return 1
    dtype = getattr(torch, args.dtype)
    inputs = (
        (states.input.float() * states.logit_scale).to(dtype).requires_grad_(),
        states.linear_weight.to(dtype).requires_grad_(),
        states.target,
    )
    rounds = 3 if args.quick else ROUNDS
    heading = [
        report.describe(device),
        f"{states.description}; measured in {args.dtype}, forward and backward, {rounds} interleaved rounds",
    ]
    print(*heading, sep="\n")
    path = report.results_path(device, "linear_states.csv", args.quick or args.dtype != "float32")
    results, status = run(inputs, THRESHOLDS[1:] if args.quick else THRESHOLDS, rounds, args.quick, path, heading)
    if results:
        report.publish(path, heading, results, as_table(results))
        picture(heading, results, path.with_suffix(".png"))
        report.announce(path.with_suffix(".png"))
    for line in heads.missing(device, args.quick):
        print(line)
    return status


def run(
    inputs: Inputs, thresholds: tuple[float, ...], rounds: int, quick: bool, path: Path, heading: list[str]
) -> tuple[list[dict], int]:
    """The rows of all thresholds, saved after each, and the exit status."""
    results = []
    with tqdm(leave=False, unit="run", total=0) as progress:
        try:
            for i, threshold in enumerate(thresholds):
                progress.set_postfix_str("reference")
                expected = {wanted: exact(inputs, wanted) for wanted in {1.0, threshold}}
                # How far rounding alone leads plain PyTorch from float64.
                plain = run_once(Provider("plain", heads.cross_entropy, truncates=False), inputs)
                rounding = Rounding(loss_error(plain[0], expected[1.0]), max(errors_of(plain[1], expected[1.0])))
                field = providers(inputs, threshold, expected[threshold].truncated, quick)
                progress.total += rounds * len(field)
                found = {}
                check = functools.partial(admissible, inputs, threshold, expected, rounding, found)
                rows = compete(field, inputs, check, rounds, i == 0, math.inf, progress)
                for row, tolerance in zip(rows, TOLERANCES, strict=False):  # ours come first
                    row["gradient_tolerance"] = tolerance
                for row in rows:
                    errors = found.get((row["label"], row.get("gradient_tolerance")))
                    nothing = dict.fromkeys(Found._fields, math.nan) | {"gradient_tolerance": math.nan}
                    results.append(dict(threshold=threshold) | nothing | row | (errors._asdict() if errors else {}))
                report.save(path, heading, results)
        except KeyboardInterrupt:
            return results, INTERRUPTED
        except Inexact as error:
            progress.write(f"threshold {threshold}, {OURS}: {error}")
            return results, 1
    return results, 0


def ours(input: Tensor, linear_weight: Tensor, target: Tensor, threshold: float, tolerance: float) -> Tensor:
    return tce_kernels.linear_truncated_cross_entropy(
        input, linear_weight, target, threshold, gradient_tolerance=tolerance
    )


def providers(inputs: Inputs, threshold: float, truncated: float, quick: bool) -> list[list[Provider]]:
    """Ours at each tolerance, then the peers and the floor, as in the suite `linear`."""
    input, _, target = inputs
    field = [
        [Provider(OURS, functools.partial(ours, threshold=threshold, tolerance=tolerance))] for tolerance in TOLERANCES
    ]
    others = heads.providers(len(target), input.dtype, truncated, input.device, quick)[1:]
    # Nothing is truncated at threshold 1, where those who would are no peers.
    return field + [sizes for sizes in others if threshold < 1 or sizes[0].is_floor or not sizes[0].truncates]


def exact(inputs: Inputs, threshold: float) -> Exact:
    """A block of rows at a time."""
    input, linear_weight, target = (tensor.detach() for tensor in inputs)
    weight, N = linear_weight.double(), len(target)
    dinput, dweight = torch.empty_like(input, dtype=torch.double), torch.zeros_like(weight)
    loss, n_kept = 0.0, 0
    for start in range(0, N, CHECKED_ROWS):
        rows = slice(start, start + CHECKED_ROWS)
        x, t = input[rows].double(), target[rows]
        p = F.softmax(x @ weight.T, 1)
        of_target = p.gather(1, t[:, None])
        kept = of_target <= threshold
        loss -= of_target[kept].log().sum().item() / N
        n_kept += kept.sum().item()
        p.scatter_add_(1, t[:, None], -torch.ones_like(of_target))
        p *= kept / N
        dinput[rows] = p @ weight
        dweight.addmm_(p.T, x)
    return Exact(loss, (dinput, dweight), 1 - n_kept / N)


def loss_error(loss: Tensor, expected: Exact) -> float:
    return abs(loss.item() - expected.loss) / expected.loss


def errors_of(gradients: tuple[Tensor, ...], expected: Exact) -> list[float]:
    """Of the gradients of input and weight, relative to float64's in norm."""
    return [
        ((gradient - wanted).norm() / wanted.norm()).item()
        for gradient, wanted in zip(gradients, expected.gradients, strict=True)
    ]


def admissible(
    inputs: Inputs, threshold: float, expected: dict[float, Exact], rounding: Rounding, found: dict,
    provider: Provider, observed: Observed,
) -> None:  # fmt: skip
    """Note the errors of a provider; raise Inexact if they are larger than rounding, or tolerance, explains.

    What is meant to be exact may be off by twice as much as plain PyTorch, the loss also by a few of its units.
    """
    tolerance = provider.loss.keywords["tolerance"] if provider.name == OURS else None
    wanted = expected[threshold if provider.truncates else 1.0]
    of_loss, errors = loss_error(observed.loss, wanted), errors_of(observed.gradients, wanted)
    if not of_loss <= max(2 * rounding.loss, 1e-5, 4 * torch.finfo(observed.loss.dtype).eps):
        raise Inexact(f"the loss is {of_loss:.1e} from float64's")
    if not max(errors) <= max(2 * rounding.gradients, 2.5 * (tolerance or 0)):
        raise Inexact(f"the gradients are {errors[0]:.1e} and {errors[1]:.1e} from float64's, in norm")
    fraction = math.nan
    if tolerance is not None:
        _, stats = tce_kernels.linear_truncated_cross_entropy(
            *inputs, threshold, gradient_tolerance=tolerance, return_stats=True
        )
        fraction = stats.class_fraction.item()
    found[provider.label, tolerance] = Found(*errors, fraction)


def as_table(rows: list[dict]) -> list[dict]:
    table = []
    for row in rows:
        is_ours = not math.isnan(row["gradient_tolerance"])
        table.append(
            {
                "threshold": row["threshold"],
                "head, loss and gradients": row["label"],
                "tolerance": f"{row['gradient_tolerance']:g}" if is_ours else "",
                "median ms": f"{row['ms_p50']:.4g}",
                "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
                "time / fastest peer": f"{row['time_over_fastest_peer']:.2f}",
                "time / matmuls alone": f"{row['time_over_floor']:.2f}",
                "classes": f"{row['class_fraction']:.1%}" if is_ours else "",
                "error of dinput": "" if row["is_floor"] else f"{row['dinput_error']:.1e}",
                "error of dweight": "" if row["is_floor"] else f"{row['dweight_error']:.1e}",
                "extra peak MiB": f"{row['extra_peak_MiB']:.0f}",
            }
        )
    return table


def picture(heading: list[str], rows: list[dict], path: Path) -> None:
    """Time over the error of the input's gradient, a panel per threshold."""
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows))
    figure, panels = plots.new_figure(len(thresholds), 4.2)
    names = list(dict.fromkeys(row["provider"] for row in rows if not row["is_floor"] and row["provider"] != OURS))
    for panel, threshold in zip(panels, thresholds, strict=True):
        of_panel = [row for row in rows if row["threshold"] == threshold]
        mine = [row for row in of_panel if row["provider"] == OURS]
        points = [(row["dinput_error"], row["ms_p50"]) for row in mine]
        panel.plot(*zip(*points, strict=True), "o-", color=plots.COLOURS[0], linewidth=2.4, label=OURS, zorder=4)
        for row, point in zip(mine[1:], points[1:], strict=True):
            panel.annotate(
                f"{row['gradient_tolerance']:g}", point, (-8, -16), textcoords="offset points", color=plots.COLOURS[0]
            )
        for row in of_panel:
            if row["provider"] in names:
                i = names.index(row["provider"])
                colour = plots.COLOURS[1 + i % (len(plots.COLOURS) - 1)]
                hollow = not row["truncates"] and threshold < 1
                panel.plot(
                    row["dinput_error"], row["ms_p50"], "sD^vP*X"[i % 7], color=colour, label=row["provider"],
                    markerfacecolor="white" if hollow else colour,
                )  # fmt: skip
            elif row["is_floor"]:
                panel.axhline(row["ms_p50"], color="0.4", linestyle="--", linewidth=1, label=row["provider"])
        panel.set(xscale="log", ylim=(0, None), title=f"threshold {threshold:g}", ylabel="time of one step (ms)")
        panel.set_xlabel("relative error of the input's gradient (norm)")
        panel.yaxis.set_minor_locator(NullLocator())
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=2,
        title="numbers: tolerance; hollow: without truncation",
    )
    plots.finish(figure, heading, path)
