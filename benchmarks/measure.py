"""What the benchmarks of one call share: who is measured, for how long in interleaved rounds, with how much memory."""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm


class Provider(NamedTuple):
    name: str
    loss: Callable[..., Tensor]  # of the inputs, the last of which is the target
    truncates: bool = True
    overwrites: bool = False  # the inputs, which then have to be fresh for every run
    compiles: bool = False  # in its first run
    chunk: int | None = None  # rows at a time, where it is ours to choose


class Observed(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]
    seconds: float
    extra_mebibytes: float  # peak memory beyond the inputs and the gradients that are returned


def compiles(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: on a CPU, a C++ compiler."""
    return device.type != "cpu" or any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"]))


def run(provider: Provider, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradients with respect to all inputs but the target."""
    loss = provider.loss(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs[:-1])


def prepare(provider: Provider, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not provider.overwrites:
        return inputs
    return *(x.detach().clone().requires_grad_() for x in inputs[:-1]), inputs[-1]


def milliseconds(provider: Provider, inputs: tuple[Tensor, ...]) -> float:
    inputs = prepare(provider, inputs)
    synchronise(inputs[0].device)
    start = time.perf_counter()
    run(provider, inputs)
    synchronise(inputs[0].device)
    return 1e3 * (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def observe(provider: Provider, inputs: tuple[Tensor, ...]) -> Observed:
    """One run with its memory counted, which takes a little longer than a run without."""
    inputs = prepare(provider, inputs)
    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        loss, gradients = run(provider, inputs)
        synchronise(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            start = time.perf_counter()
            loss, gradients = run(provider, inputs)
            seconds = time.perf_counter() - start
        peak = traced_peak(profile)
    returned = sum(g.nbytes for g, x in zip(gradients, inputs, strict=False) if g.data_ptr() != x.data_ptr())
    return Observed(loss, gradients, seconds, (peak - returned) / 2**20)


def traced_peak(profile: torch.profiler.profile) -> int:
    """Peak bytes of a profile: the largest running sum of its allocations and releases."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocated = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def interleaved(
    candidates: list[Provider], inputs: tuple[Tensor, ...], rounds: int, progress: tqdm
) -> list[list[float]]:
    """Milliseconds per provider and round. Each round runs every provider once, each time starting with another."""
    times = [[] for _ in candidates]
    for round_ in range(rounds):
        for i in range(len(candidates)):
            i = (i + round_) % len(candidates)
            progress.set_postfix_str(candidates[i].name)
            times[i].append(milliseconds(candidates[i], inputs))
            progress.update()
    return times


def quantiles(times: list[float]) -> dict:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return dict(ms_p50=deciles[4], ms_p20=deciles[1], ms_p80=deciles[7])


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios within a round, whose runs saw the same machine."""
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))
