"""Processes of this machine as ranks, over gloo and a file; or those that torchrun has started."""

import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(minutes=2)  # until a collective fails that not all ranks have come to
LOOPBACK = "lo"


def spawned(measure: Callable[..., Iterator[dict]], p: int, *arguments) -> Iterator[dict]:
    """What measure(*arguments) yields on the first of p ranks, as it comes."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.spawn(_run, (p, folder, results, measure, arguments), nprocs=p, join=False)
        try:
            while not ranks.join(timeout=0.1):
                yield from _waiting(results)
            yield from _waiting(results)
        finally:
            for process in ranks.processes:
                process.terminate()
                process.join()


def _waiting(results) -> Iterator[dict]:
    while not results.empty():
        yield results.get()


def _run(rank: int, p: int, folder: str, results, measure: Callable[..., Iterator[dict]], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    if (Path("/sys/class/net") / LOOPBACK).exists():
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning)  # names that older versions do not have
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=p, timeout=PATIENCE)
    try:
        for row in measure(*arguments):
            if rank == 0:
                results.put(row)
    finally:
        dist.destroy_process_group()


def by_torchrun() -> bool:
    return dist.is_torchelastic_launched()


def join_torchrun() -> torch.device:
    """The device of this rank, in a group over NCCL, or over gloo where there is no GPU."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=PATIENCE)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
    return device


def largest(value: float, device: torch.device) -> float:
    """Over the ranks."""
    value = torch.tensor(value, dtype=torch.double, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()
