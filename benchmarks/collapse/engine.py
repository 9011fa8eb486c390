"""Runs of recursive training: one CSV file each, saved after every generation, resumed where they were killed."""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .. import report

THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Run(NamedTuple):
    """A model trained, sampled and trained again. What it does follows from these fields alone."""

    experiment: str
    setting: str
    arm: str  # runs that are compared differ in their arm, its options and the seed
    seed: int  # arms of the same seed share initial weights, order of batches and noise
    generations: int
    config: dict[str, Any]  # as JSON can hold it
    options: dict[str, Any] = {}  # of the arm

    def path(self, folder: Path) -> Path:
        """Of its CSV file. Another configuration has another one."""
        digest = hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()[:8]
        return folder / self.experiment / slug(self.setting) / f"{slug(self.arm)}-{self.seed}-{digest}.csv"


class Experiment(NamedTuple):
    """`begin` gives the state before generation 0; `advance` does one generation: state after it, and its figures.

    A state is what torch.save can hold. Figures are numbers and strings.
    """

    begin: Callable[[Run, Path], Any]  # the path is of a folder for what runs share
    advance: Callable[[Run, Any, int], tuple[Any, dict]]


class Missing(Exception):
    """What a run was to go on from is gone."""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def perform(experiment: Experiment, run: Run, folder: Path, tick: Callable[[], None] = lambda: None) -> None:
    """Do what is left of a run, and call `tick` after every generation; those done before count too.

    The state after each generation, figures included, is in one file, which is replaced at once: whatever ends the
    process, at most the generation that it was in is lost, and what the run becomes does not depend on it.
    """
    path, state_path = run.path(folder), scratch(folder) / run.path(Path()).with_suffix(".pt")
    heading = [json.dumps(run._asdict())]  # and then the line of each place and commit that had a part in it
    state, rows = None, []
    if state_path.exists():
        state, rows, heading = torch.load(state_path, weights_only=False)
        replace(path, lambda new: report.save(new, heading, rows))
    elif path.exists():
        rows = report.load(path)[1]
        if len(rows) < run.generations:
            raise Missing(
                f"{path.name} has {len(rows)} of {run.generations} generations, and {state_path}, which holds the "
                f"data of the last one, is missing: bring it back, or delete {path} to start again"
            )
    where = report.describe(report.default_device())
    if len(rows) < run.generations and where not in heading:
        heading.append(where)
    for _ in rows:
        tick()
    if not rows:
        state = experiment.begin(run, scratch(folder))
    for generation in range(len(rows), run.generations):
        state, figures = experiment.advance(run, state, generation)
        # Plain numbers, as they will be read from the CSV file.
        rows.append({name: x.item() if isinstance(x, np.generic) else x for name, x in figures.items()})
        replace(state_path, functools.partial(torch.save, (state, rows, heading)))
        replace(path, lambda new: report.save(new, heading, rows))
        tick()
    state_path.unlink(missing_ok=True)


def scratch(folder: Path) -> Path:
    """For what a run needs to go on, and nobody afterwards."""
    return folder / "unfinished"


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file, and its folder if need be, so that nobody ever finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def perform_all(experiments: dict[str, Experiment], runs: list[Run], folder: Path, jobs: int, label: str) -> None:
    """Side by side in `jobs` processes of one thread each, so that results do not depend on their number."""
    context = multiprocessing.get_context("spawn")
    ticks = context.SimpleQueue()
    limits = {name: os.environ.get(name) for name in THREAD_LIMITS}
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))  # read when the processes start
    try:
        pool = context.Pool(jobs, _start, (ticks,))
    finally:
        for name, value in limits.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with pool, tqdm(total=sum(run.generations for run in runs), desc=label, unit="generation", leave=False) as bar:
        threading.Thread(target=_count, args=(ticks, bar), daemon=True).start()
        tasks = ((experiments[run.experiment], run, folder) for run in runs)
        for _ in pool.imap_unordered(_perform, tasks):
            pass
        ticks.put(None)


def _start(ticks) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process


def _perform(task: tuple[Experiment, Run, Path]) -> None:
    perform(*task, tick=lambda: _ticks.put(1))


def _count(ticks, bar: tqdm) -> None:
    while ticks.get():
        bar.update()
