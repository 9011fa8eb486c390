"""`python -m benchmarks --gpu-report`: correctness, then the suites within a given time, and a page with all of it."""

import functools
import statistics
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from .. import report
from . import correctness, linear, logits, suite
from .measure import OURS, clocked, prepare, run
from .profiles import count_calls
from .suite import Suite

# Seconds from the start after which no case is begun, and no call counted; the whole is to take less than 540.
LOGITS_UNTIL, LINEAR_UNTIL, CALLS_UNTIL = 200, 420, 480
COUNTED_SHARE = 0.8  # of rows that are truncated in the call whose launches are counted
CACHE_SHARES = (3 / 8, 1 / 2, 3 / 4, 1)  # of the L2, which rows in flight may fill
CACHED_SHAPES = ((2048, 128256), (2048, 262144))  # N and V


class Part(NamedTuple):
    suite: Suite
    cases: list
    until: float  # seconds from the start


class Bandwidth(NamedTuple):
    """Bytes read and written per second."""

    copy: float  # measured
    peak: float | None  # what the memory's clock and width amount to, if the driver tells


def main() -> int:
    if not torch.cuda.is_available():
        print("--gpu-report needs a GPU, and torch.cuda.is_available() says that there is none here.")
        return 1
    parts = [
        Part(part, part.cases(False, None, None, True), until)
        for part, until in ((logits.SUITE, LOGITS_UNTIL), (linear.SUITE, LINEAR_UNTIL))
    ]
    device = torch.device("cuda")
    folder = report.results_path(device, "report.md", False).parent
    return write(device, "triton", correctness.cases(), parts, folder)


def write(device: torch.device, backend: str, to_check: list[correctness.Case], parts: list[Part], folder: Path) -> int:
    """Check, measure, and write `folder`/report.md; the exit status. What is wrong is not measured."""
    start = time.perf_counter()
    page = [f"# tce_kernels on {report.describe(device)}"]
    print(page[0].removeprefix("# "))
    with tqdm(to_check, desc="correctness", unit="case", leave=False) as progress:
        wrong = correctness.failures(progress, device, backend)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    verdict = f"{len(to_check) - len(wrong)} of {len(to_check)} cases agree with the reference in float64."
    if wrong:
        print(f"{verdict} Nothing is measured.")
        return 1
    bandwidth = Bandwidth(copy_bandwidth(device), peak_bandwidth(device))
    page.append(f"{verdict} {in_words(bandwidth)}")
    print(page[-1])

    status = 0
    for part in parts:
        path = folder / f"{part.suite.name}.csv"
        rows, status = suite.run(part.suite, part.cases, device, path, deadline=start + part.until)
        if rows:
            suite.draw(part.suite, path)
            page += section(part, path, device, bandwidth)
        if status:
            break
    save(page, folder)
    if not status and device.type == "cuda":
        page += share_of_cache(device, bandwidth)
        counted = [row for part in parts for row in count(part, device, start + CALLS_UNTIL)]
        if counted:
            report.save(folder / "calls.csv", [report.describe(device)], counted)
            title = f"## Kernel launches and waits of the host, forward and backward, {COUNTED_SHARE:.0%} truncated"
            page += [title, report.as_text(counted, markdown=True)]
            save(page, folder)
    print("", *page, f"{time.perf_counter() - start:.0f} seconds.", sep="\n\n")
    report.announce(folder / "report.md")
    return status


def save(page: list[str], folder: Path) -> None:
    (folder / "report.md").write_text("\n\n".join(page) + "\n")


