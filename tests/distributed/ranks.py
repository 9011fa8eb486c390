"""The processes that run cases: four of our own, started once, or those that torchrun has started.

A case is a function at the top of a module, case(here, *arguments). The first p ranks run it, and what it returns on
each of them comes back, in the order of ranks. A case that does not come back in time fails by name.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import connection
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

SIZE = 4
LIMIT = 60.0  # seconds for a case, on cores that others use as well
GRACE = 5.0  # seconds for the other ranks, once one has failed
PAIRS = (0, 1), (2, 3), (0, 2), (1, 3)  # rows and columns of a 2 x 2 mesh


class Here(NamedTuple):
    """What a case knows of the rank it runs on."""

    rank: int
    size: int
    device: torch.device
    groups: dict[tuple[int, ...], Any]  # by the ranks that are in them

    @property
    def group(self):
        return self.groups[tuple(range(self.size))]

    def mesh(self, name: str = "dp"):
        """A mesh with one dimension, of the ranks that run this case."""
        return dist.DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=(name,))

    def mesh_2d(self, names: tuple[str, str]):
        """A 2 x 2 mesh."""
        mine = [self.groups[pair] for pair in (PAIRS[self.rank // 2], PAIRS[2 + self.rank % 2])]
        return dist.DeviceMesh.from_group(mine[::-1], self.device.type, mesh=[[0, 1], [2, 3]], mesh_dim_names=names)


class Failure(NamedTuple):
    text: str


def attempt(case, here, arguments):
    try:
        return case(here, *arguments)
    except Exception:
        return Failure(traceback.format_exc())


def make_groups(size):
    """Every rank makes all groups, in the same order."""
    members = [tuple(range(p)) for p in range(1, min(size, SIZE) + 1)] + [pair for pair in PAIRS if max(pair) < size]
    return {ranks: dist.new_group(ranks) for ranks in dict.fromkeys(members)}


def checked(outcomes: dict[int, Any], case, arguments, limit):
    """The results, if all ranks have one."""
    lost = [rank for rank, outcome in outcomes.items() if outcome is None]
    text = "".join(
        f"\nrank {rank}: {outcome.text}" for rank, outcome in outcomes.items() if isinstance(outcome, Failure)
    )
    if lost:
        text += f"\nranks {lost} did not come back within {limit:.0f} s"
    if text:
        pytest.fail(f"{case.__name__}({', '.join(map(str, arguments))[:2000]}){text}", pytrace=False)
    return [result for (result,) in outcomes.values()]


class Spawned:
    """Processes of our own on the CPU, which talk by gloo."""

    device = torch.device("cpu")

    def __init__(self):
        self.processes, self.pipes, self.folder = [], [], None

    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        environment = {"OMP_NUM_THREADS": "1"}  # read when torch is imported
        if "lo" in [name for _, name in socket.if_nameindex()]:
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may lead nowhere
        context = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, environment):
            for rank in range(SIZE):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(rank, self.folder.name, theirs), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(ours)
        checked(self._outcomes(SIZE, 120, 120), self.start, (), 120)

    def stop(self):
        """End of all processes, whatever they are in."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.folder:
            self.folder.cleanup()
        self.processes, self.pipes, self.folder = [], [], None

    def run(self, case, p, *arguments, limit=LIMIT):
        if not self.processes:
            self.start()
        order = pickle.dumps((case, p, arguments))
        for pipe in self.pipes[:p]:
            pipe.send_bytes(order)
        outcomes = self._outcomes(p, limit, GRACE)
        if None in outcomes.values() or not all(process.is_alive() for process in self.processes):
            self.stop()  # who knows which collectives they are in
        return checked(outcomes, case, arguments, limit)

    def _outcomes(self, p, limit, grace):
        outcomes = dict.fromkeys(range(p))
        until = time.monotonic() + limit
        while waiting := {self.pipes[rank]: rank for rank, outcome in outcomes.items() if outcome is None}:
            ready = connection.wait(waiting, max(0.0, until - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    outcomes[rank] = Failure(f"the process ended with {self.processes[rank].exitcode}\n")
                if isinstance(outcomes[rank], Failure):
                    until = min(until, time.monotonic() + grace)
        return outcomes


def serve(rank, folder, pipe):
    """What a process of our own does: cases, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end this process
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # and with that, uninitialised memory reads as NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE, timeout=timedelta(seconds=120)
    )
    groups = make_groups(SIZE)
    pipe.send_bytes(pickle.dumps((rank,)))
    while True:
        try:
            case, p, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are gone
            return
        outcome = attempt(case, Here(rank, p, torch.device("cpu"), groups), arguments)
        pipe.send_bytes(pickle.dumps(outcome if isinstance(outcome, Failure) else (outcome,)))


class Torchrun:
    """The ranks that torchrun has started; each runs the tests, and all of them see the same outcomes."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
        on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        self.device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
        if on_gpus:
            torch.cuda.set_device(self.device)
        torch.set_num_threads(1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=2 * LIMIT))
        self.groups = make_groups(self.size)
        self.everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * LIMIT))

    def run(self, case, p, *arguments, limit=LIMIT):
        if p > self.size:
            pytest.skip(f"needs {p} ranks, torchrun has started {self.size}")
        outcome = None
        if self.rank < p:
            outcome = attempt(case, Here(self.rank, p, self.device, self.groups), arguments)
        outcomes = [None] * self.size
        dist.all_gather_object(outcomes, outcome if isinstance(outcome, Failure) else (outcome,), group=self.everyone)
        return checked(dict(enumerate(outcomes[:p])), case, arguments, limit)

    def stop(self):
        dist.destroy_process_group()


def processes():
    """Those that run cases here."""
    return Torchrun() if "RANK" in os.environ else Spawned()
