"""What the suites `logits` and `linear` share: options, the loop over cases, the table, the files."""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import INTERRUPTED, report
from . import figures
from .measure import OURS, Inexact, Observed, Provider, compete

THRESHOLD = 0.9
DTYPES = ["float32", "bfloat16", "float16"]


class Suite(NamedTuple):
    """A Case is a NamedTuple of sizes, then dtype, share of truncated rows, rounds."""

    name: str  # of the subcommand and of the files
    description: str
    subject: str  # what is measured: heads the first column
    floor: str  # what no implementation can leave out, in a word
    sizes: dict[str, str]  # what --shape takes: name and meaning
    in_words: Callable[..., str]  # the sizes of a Case
    cases: Callable[[bool, list[int] | None, str | None, bool], list]  # of quick, shape, dtype, on_gpu
    providers: Callable[..., list[list[Provider]]]  # of Case, device, quick: see measure.compete
    make_inputs: Callable[..., tuple[Tensor, ...]]  # of Case, device
    checker: Callable[..., Callable[[Provider, Observed], None]]  # of Case, inputs: raises Inexact
    missing: Callable[[torch.device, bool], list[str]]  # of device, quick: who is not measured and why


def main(suite: Suite, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {suite.name}", description=suite.description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute or two")
    parser.add_argument(
        "--shape", nargs=len(suite.sizes), type=int, metavar=tuple(suite.sizes), help=", ".join(suite.sizes.values())
    )
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw the saved results again")
    args = parser.parse_args(arguments)

    device = report.default_device()
    # The files beside those of the other benchmarks are of the full set of cases.
    partial = bool(args.quick or args.shape or args.dtype)
    path = report.results_path(device, f"{suite.name}.csv", partial)
    if args.plot:
        if not path.exists():
            print(f"Nothing to draw: there is no {path.relative_to(report.ROOT.parent)}")
            return 1
        draw(suite, path)
        return 0
    todo = suite.cases(args.quick, args.shape, args.dtype, device.type == "cuda")
    results, status = run(suite, todo, device, path, args.quick)
    if results:
        conclude(suite, path)
    for line in suite.missing(device, args.quick):
        print(line)
    return status


def run(
    suite: Suite,
    todo: list,
    device: torch.device,
    path: Path,
    quick: bool = False,
    deadline: float = math.inf,
    on_saved: Callable[[], object] = lambda: None,
) -> tuple[list[dict], int]:
    """Measure the cases and save after each, then call `on_saved`; the rows and the exit status.

    No case is begun that would probably last beyond `deadline`, a time of time.perf_counter().
    """
    heading = [
        report.describe(device),
        f"{suite.in_words(todo[0])}, {dtype_name(todo[0])}, if not said otherwise; threshold {THRESHOLD}, forward and "
        f"backward, {todo[0].rounds} interleaved rounds",
    ]
    print(*heading, sep="\n")
    results, status = [], 0
    longest = {True: 0.0, False: 0.0}  # seconds of a case, with a new shape and without
    fields = [suite.providers(case, device, quick) for case in todo]
    total = sum(case.rounds * len(field) for case, field in zip(todo, fields, strict=True))
    with tqdm(total=total, unit="run", leave=False) as progress:
        try:
            for i, (case, field) in enumerate(zip(todo, fields, strict=True)):
                new_shape = i == 0 or case[:-2] != todo[i - 1][:-2]  # but for share and rounds
                start = time.perf_counter()
                if start + longest[new_shape] > deadline:
                    progress.write(f"{in_words(suite, case)}: left out, no time is left")
                    continue
                results += _measure(suite, case, field, new_shape, device, deadline, progress)
                longest[new_shape] = max(longest[new_shape], time.perf_counter() - start)
                if results:
                    report.save(path, heading, results)  # whatever ends a long run, what is done is kept
                    on_saved()
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Inexact as error:
            progress.write(f"{in_words(suite, case)}, {OURS}: {error}")
            status = 1
    return results, status


def _measure(
    suite: Suite,
    case,
    field: list[list[Provider]],
    new_shape: bool,
    device: torch.device,
    deadline: float,
    progress: tqdm,
) -> list[dict]:
    """One row of results per provider of the field; none, with a printed line, if the GPU is too small."""
    if new_shape:  # code compiled for other shapes counts towards the limit of recompilations
        torch.compiler.reset()
    try:
        inputs = suite.make_inputs(case, device)
        progress.set_postfix_str("reference")
        check = suite.checker(case, inputs)
        rows = compete(field, inputs, check, case.rounds, new_shape, deadline, progress)
    except torch.OutOfMemoryError:
        progress.write(f"{in_words(suite, case)}: left out, the GPU's memory is too small")
        return []
    return [case._asdict() | dict(dtype=dtype_name(case)) | row for row in rows]


def conclude(suite: Suite, path: Path) -> None:
    """Print the table of the saved rows, and draw them."""
    _, rows = report.load(path)
    lines = report.as_text(as_table(suite, rows)).splitlines()
    header, body = lines[:2], lines[2:]
    print(*header, sep="\n")
    for row, line in zip(rows, body, strict=True):  # every case begins with our row
        print(f"\n{line}" if row["label"] == OURS and row is not rows[0] else line)
    print(f"* the least, {suite.floor} aside. Extra peak: memory beyond the inputs and the returned gradients.")
    print(f"Fastest peer: the shortest median apart from {OURS} and {suite.floor}.")
    report.announce(path)
    draw(suite, path)


def draw(suite: Suite, path: Path) -> None:
    """A picture beside the saved rows, if they are of more than one vocabulary."""
    heading, rows = report.load(path)
    if len({row["V"] for row in rows}) > 1:
        figures.comparison(heading, rows, suite.floor, path.with_suffix(".png"))
        report.announce(path.with_suffix(".png"))


def as_table(suite: Suite, rows: list[dict]) -> list[dict]:
    """Rows as people read them; the axes that vary have a column, and the best of every case has a star."""
    axes = [*suite.sizes, "dtype", "share"]
    varying = [axis for axis in axes if axis != "share" and len({row[axis] for row in rows}) > 1]
    table = []
    for row in rows:
        rivals = [r for r in rows if not r["is_floor"] and all(r[axis] == row[axis] for axis in axes)]
        table.append(
            {suite.subject: row["label"]}
            | {axis: row[axis] for axis in varying}
            | {
                "truncated rows": f"{row['share']:.0%}",
                "median ms": _starred(row, rivals, "ms_p50", ".4g"),
                "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
            }
            | ({"host ms": f"{row['host_ms']:.3g}"} if "host_ms" in row else {})
            | {
                "time / fastest peer": f"{row['time_over_fastest_peer']:.2f}",
                f"time / {suite.floor}": f"{row['time_over_floor']:.2f}",
                "extra peak MiB": _starred(row, rivals, "extra_peak_MiB", ".1f"),
            }
        )
    return table


def _starred(row: dict, rivals: list[dict], column: str, form: str) -> str:
    best = row in rivals and row[column] == min(rival[column] for rival in rivals)
    return f"{row[column]:{form}}" + (" *" if best else "  ")


def in_words(suite: Suite, case) -> str:
    return f"{suite.in_words(case)}, {dtype_name(case)}, {case.share:.0%} truncated"


def dtype_name(case) -> str:
    return str(case.dtype).removeprefix("torch.")