def copy_bandwidth(device: torch.device, n_bytes: int = 2**30) -> float:
    """Of a copy of `n_bytes`, which are read once and written once; the median of 10."""
    source = torch.zeros(n_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [clocked(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * n_bytes / (statistics.median(times) / 1e3)


def peak_bandwidth(device: torch.device) -> float | None:
    """Two transfers a clock over the width of the bus; None where torch does not know them."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_kHz, width_bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * clock_kHz * 1e3 * width_bits / 8 or None


def in_words(bandwidth: Bandwidth) -> str:
    peak = f", {bandwidth.copy / bandwidth.peak:.0%} of the peak, {bandwidth.peak / 1e9:.0f}" if bandwidth.peak else ""
    return f"A copy of 1 GiB reads and writes {bandwidth.copy / 1e9:.0f} GB/s{peak}."


def section(part: Part, path: Path, device: torch.device, bandwidth: Bandwidth) -> list[str]:
    """The part's chapter of the page, from its saved rows."""
    heading, rows = report.load(path)
    table = suite.as_table(part.suite, rows)
    notes = [
        f"A star: the least of its case, {part.suite.floor} aside. Fastest peer: the shortest median apart from {OURS} "
        f"and {part.suite.floor}. Extra peak: memory beyond the inputs and the returned gradients."
    ]
    if part.suite is logits.SUITE:
        for row, line in zip(rows, table, strict=True):
            line |= roofline(row, bandwidth)
        notes.append("GB/s: the logits read once and written once, the least that any loss with a gradient can do.")
    lines = [f"## {part.suite.subject}", heading[-1], report.as_text(table, markdown=True), " ".join(notes)]
    wanted = {p.name for case in part.cases for sizes in part.suite.providers(case, device, False) for p in sizes}
    absent = sorted(wanted - {row["provider"] for row in rows})
    reasons = [f"{name}: failed, was inexact, or came too late: see the output" for name in absent]
    reasons += part.suite.missing(device, False)
    if reasons:
        lines.append("\n".join(f"- {line}" for line in reasons))
    picture = path.with_suffix(".png")
    if picture.exists():
        lines.append(f"![{part.suite.subject}: time and memory]({picture.name})")
    return lines


def roofline(row: dict, bandwidth: Bandwidth) -> dict:
    """How much of the memory's bandwidth a row of the suite `logits` uses."""
    n_bytes = 2 * row["N"] * row["V"] * getattr(torch, row["dtype"]).itemsize
    per_second = n_bytes / (row["ms_p50"] / 1e3)
    columns = {"GB/s": f"{per_second / 1e9:.0f}", "of a copy's": f"{per_second / bandwidth.copy:.0%}"}
    return columns | ({"of the peak": f"{per_second / bandwidth.peak:.0%}"} if bandwidth.peak else {})


def share_of_cache(
    device: torch.device, bandwidth: Bandwidth, shapes: tuple[tuple[int, int], ...] = CACHED_SHAPES, rounds: int = 10
) -> list[str]:
    """Loss and gradient, timed in turns for each share of the L2 that rows may fill until they are read again."""
    from tce_kernels import triton_ops, truncated_cross_entropy  # imported late, with triton

    table = []
    for N, V in shapes:
        logits = torch.randn(N, V, dtype=torch.bfloat16, device=device).requires_grad_()
        target = torch.randint(V, (N,), device=device)
        times = {share: [] for share in CACHE_SHARES}
        for _ in range(rounds + 1):  # the first compiles
            for share, found in times.items():
                with mock.patch.object(triton_ops, "CACHE_SHARE", share):
                    call = functools.partial(truncated_cross_entropy, logits, target, threshold=1.0, backend="triton")
                    found.append(clocked(call, device))
        for share, found in times.items():
            with mock.patch.object(triton_ops, "CACHE_SHARE", share):
                programs, warps = triton_ops._n_programs(logits[None]), triton_ops._n_warps(logits[None])
            ms = statistics.median(found[1:])
            n_bytes = ms / 1e3 * bandwidth.copy / (N * V)
            table.append(
                {"share": share, "N": N, "V": V, "rows in flight": programs, "warps a row": warps}
                | {"ms": f"{ms:.3f}", "bytes a logit": f"{n_bytes:.1f}"}
            )
    return [
        "## Share of the L2 that rows in flight may fill: loss and gradient in bfloat16",
        report.as_text(table, markdown=True),
        f"Bytes a logit at a copy's speed: 4 if the second read of a row finds it in the L2, 6 if it does not. The "
        f"package takes {triton_ops.CACHE_SHARE}.",
    ]


def count(part: Part, device: torch.device, deadline: float) -> list[dict]:
    """Launches, waits and copies of every provider, in the part's first shape and the last of its chunk sizes."""
    case = part.cases[0]._replace(share=COUNTED_SHARE)
    torch.compiler.reset()
    inputs = part.suite.make_inputs(case, device)
    rows = []
    with tqdm(part.suite.providers(case, device, False), desc="calls", unit="provider", leave=False) as progress:
        for *_, provider in progress:
            if provider.is_floor:
                continue
            if time.perf_counter() > deadline:
                progress.write(f"{provider.label}: calls not counted, no time is left")
                continue
            try:
                run(provider, prepare(provider, inputs))  # compiles
                fresh = prepare(provider, inputs)
                calls = count_calls(lambda provider=provider, fresh=fresh: run(provider, fresh))
            except Exception as error:
                if provider.indispensable:
                    raise
                reason = str(error).strip().partition("\n")[0]
                progress.write(f"{provider.label}: calls not counted, {type(error).__name__}: {reason}")
                continue
            if calls is None:
                progress.write(f"{provider.label}: calls not counted, the profiler saw no launch")
                continue
            rows.append(dict(suite=part.suite.name, provider=provider.label) | calls._asdict())
    return rows
