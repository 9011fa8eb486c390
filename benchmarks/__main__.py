"""`python -m benchmarks [subcommand]`; without a subcommand, the quick version of each."""

import argparse
import importlib
import sys

from . import UNAVAILABLE

# Modules of this package with main(arguments) -> exit status; main(["--quick"]) takes a minute or two.
SUBCOMMANDS = {
    "logits": "time and memory of one loss and its gradient on given logits",
    "linear": "time and memory of linear layer, loss and gradients, without all logits in memory",
    "codegen": "what the compiled kernels need and cost on GPUs that are not there",
    "train": "train a small language model with each loss on Python's own documentation",
}
EXTRA = {"matplotlib", "tabulate", "tokenizers", "tqdm"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [subcommand [options]]",
        description=__doc__,
        epilog="Options of a subcommand: python -m benchmarks logits --help",
    )
    subcommands = parser.add_subparsers(title="subcommands", dest="subcommand")
    for name, summary in SUBCOMMANDS.items():
        subcommands.add_parser(name, help=summary, add_help=False)
    # A subcommand parses its own options, so that only its own packages are imported.
    chosen = parser.parse_args(sys.argv[1:2]).subcommand
    if chosen:
        return load(chosen).main(sys.argv[2:])
    for name in SUBCOMMANDS:
        status = load(name).main(["--quick"])
        if status not in (0, UNAVAILABLE):
            return status
    return 0


def load(name: str):
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f'{error.name} is not installed: pip install -e ".[bench]"')


if __name__ == "__main__":
    sys.exit(main())
