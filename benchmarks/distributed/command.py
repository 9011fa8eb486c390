"""What losses over ranks send, counted over gloo next to formulas and to Megatron's scheme; a model of times on GPUs.

Also how long the ranks take to compare their arguments, and forward and backward on the cores of this machine.

Under `torchrun --nproc-per-node P -m benchmarks distributed`: the time of forward and backward on P GPUs, over NCCL,
next to the packages that are installed; without GPUs on the CPU, over gloo.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import INTERRUPTED, UNAVAILABLE, report
from . import figures, model, ranks, tables, times, volume
from .cases import OURS_OVER_RANKS, SCHEMES, Shape

CPU = torch.device("cpu")


class Plan(NamedTuple):
    """What is measured over gloo."""

    volume: Shape
    dtypes: list[torch.dtype]
    kept: tuple[float, ...]
    ranks: tuple[int, ...]
    times: Shape
    times_kept: tuple[float, ...]
    rounds: int
    agreement: Shape
    agreement_rounds: int


FULL = Plan(
    Shape(2048, 512, 4096), [torch.float32, torch.bfloat16], volume.KEPT, (2, 4),
    Shape(2048, 576, 8192), (1.0, 0.5), 5, Shape(2048, 64, 1024), 100,
)  # fmt: skip
QUICK = Plan(
    Shape(512, 256, 2048), [torch.float32], (1.0, 0.5), (2,),
    Shape(512, 128, 8192), (0.5,), 3, Shape(512, 64, 1024), 20,
)  # fmt: skip
ON_GPUS = Shape(model.N, model.D, model.V)
ON_GPUS_KEPT = (1.0, 0.5, 0.2)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks distributed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two ranks")
    parser.add_argument("--plot", action="store_true", help="measure nothing, draw the saved results again")
    args = parser.parse_args(arguments)
    if ranks.by_torchrun():
        return over_torchrun(args.quick)
    if not dist.is_available() or not dist.is_gloo_available():
        print("distributed: this build of torch has no gloo")
        return UNAVAILABLE
    if args.plot:
        return draw(args.quick)
    return over_gloo(QUICK if args.quick else FULL, args.quick)


def path_of(name: str, quick: bool, device: torch.device = CPU) -> Path:
    return report.results_path(device, f"distributed{name}", quick)


def over_gloo(plan: Plan, quick: bool) -> int:
    heading = [
        report.describe(CPU),
        f"volume: {tables.in_words(plan.volume)}; times: {tables.in_words(plan.times)}, float32; processes of this "
        "machine over gloo, 1 thread each",
    ]
    print(*heading, sep="\n")
    found, status = {"volume": [], "agreement": [], "times": []}, 0
    n_schemes = sum(len(plan.kept) if scheme.truncates else 1 for scheme in SCHEMES)
    total = len(plan.ranks) * (len(plan.dtypes) * n_schemes + len(OURS_OVER_RANKS))
    with tqdm(total=total, unit="call", leave=False) as progress:
        try:
            for p in plan.ranks:
                for kind, row in ranks.spawned(measure, p, plan):
                    if "line" in row:
                        progress.write(row["line"])
                        continue
                    found[kind].append(row)
                    progress.update(kind != "times")
                    progress.set_postfix_str(f"{p} ranks, {kind}: {row['what']}")
        except KeyboardInterrupt:
            status = INTERRUPTED
    modelled = model.table()
    results = {f"_{kind}.csv": rows for kind, rows in found.items()}
    results |= {"_model.csv": modelled, "_shards.csv": model.shard_table()}
    for name, rows in results.items():
        if rows:
            report.save(path_of(name, quick), heading, rows)
            report.announce(path_of(name, quick))
    if status == 0:
        page(heading, tables.of_gloo(found, modelled, model.shard_table()), path_of(".md", quick))
        draw(quick)
    if not torch.cuda.is_available():
        print("Times on GPUs: not measured (no GPU). On some: torchrun --nproc-per-node 8 -m benchmarks distributed")
    return status


def measure(plan: Plan) -> Iterator[tuple[str, dict]]:
    """Of every rank, over gloo: rows and the table that they belong to."""
    for row in volume.measure(plan.volume, plan.dtypes, plan.kept):
        yield "volume", row
    for row in times.agreement(plan.agreement, plan.agreement_rounds):
        yield "agreement", row
    if dist.get_world_size() == 2:  # with more, ranks would share the cores of small machines
        for row in times.measure(plan.times, torch.float32, plan.times_kept, plan.rounds, CPU, threads=True):
            yield "times", row


def page(heading: list[str], named_tables: dict[str, list[dict]], path: Path) -> None:
    """Print the tables, and save them as Markdown."""
    parts = ["\n\n".join(heading)]
    for title, table in named_tables.items():
        if table:
            print(f"\n{title}", report.as_text(table), sep="\n")
            parts.append(f"## {title}\n\n{report.as_text(table, markdown=True)}")
    path.write_text("\n\n".join(parts) + "\n")
    report.announce(path)


def draw(quick: bool) -> int:
    if not path_of("_volume.csv", quick).exists():
        print(f"Nothing to draw: there is no {path_of('_volume.csv', quick).relative_to(report.ROOT.parent)}")
        return 1
    heading, rows = report.load(path_of("_volume.csv", quick))
    modelled = report.load(path_of("_model.csv", quick))[1]
    figures.draw(heading, rows, modelled, path_of(".png", quick))
    report.announce(path_of(".png", quick))
    return 0


def over_torchrun(quick: bool) -> int:
    device = ranks.join_torchrun()
    try:
        p, first = dist.get_world_size(), dist.get_rank() == 0
        on_gpus = device.type == "cuda"
        shape = ON_GPUS if on_gpus and not quick else QUICK.times
        dtype = torch.bfloat16
        heading = [
            report.describe(device),
            f"{p} ranks over {dist.get_backend()}, {tables.in_words(shape)}, bfloat16, forward and backward",
        ]
        kept = ON_GPUS_KEPT if on_gpus else QUICK.times_kept
        rounds = 20 if on_gpus and not quick else QUICK.rounds
        found = []
        if first:
            print(*heading, sep="\n")
        for row in times.measure(shape, dtype, kept, rounds, device, threads=False):
            if "line" not in row:
                found.append(row)
            elif first:
                print(row["line"])
        if first:
            name = f"_p{p}"
            report.save(path_of(f"{name}.csv", quick or not on_gpus, device), heading, found)
            title = "Forward and backward over ranks"
            page(heading, {title: tables.of_times(found)}, path_of(f"{name}.md", quick or not on_gpus, device))
    finally:
        dist.destroy_process_group()
    return 0
