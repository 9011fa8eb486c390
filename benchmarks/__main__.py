"""`python -m benchmarks [subcommand]`; without a subcommand, the quick version of each."""

import argparse
import importlib
import sys
from types import ModuleType

from . import INTERRUPTED, UNAVAILABLE

# Each with its module, which has main(arguments) -> exit status; main(["--quick"]) takes a minute or two, but for
# "states", which does not know which model is meant.
SUBCOMMANDS = {
    "logits": ("timing.logits", "time and memory of one loss and its gradient on given logits"),
    "linear": ("timing.linear", "time and memory of linear layer, loss and gradients, without all logits in memory"),
    "states": ("states.command", "save the hidden states of a language model, for linear --states"),
    "codegen": ("codegen.command", "what the compiled kernels need and cost on GPUs that are not there"),
    "distributed": (
        "distributed.command",
        "what losses over ranks send, and what that costs by a model; under torchrun, times",
    ),
    "train": ("training.train", "train a small language model with each loss on Python's own documentation"),
    "integrations": ("integrations.command", "models of transformers with these losses: which, and what a step costs"),
    "collapse": ("collapse.command", "models trained again and again on their own output, with and without truncation"),
}
EXTRAS = {"bench": {"matplotlib", "scipy", "sklearn", "tabulate", "tokenizers", "tqdm"}, "states": {"transformers"}}
OPTIONAL = {"integrations"}  # what `bench` does not install the packages of


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [--gpu-report | subcommand [options]]",
        description=__doc__,
        epilog="Options of a subcommand: python -m benchmarks logits --help",
    )
    parser.add_argument(
        "--gpu-report",
        action="store_true",
        help="on a GPU: correctness, then logits and linear with memory bandwidth, launches and waits, in 9 minutes",
    )
    subcommands = parser.add_subparsers(title="subcommands", dest="subcommand")
    for name, (_, summary) in SUBCOMMANDS.items():
        subcommands.add_parser(name, help=summary, add_help=False)
    # A subcommand parses its own options, so that only its own packages are imported.
    args = parser.parse_args(sys.argv[1:2])
    if args.gpu_report:
        module = load("--gpu-report", "timing.gpu")
        return module.main() if module else 1
    if args.subcommand:
        module = load(args.subcommand, SUBCOMMANDS[args.subcommand][0])
        return module.main(sys.argv[2:]) if module else 1
    worst = 0
    for name, (path, _) in SUBCOMMANDS.items():
        if name == "states":
            continue
        module = load(name, path)
        status = module.main(["--quick"]) if module else UNAVAILABLE if name in OPTIONAL else 1
        if status == UNAVAILABLE:
            continue
        if status == INTERRUPTED:
            return status
        worst = max(worst, status)
    return worst


def load(name: str, path: str) -> ModuleType | None:
    """The module of a subcommand; None, with a printed line, if one of the packages for benchmarks is not installed."""
    try:
        return importlib.import_module(f"benchmarks.{path}")
    except ModuleNotFoundError as error:
        extra = next((extra for extra, packages in EXTRAS.items() if error.name in packages), None)
        if extra is None:
            raise
        print(f'{name}: {error.name} is not installed: pip install -e ".[{extra}]"')
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after the measuring, which ends by itself with what it has
        sys.exit(INTERRUPTED)
