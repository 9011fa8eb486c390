"""The losses in models of transformers: what a training step costs with and without them.

With --census instead: which models of the installed transformers can have them, and whether they stay what they are.
With --finetune: the log of a model that is trained with them for a few steps.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .. import INTERRUPTED, report
from ..timing.measure import Inexact
from . import census, finetune, steps

STEPS = 20  # of fine-tuning


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks integrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the smaller model, and fewer rounds")
    parser.add_argument(
        "--census", nargs="*", metavar="MODEL", help="classes of models, all of them if none is given, in ten minutes"
    )
    parser.add_argument("--finetune", metavar="MODEL", help="a name on the Hugging Face hub, a folder, or a GGUF file")
    parser.add_argument("--steps", type=int, default=STEPS, help="of --finetune (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.census is not None:
        return take_census(args.census)
    if args.finetune is not None:
        return log_finetuning(args.finetune, args.steps)
    return time_steps(args.quick)


def time_steps(quick: bool) -> int:
    device = report.default_device()
    cases, rounds = (steps.CASES[:1], 3) if quick else (steps.CASES, 5)
    heading = [
        f"{report.describe(device)} | transformers {transformers.__version__}",
        f"forward and backward of Llamas with tied embeddings, V {steps.VOCABULARY}, without an optimizer, "
        f"{rounds} interleaved rounds",
    ]
    print(*heading, sep="\n")
    path = report.results_path(device, "integrations.csv", quick)
    rows, missing, status = [], [], 0
    with tqdm(total=0, unit="step", leave=False) as progress:
        try:
            for case in cases:
                measured, missing = steps.measure(case, device, rounds, progress)
                rows += measured
                report.save(path, heading, rows)
        except KeyboardInterrupt:
            status = INTERRUPTED
        except Inexact as error:
            progress.write(str(error))
            status = 1
    if rows:
        print(report.as_text(as_table(rows)))
        report.announce(path)
    print(*missing, sep="\n")
    return status


def log_finetuning(name: str, n_steps: int) -> int:
    device = report.default_device()
    heading = [
        f"{report.describe(device)} | transformers {transformers.__version__}",
        f"{Path(name).name} on pydoc_data.topics: {n_steps} steps of {finetune.BATCH} x {finetune.CONTEXT} tokens",
    ]
    print(*heading, sep="\n")
    try:
        rows = finetune.finetune(name, n_steps, device)
    except (OSError, ImportError, ValueError) as error:  # no such model, a package is missing, an unknown kind
        print(f"integrations: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    table = [
        {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    report.publish(report.results_path(device, "finetuning.csv", n_steps != STEPS), heading, rows, table)
    return 0


def as_table(rows: list[dict]) -> list[dict]:
    return [
        {
            "training step with": row["provider"],
            "model": row["model"],
            "tokens": row["tokens"],
            "median ms": f"{row['ms_p50']:.4g}",
            "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
            "time / stock": f"{row['time_over_stock']:.2f}",
            "extra peak MiB": f"{row['extra_peak_MiB']:.1f}",
            "memory / stock": f"{row['memory_over_stock']:.2f}",
        }
        for row in rows
    ]


def take_census(wanted: list[str]) -> int:
    """All findings are saved; those of some models are printed."""
    heading = [f"transformers {transformers.__version__} | torch {torch.__version__} | commit {report.commit()}"]
    print(*heading)
    findings = []
    try:
        for finding in tqdm(census.take(wanted), unit="model", leave=False):
            findings.append(finding)
            if wanted or finding.verdict == census.WRONG:
                tqdm.write(": ".join(filter(None, finding)))
    except KeyboardInterrupt:
        return INTERRUPTED
    if not wanted:
        report.save(census.PATH, heading, [finding._asdict() for finding in findings])
        report.announce(census.PATH)
    print(report.as_text(counted(findings)))
    return int(any(finding.verdict == census.WRONG for finding in findings))


def counted(findings: list[census.Finding]) -> list[dict]:
    """How many models of each mapping have each verdict."""
    found = Counter((finding.mapping, finding.verdict) for finding in findings)
    return [
        {"models": mapping} | {verdict: found[mapping, verdict] for verdict in census.VERDICTS}
        for mapping in census.MAPPINGS
    ]
