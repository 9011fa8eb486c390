"""How the providers of one loss are measured against each other: interleaved runs, peak memory, ratios."""

import functools
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .profiles import traced_peak

OURS = "tce_kernels"
SLOW_SECONDS = 20  # a provider that takes longer for one run is left out
HEAD_START_MS = 2  # of the host over the GPU, before a run is timed: enough if host_ms is less


class Provider(NamedTuple):
    name: str
    loss: Callable[..., Tensor]  # of the inputs, the last of which is the target
    truncates: bool = True
    overwrites: bool = False  # the inputs, which then have to be fresh for every run
    compiles: bool = False  # in its first run
    chunk: int | None = None  # rows at a time, where it is ours to choose
    is_floor: bool = False  # what no implementation can leave out, and no loss

    @property
    def label(self) -> str:
        remarks = [] if self.truncates else ["no truncation"]
        remarks += ["overwrites its input"] if self.overwrites else []
        chunk = "" if self.chunk is None else f", chunks of {self.chunk}"
        return self.name + chunk + (f" ({', '.join(remarks)})" if remarks else "")

    @property
    def indispensable(self) -> bool:
        return self.is_floor or self.name == OURS


class Observed(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]
    seconds: float
    extra_mebibytes: float  # peak memory beyond the inputs and the gradients that are returned


class Timed(NamedTuple):
    ms: float
    host_ms: float  # until the call returned: on a GPU, its launches, and its waits if there are any


class Inexact(Exception):
    """Loss or gradients are not what the reference says."""


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


def timed(provider: Provider, inputs: tuple[Tensor, ...]) -> Timed:
    inputs = prepare(provider, inputs)
    return clocked(lambda: run(provider, inputs), inputs[0].device)


def clocked(call: Callable[[], object], device: torch.device) -> Timed:
    """One call: on a GPU between two marks in its queue, with its cache emptied before.

    The GPU is kept busy for HEAD_START_MS first, in which the host gets ahead of it, as it does in a training step:
    or the time of a short call would be that of its launches.
    """
    synchronise(device)
    if device.type == "cuda":
        cycles = round(HEAD_START_MS * cycles_per_ms(device))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        larger_than_cache(device).zero_()
        torch.cuda._sleep(cycles)
        start.record()
        host_ms = elapsed(call)
        end.record()
        synchronise(device)
        return Timed(start.elapsed_time(end), host_ms)
    ms = elapsed(call)
    return Timed(ms, ms)


