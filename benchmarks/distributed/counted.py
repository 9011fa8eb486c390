"""Bytes that a rank sends: counted at the collectives, and read from the loopback interface."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from .ranks import LOOPBACK

COUNTERS = Path("/proc/net/dev")
REPEATS = 3  # of which the one with the fewest bytes counts: others use the interface too

# By what PyTorch calls a collective, and by what gloo then does.
NAMES = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "gloo:all_reduce": "all-reduce",
    "gloo:all_gather": "all-gather",
}
IN_GLOO = {"reduce-scatter": "all-reduce"}  # which it has not
# Of p ranks in a ring, each of which hands over x bytes.
SENT = {
    "all-reduce": lambda x, p: 2 * (p - 1) / p * x,
    "all-gather": lambda x, p: (p - 1) * x,
    "reduce-scatter": lambda x, p: (p - 1) / p * x,
}
NUMBERS = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}  # bytes, as the next
INTEGERS = {"long": 8, "long int": 8, "int": 4, "bool": 1}


class Collective(NamedTuple):
    name: str
    name_in_gloo: str
    bytes: int  # handed over
    of_numbers: bool  # not of counts, targets, checksums

    @property
    def sent(self) -> float:
        return SENT[self.name](self.bytes, dist.get_world_size())

    @property
    def sent_by_gloo(self) -> float:
        return SENT[self.name_in_gloo](self.bytes, dist.get_world_size())


def collectives(call: Callable[[], object]) -> list[Collective]:
    """Of this rank, whatever way they were called, from a profile."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiled:
        call()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    called = [event for event in events if event.name().startswith("c10d::")]
    done = [event for event in events if event.name().startswith("gloo:")]
    found = []
    for in_gloo in ("all-reduce", "all-gather"):  # each in its order, while one may overtake the other
        requests = [event for event in called if IN_GLOO.get(NAMES[event.name()], NAMES[event.name()]) == in_gloo]
        works = [event for event in done if NAMES[event.name()] == in_gloo]
        for request, work in zip(requests, works, strict=True):
            (shape,), (dtype,) = work.shapes(), work.dtypes()
            n_bytes = torch.Size(shape).numel() * (NUMBERS | INTEGERS)[dtype]
            found.append(Collective(NAMES[request.name()], in_gloo, n_bytes, dtype in NUMBERS))
    return found


def over_loopback(call: Callable[[], object]) -> float | None:
    """Bytes that all ranks have sent, over p; None where there are no counters. What a barrier takes is not in it."""
    if not COUNTERS.exists():
        return None
    of_call, of_nothing = (min(_sent_during(what) for _ in range(REPEATS)) for what in (call, lambda: None))
    return (of_call - of_nothing) / dist.get_world_size()


def _sent_during(call: Callable[[], object]) -> int:
    """As the first rank sees it; the others wait until it has read the counters."""
    dist.barrier()
    before = _counter()
    dist.barrier()
    call()
    dist.barrier()
    sent = _counter() - before
    dist.barrier()
    return sent


def _counter() -> int:
    line = next(line for line in COUNTERS.read_text().splitlines() if line.strip().startswith(f"{LOOPBACK}:"))
    return int(line.partition(":")[2].split()[8])
