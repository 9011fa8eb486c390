"""The losses in models of transformers: what a training step costs with and without them.

With --census instead: which models of the installed transformers can have them, and whether they stay what they are.
"""

import argparse
from collections import Counter

import torch
import transformers
from tqdm import tqdm

from .. import INTERRUPTED, report
from . import census


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks integrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--census", nargs="*", metavar="MODEL", help="classes of models, all of them if none is given, in ten minutes"
    )
    args = parser.parse_args(arguments)
    if args.census is not None:
        return take_census(args.census)
    return 0


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
