"""The command line: what to run, how much of it, and where the results go."""

import argparse
import os
from pathlib import Path

from .. import INTERRUPTED, report
from . import categorical, gaussian, gmm, lm, summary, vae
from .engine import Missing, Run, perform_all

EXPERIMENTS = {
    "gaussian": gaussian.EXPERIMENT,
    "categorical": categorical.EXPERIMENT,
    "gmm": gmm.EXPERIMENT,
    "vae": vae.EXPERIMENT,
    "lm": lm.EXPERIMENT,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks collapse",
        description="Recursive training with and without truncation: runs what is not there yet, then reports.",
    )
    parser.add_argument(
        "what", nargs="?", choices=[*EXPERIMENTS, "report"], help="one experiment, or tables and plots of what is there"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="small and few runs, less than 3 minutes in all (the default)"
    )
    size.add_argument("--full", action="store_true", help="the runs of benchmarks/collapse/README.md, some hours")
    parser.add_argument("--seeds", type=positive, metavar="N", help="instead of the number that each experiment has")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=[], metavar="PATH",
        help="of lm and categorical: text files in UTF-8 instead of Python's documentation",
    )  # fmt: skip
    arms = [*lm.LOSSES, *lm.RULES]
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help=f"of lm: {', '.join(arms)}")
    parser.add_argument("--decoders", nargs="+", choices=lm.DECODERS, metavar="NAME", help=", ".join(lm.DECODERS))
    parser.add_argument("--data", nargs="+", choices=lm.DATA, metavar="NAME", help=", ".join(lm.DATA))
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="processes (all cores)")
    args = parser.parse_args(arguments)
    for path in args.corpus:
        if not path.is_file():
            parser.error(f"--corpus must name text files, got {path}")
    if args.arms or args.decoders or args.data:
        if args.what != "lm":
            parser.error("--arms, --decoders and --data are for lm")

    device = report.default_device()
    folder = report.results_path(device, "collapse", partial=not args.full)
    status = 0
    if args.what != "report":
        status = _run(args, folder, 1 if device.type == "cuda" else args.jobs)
    return status or summary.make(folder)


def _run(args: argparse.Namespace, folder: Path, jobs: int) -> int:
    names = [args.what] if args.what else list(EXPERIMENTS)
    try:
        for name in names:
            perform_all(EXPERIMENTS, planned(name, args), folder, jobs, name)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last finished generation.")
        return INTERRUPTED
    except (Missing, ValueError) as error:
        print(f"{name}: {error}")
        return 1
    return 0


def planned(name: str, args: argparse.Namespace) -> list[Run]:
    quick = not args.full
    corpus = tuple(str(path) for path in args.corpus)
    if name == "lm":
        return lm.planned(quick, args.seeds, corpus, args.arms, args.decoders, args.data)
    if name == "categorical":
        return categorical.runs(quick, args.seeds or (2 if quick else 5), corpus)
    module, few, many = {"gaussian": (gaussian, 5, 20), "gmm": (gmm, 2, 20), "vae": (vae, 1, 3)}[name]
    return module.runs(quick, args.seeds or (few if quick else many))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
