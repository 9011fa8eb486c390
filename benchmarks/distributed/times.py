"""How long a forward and backward pass over ranks takes, next to one process and to other packages."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist

import tce_kernels
from tce_kernels import functional

from ..timing.measure import clocked, quantiles, ratio
from ..timing.suite import THRESHOLD
from . import peers
from .cases import (
    LOGITS,
    MEGATRONS,
    OURS,
    OURS_OVER_RANKS,
    REPLICATED,
    Inputs,
    Reference,
    Scheme,
    Shape,
    inputs_for,
    own,
    run,
)
from .ranks import largest

ONE_RANK = f"{OURS}, on one rank"


def measure(
    shape: Shape, dtype: torch.dtype, shares: tuple[float, ...], rounds: int, device: torch.device, threads: bool
) -> Iterator[dict]:
    """Of every rank; rows of results for each share of kept rows. With `threads`, one rank also with p of them."""
    schemes, missing = peers.offered(device, dtype)
    for line in missing:
        yield dict(line=line)
    for kept in shares:
        reference = Reference(inputs_for(shape, dtype, kept, device))
        for what in dict.fromkeys(scheme.what for scheme in OURS_OVER_RANKS):
            field = [scheme for scheme in [*OURS_OVER_RANKS, *MEGATRONS, *schemes] if scheme.what == what]
            yield from compete(field, what, reference, shape, kept, rounds, threads)


def compete(
    field: list[Scheme], what: str, reference: Reference, shape: Shape, kept: float, rounds: int, threads: bool
) -> Iterator[dict]:
    """Those whose results are right take turns, and each rank waits for the others before every turn."""
    inputs = reference.inputs
    device, dtype, p = inputs.input.device, inputs.input.dtype, dist.get_world_size()
    calls = {}
    for scheme in field:
        tensors = own(inputs, scheme)
        reason = of_all_ranks(lambda: reference.check(scheme, run(scheme, tensors)))  # noqa: B023
        if not reason:
            calls[scheme.provider] = functools.partial(run, scheme, tensors)
        elif scheme.truncates:
            raise RuntimeError(reason)
        else:
            yield dict(line=f"{scheme.provider}, {what}: left out, {reason}")
    if what in (LOGITS, REPLICATED):
        calls |= on_one_rank(what, inputs, threads)
    times = {name: [] for name in calls}
    for round_ in range(rounds):
        names = list(calls)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            dist.barrier()
            times[name].append(largest(clocked(calls[name], device).ms, device))
    for name, of_one in times.items():
        yield shape._asdict() | dict(
            p=p, dtype=str(dtype).removeprefix("torch."), what=what, kept=kept, provider=name
        ) | quantiles(of_one) | dict(
            over_ours=ratio(of_one, times[OURS]),
            over_one_rank=ratio(of_one, times[ONE_RANK]) if ONE_RANK in times else "",
        )  # fmt: skip


def of_all_ranks(call: Callable[[], object]) -> str:
    """What went wrong, on any of them; nothing if nothing did."""
    try:
        call()
        mine = ""
    except Exception as error:  # of another package: whatever it may be, all ranks have to know
        mine = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return next(filter(None, everyones), "")


def on_one_rank(what: str, inputs: Inputs, threads: bool) -> dict[str, Callable[[], object]]:
    """All classes on the first rank, while the others do nothing."""
    input, weight, target = inputs
    if what == LOGITS:
        tensors = [(input @ weight.t()).detach().requires_grad_()]
        loss = tce_kernels.truncated_cross_entropy
    else:
        tensors = [input, weight]
        loss = tce_kernels.linear_truncated_cross_entropy
    scheme = Scheme(ONE_RANK, what, lambda *tensors: loss(*tensors, THRESHOLD))

    def call(n_threads: int) -> None:
        if dist.get_rank() == 0:
            before = torch.get_num_threads()
            torch.set_num_threads(n_threads)
            run(scheme, (*tensors, target))
            torch.set_num_threads(before)

    calls = {ONE_RANK: functools.partial(call, torch.get_num_threads())}
    p = dist.get_world_size()
    return calls | ({f"{ONE_RANK} with {p} threads": functools.partial(call, p)} if threads else {})


def agreement(shape: Shape, rounds: int) -> Iterator[dict]:
    """What it takes that the ranks compare their arguments: a call with and one without, in turns."""
    inputs = inputs_for(shape, torch.float32, 0.5, torch.device("cpu"))
    for scheme in OURS_OVER_RANKS:
        tensors = own(inputs, scheme)
        with mock.patch.object(functional, "agree", wraps=functional.agree) as watched:
            run(scheme, tensors)
        sizes = functional.agree(*watched.call_args.args)
        times = {True: [], False: []}
        for round_ in range(2 * rounds):
            agrees = bool(round_ % 2)
            replacement = functional.agree if agrees else lambda *arguments: sizes  # noqa: B023
            with mock.patch.object(functional, "agree", replacement):
                dist.barrier()
                start = time.perf_counter()
                run(scheme, tensors)
                times[agrees].append(largest(1e3 * (time.perf_counter() - start), torch.device("cpu")))
        arguments = watched.call_args.args
        itself = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            functional.agree(*arguments)
            itself.append(largest(1e3 * (time.perf_counter() - start), torch.device("cpu")))
        yield shape._asdict() | dict(
            p=dist.get_world_size(),
            what=scheme.what,
            with_ms=statistics.median(times[True]),
            without_ms=statistics.median(times[False]),
            agree_ms=statistics.median(itself),
        )