def elapsed(call: Callable[[], object]) -> float:
    """Milliseconds until the call returns to the host."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def cycles_per_ms(device: torch.device) -> float:
    """Of the clock that torch.cuda._sleep counts by, which is not the same on all GPUs."""
    n_cycles = 1_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1)  # its first launch takes longer
    start.record()
    torch.cuda._sleep(n_cycles)
    end.record()
    synchronise(device)
    return n_cycles / start.elapsed_time(end)


@functools.cache
def larger_than_cache(device: torch.device) -> Tensor:
    return torch.empty(2**29, dtype=torch.int8, device=device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def observe(provider: Provider, inputs: tuple[Tensor, ...]) -> Observed:
    """One run with its memory counted, which takes a little longer than a run without."""
    inputs = prepare(provider, inputs)
    device = inputs[0].device
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        loss, gradients = run(provider, inputs)
        synchronise(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
            start = time.perf_counter()
            loss, gradients = run(provider, inputs)
            seconds = time.perf_counter() - start
        peak = traced_peak(profiled)
    returned = sum(g.nbytes for g, x in zip(gradients, inputs, strict=False) if g.data_ptr() != x.data_ptr())
    return Observed(loss, gradients, seconds, (peak - returned) / 2**20)


def admit(
    sizes: list[Provider],
    inputs: tuple[Tensor, ...],
    check: Callable[[Provider, Observed], None],
    new_shape: bool,
    deadline: float,
    progress: tqdm,
) -> tuple[Provider, float] | None:
    """The fastest of the sizes and its extra memory; None, with a printed line, if it fails, is slow or comes late."""
    admitted = best_seconds = None
    for provider in sizes:
        progress.set_postfix_str(f"check {provider.label}")
        if time.perf_counter() > deadline and not provider.indispensable:
            progress.write(f"{provider.label}: left out, no time is left")
            continue
        try:
            if new_shape and (provider.compiles or inputs[0].is_cuda):  # where kernels compile or tune themselves too
                run(provider, prepare(provider, inputs))
            seconds, extra_mebibytes = checked(provider, inputs, check)
            if len(sizes) > 1:  # one run would be left to chance
                seconds = min(timed(provider, inputs).ms / 1e3 for _ in range(2))
        except Exception as error:
            if provider.indispensable:
                raise
            # Other packages may not know this GPU or this torch, or need more memory than there is.
            reason = str(error).strip().partition("\n")[0]
            progress.write(f"{provider.label}: left out, {type(error).__name__}: {reason}")
            continue
        if seconds > SLOW_SECONDS and not provider.indispensable:
            progress.write(f"{provider.label}: left out, one run takes {seconds:.0f} s")
            continue
        if admitted is None or seconds < best_seconds:
            admitted, best_seconds = (provider, extra_mebibytes), seconds
    return admitted


def checked(
    provider: Provider, inputs: tuple[Tensor, ...], check: Callable[[Provider, Observed], None]
) -> tuple[float, float]:
    """Seconds and extra memory of a run whose result is right. Its gradients go before the next run needs the room."""
    observed = observe(provider, inputs)
    if not provider.is_floor:
        check(provider, observed)
    return observed.seconds, observed.extra_mebibytes


def compete(
    field: list[list[Provider]],
    inputs: tuple[Tensor, ...],
    check: Callable[[Provider, Observed], None],
    rounds: int,
    new_shape: bool,
    deadline: float,
    progress: tqdm,
) -> list[dict]:
    """One row of results per entry of the field, each in the fastest of its sizes. The last entry is the floor."""
    candidates, extra = [], []
    for sizes in field:
        admitted = admit(sizes, inputs, check, new_shape, deadline, progress)
        if admitted is None:
            progress.total -= rounds
        else:
            candidates.append(admitted[0])
            extra.append(admitted[1])
    runs = interleaved(candidates, inputs, rounds, progress)
    times = [[run.ms for run in of_one] for of_one in runs]
    peers = [times[i] for i, provider in enumerate(candidates) if not provider.indispensable]
    fastest_peer = min(peers, key=statistics.median, default=None)
    return [
        dict(provider=provider.name, label=provider.label, truncates=provider.truncates, is_floor=provider.is_floor)
        | quantiles(times[i])
        | dict(time_over_fastest_peer=ratio(times[i], fastest_peer) if peers else math.nan)
        | dict(time_over_floor=ratio(times[i], times[-1]), extra_peak_MiB=extra[i])
        | (dict(host_ms=statistics.median(run.host_ms for run in runs[i])) if inputs[0].is_cuda else {})
        for i, provider in enumerate(candidates)
    ]


def interleaved(
    candidates: list[Provider], inputs: tuple[Tensor, ...], rounds: int, progress: tqdm
) -> list[list[Timed]]:
    """Per provider and round. Each round runs every provider once, each time starting with another."""
    runs = [[] for _ in candidates]
    for round_ in range(rounds):
        for i in range(len(candidates)):
            i = (i + round_) % len(candidates)
            progress.set_postfix_str(candidates[i].name)
            runs[i].append(timed(candidates[i], inputs))
            progress.update()
    return runs


def quantiles(times: list[float]) -> dict:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return dict(ms_p50=deciles[4], ms_p20=deciles[1], ms_p80=deciles[7])


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios within a round, whose runs saw the same machine."""
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))
