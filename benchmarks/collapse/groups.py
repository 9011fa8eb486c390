"""Finished runs, read back: those that are compared form a group."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import report
from . import fidelity
from .engine import Run
from .fidelity import Estimate, Sample

Values = Callable[[list[dict]], np.ndarray]  # of the figures of a run: (G,), or (G, items) to be averaged


class Group(NamedTuple):
    """Runs of one setting and configuration: of each arm the seeds, and of each seed the figures per generation."""

    setting: str
    generations: int
    config: dict[str, Any]
    where: list[str]  # the lines that say where the first of them was made
    arms: dict[str, dict[int, list[dict]]]

    def positions(self, name: str = "position") -> np.ndarray:
        """Of the generations, the same in all runs: (G,)."""
        return column(next(iter(next(iter(self.arms.values())).values())), name)

    def at(self, arm: str, name: str, index: int) -> np.ndarray:
        """One figure of one generation: (seeds,)."""
        return np.array([rows[index][name] for rows in self.arms[arm].values()], float)

    def sample(self, arm: str, values: Values, partner: str | None = None) -> Sample:
        """Of all seeds, or of those that another arm has too."""
        seeds = set(self.arms[arm]) & set(self.arms[partner or arm])
        return fidelity.resample(np.stack([values(self.arms[arm][seed]) for seed in sorted(seeds)]))

    def ratio(self, arm: str, baseline: str, values: Values, level: float, positions: str = "position") -> Estimate:
        """Fidelity interval of an arm over that of another one, on the seeds that both have."""
        ours, theirs = self.sample(arm, values, baseline), self.sample(baseline, values, arm)
        return fidelity.ratio(self.positions(positions), ours, theirs, level)


def load(folder: Path, experiment: str, arms: list[str]) -> list[Group]:
    """All groups of an experiment, their arms in the order of `arms`."""
    groups = {}
    for path in sorted((folder / experiment).rglob("*.csv")):
        heading, rows = report.load(path)
        run = Run(**json.loads(heading[0]))
        if len(rows) < run.generations:
            continue
        key = json.dumps([run.setting, run.generations, run.config])
        group = groups.setdefault(key, Group(run.setting, run.generations, run.config, heading[1:], {}))
        group.arms.setdefault(run.arm, {})[run.seed] = rows
    return [
        group._replace(arms={arm: group.arms[arm] for arm in sorted(group.arms, key=arms.index)})
        for group in groups.values()
    ]


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)


def values_of(name: str, sign: int = 1) -> Values:
    """A column; times -1 where less is better."""
    return lambda rows: sign * column(rows, name)
