"""What a torch.profiler profile says of a call: its peak memory, kernel launches and waits of the host."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

CALL = "benchmarks: the call"
# Functions of the CUDA runtime and driver: cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, cudaGraphLaunch,
# cudaStreamSynchronize, ... A version may follow the name (_v7000). And of AMD's: hipLaunchKernel,
# hipModuleLaunchKernel, hipExtModuleLaunchKernel, hipStreamSynchronize, ...
LAUNCH = re.compile(r"(cu(da)?|hip(Ext)?(Module)?)(Launch\w*Kernel|GraphLaunch)\w*")
WAIT = re.compile(r"(cu(da)?|hip)(Device|Ctx|Stream|Event)Synchronize\w*")
COPY_TO_HOST = ("Memcpy DtoH", "CopyDeviceToHost")  # the second on AMD, by older profilers


class Calls(NamedTuple):
    launches: int  # of kernels
    waits: int  # of the host for the device
    copies_to_host: int


def count_calls(call: Callable[[], object]) -> Calls | None:
    """One run of `call` on a GPU, counted. None if the profiler saw no launch: it may not be allowed to look."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled, record_function(CALL):
        call()
    calls = calls_in(profiled.events())
    return calls if calls.launches else None


def calls_in(events: Iterable) -> Calls:
    """Counts within CALL, in host time: the profiler itself waits for the device when it stops.

    The copies are entries of the device's own time line, which are named by direction; only the call makes any.
    """
    events = list(events)
    (span,) = (event.time_range for event in events if event.name == CALL and event.device_type.name == "CPU")
    names = [event.name for event in events if span.start <= event.time_range.start <= span.end]
    return Calls(
        launches=sum(bool(LAUNCH.fullmatch(name)) for name in names),
        waits=sum(bool(WAIT.fullmatch(name)) for name in names),
        copies_to_host=sum(event.name.startswith(COPY_TO_HOST) for event in events),
    )


def traced_peak(profiled: profile) -> int:
    """Peak bytes of a CPU profile: the largest running sum of its allocations and releases."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocated = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak
