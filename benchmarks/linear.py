"""Time and memory of a language model's head: linear layer, loss, and the gradients of input and weight."""

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

from . import report
from .heads import FLOOR, OURS, check, exact, label, missing, providers
from .logits import THRESHOLD
from .measure import Observed, Provider, interleaved, milliseconds, observe, quantiles, ratio, run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of backend

INDISPENSABLE = (OURS, FLOOR)
SLOW_SECONDS = 20  # a provider that takes longer for one run is left out
AXES = ["N", "D", "V", "dtype", "share"]
# Of Okabe and Ito, told apart by colour-blind readers too, and two more for a GPU's longer list.
COLOURS = ["#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#882255", "#117733", "#999933", "#332288"]


class Case(NamedTuple):
    N: int
    D: int
    V: int
    dtype: torch.dtype
    share: float  # of the rows that are truncated
    rounds: int


def cases(quick: bool, shape: list[int] | None, dtype: str | None, on_gpu: bool) -> list[Case]:
    """All shares of truncated rows; unless a shape or dtype is asked for, also other N, V and dtypes at one half."""
    N, D, V = shape or ((8192, 4096, 128256) if on_gpu else (1024 if quick else 2048, 576, 49152))
    half = Case(N, D, V, getattr(torch, dtype or ("bfloat16" if on_gpu else "float32")), 0.5, 3 if quick else 5)
    if quick:
        return [half._replace(share=share) for share in (0.0, 0.8)]
    found = [half._replace(share=share) for share in (0.0, 0.1, 0.3, 0.5, 0.8, 0.95)]
    if shape or dtype:
        return found
    found += [half._replace(N=other, rounds=3) for other in ((2048, 32768) if on_gpu else (512, 1024, 4096))]
    found += [half._replace(V=other, rounds=3) for other in ((32000, 262144) if on_gpu else (16384, 98304))]
    for other in (torch.float16,) if on_gpu else (torch.bfloat16, torch.float16):
        found += [half._replace(dtype=other, share=share, rounds=3) for share in (0.0, 0.5)]
    return found


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal input (N, D) and weight (V, D), and targets (N,), of which round(share * N) are as good as sure."""
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(case.N, case.D, device=device, generator=generator)
    linear_weight = 0.02 * torch.randn(case.V, case.D, device=device, generator=generator)
    target = torch.randint(case.V, (case.N,), device=device, generator=generator)
    rows = torch.randperm(case.N, device=device, generator=generator)[: round(case.share * case.N)]
    direction = linear_weight[target[rows]]
    input[rows] = 25 * direction / direction.square().sum(-1, keepdim=True)  # a logit of 25 at the target
    return input.to(case.dtype).requires_grad_(), linear_weight.to(case.dtype).requires_grad_(), target


def admit(
    sizes: list[Provider], inputs: tuple[Tensor, ...], new_shape: bool, progress: tqdm
) -> tuple[Provider, Observed] | None:
    """The fastest of the sizes, and a run of it; None, with a printed line, if it fails or is slow."""
    admitted = None
    for provider in sizes:
        progress.set_postfix_str(f"check {label(provider)}")
        try:
            if new_shape and (provider.compiles or inputs[0].is_cuda):  # where kernels compile or tune themselves too
                run(provider, inputs)
            observed = observe(provider, inputs)
            if len(sizes) > 1:  # one run would be left to chance
                again = [milliseconds(provider, inputs) / 1e3 for _ in range(2)]
                observed = observed._replace(seconds=min(again))
        except Exception as error:
            if provider.name in INDISPENSABLE:
                raise
            # Other packages may not know this GPU or this torch, or need more memory than there is.
            reason = str(error).strip().partition("\n")[0]
            progress.write(f"{label(provider)}: left out, {type(error).__name__}: {reason}")
            continue
        if observed.seconds > SLOW_SECONDS and provider.name not in INDISPENSABLE:
            progress.write(f"{label(provider)}: left out, one run takes {observed.seconds:.0f} s")
            continue
        if admitted is None or observed.seconds < admitted[1].seconds:
            admitted = provider, observed
    return admitted


def measure(
    case: Case, field: list[list[Provider]], new_shape: bool, device: torch.device, progress: tqdm
) -> list[dict]:
    """One row of results per provider of the field."""
    if new_shape:  # code compiled for other shapes counts towards the limit of recompilations
        torch.compiler.reset()
    inputs = make_inputs(case, device)
    progress.set_postfix_str("reference")
    expected, dropped = exact(inputs)
    assert dropped.sum() == round(case.share * case.N)
    candidates, extra = [], []
    for sizes in field:
        admitted = admit(sizes, inputs, new_shape, progress)
        if admitted is None:
            progress.total -= case.rounds
            continue
        provider, observed = admitted
        if provider.name != FLOOR:
            check(provider, observed, expected[THRESHOLD if provider.truncates else 1.0], dropped)
        candidates.append(provider)
        extra.append(observed.extra_mebibytes)
    del expected, observed, admitted
    times = interleaved(candidates, inputs, case.rounds, progress)
    fastest_peer = min(times[1:-1], key=statistics.median)
    return [
        case._asdict()
        | dict(dtype=str(case.dtype).removeprefix("torch."), provider=provider.name, label=label(provider))
        | quantiles(times[i])
        | dict(time_over_fastest_peer=ratio(times[i], fastest_peer), time_over_matmuls=ratio(times[i], times[-1]))
        | dict(extra_peak_MiB=extra[i])
        for i, provider in enumerate(candidates)
    ]


def as_table(results: list[dict]) -> list[dict]:
    varying = [axis for axis in ("N", "V", "dtype") if len({row[axis] for row in results}) > 1]
    table = []
    for row in results:
        rivals = [r for r in results if r["provider"] != FLOOR and all(r[axis] == row[axis] for axis in AXES)]
        best_time, least_memory = min(r["ms_p50"] for r in rivals), min(r["extra_peak_MiB"] for r in rivals)
        table.append(
            {"head, loss and gradients": row["label"]}
            | {axis: row[axis] for axis in varying}
            | {
                "truncated rows": f"{row['share']:.0%}",
                "median ms": f"{row['ms_p50']:.4g}" + (" *" if row in rivals and row["ms_p50"] == best_time else "  "),
                "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
                "time / fastest peer": f"{row['time_over_fastest_peer']:.2f}",
                "time / matmuls": f"{row['time_over_matmuls']:.2f}",
                "extra peak MiB": f"{row['extra_peak_MiB']:.1f}"
                + (" *" if row in rivals and row["extra_peak_MiB"] == least_memory else "  "),
            }
        )
    return table


def plot(results: list[dict], device: torch.device, path: Path) -> None:
    """Left: time against the share of truncated rows. Right: memory against the vocabulary."""
    first = results[0]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
    names = list(dict.fromkeys(row["provider"] for row in results))
    colours = dict(zip((name for name in names if name != FLOOR), COLOURS, strict=False)) | {FLOOR: "black"}
    for i, name in enumerate(names):
        # Markers shrink, so that lines which coincide are seen to.
        style = dict(
            color=colours[name], linestyle="--" if name == FLOOR else "-", marker="o", markersize=max(9 - i, 2)
        )
        style |= dict(linewidth=2.6 if name == OURS else 1.4)
        rows = [row for row in results if row["provider"] == name and row["N"] == first["N"]]
        rows = [row for row in rows if row["dtype"] == first["dtype"]]
        same_V = sorted((row["share"], row["ms_p50"]) for row in rows if row["V"] == first["V"])
        left.plot([100 * share for share, _ in same_V], [ms for _, ms in same_V], label=name, **style)
        if name != FLOOR:
            half = sorted((row["V"], row["extra_peak_MiB"]) for row in rows if row["share"] == 0.5)
            right.plot(*zip(*half, strict=True), **style)
    left.set(xlabel="truncated rows (%)", ylabel="time of one step (ms)")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.set_title(f"{first['N']} x {first['D']} inputs, vocabulary {first['V']}, {first['dtype']}", fontsize=10)
    right.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="peak memory beyond inputs and gradients (MiB)")
    right.set_xticks(sorted({row["V"] for row in results}), minor=False)
    right.xaxis.set_major_formatter("{x:.0f}")
    right.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    right.yaxis.set_major_formatter("{x:g}")
    right.set_title("half of the rows truncated", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(report.describe(device), fontsize=7, color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks linear", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows, shares, rounds and providers")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("N", "D", "V"), help="rows, hidden size, vocabulary")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(arguments)

    device = report.default_device()
    todo = cases(args.quick, args.shape, args.dtype, device.type == "cuda")
    N, D, V, dtype, _, rounds = todo[0]
    heading = [
        report.describe(device),
        f"input {N} x {D}, weight {V} x {D}, {str(dtype).removeprefix('torch.')}, if not said otherwise; "
        f"threshold {THRESHOLD}, {rounds} interleaved rounds",
    ]
    print(*heading, sep="\n")
    # The files beside those of the other benchmarks are of the full set of cases.
    partial = bool(args.quick or args.shape or args.dtype)
    path = report.results_path(device, "linear.csv", partial)
    results = []
    status = 0
    fields = [providers(case.N, case.dtype, case.share, device, args.quick) for case in todo]
    total = sum(case.rounds * len(field) for case, field in zip(todo, fields, strict=True))
    with tqdm(total=total, unit="run", leave=False) as progress:
        try:
            for i, (case, field) in enumerate(zip(todo, fields, strict=True)):
                new_shape = i == 0 or case[:4] != todo[i - 1][:4]
                results += measure(case, field, new_shape, device, progress)
                report.save(path, heading, results)  # whatever ends a long run, what is done is kept
        except KeyboardInterrupt:
            status = report.INTERRUPTED
    if results:
        report.publish(path, heading, results, as_table(results))
        if len({row["V"] for row in results}) > 1:
            picture = path.with_suffix(".png")
            plot(results, device, picture)
            print(f"Saved {picture.relative_to(report.ROOT.parent)}")
        print("* least, the bare matrix products aside. Extra peak: memory beyond the inputs and returned gradients.")
        print(f"Fastest peer: the shortest median apart from {OURS} and the bare matrix products.")
    for line in missing(device, args.quick):
        print(line)
    return status
