"""Time and memory of one loss and its gradient, on logits of which a given share of rows is truncated."""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import tce_kernels

from . import report
from .measure import Provider, compiles, interleaved, observe, prepare, quantiles, ratio, run

try:
    from liger_kernel.transformers import LigerCrossEntropyLoss
except ImportError:
    LigerCrossEntropyLoss = None

THRESHOLD = 0.9
CONFIDENT = 0.99  # p_t of the rows that are to be truncated
CHECKED_ROWS = 64


def plain_truncated(logits: Tensor, target: Tensor) -> Tensor:
    """The truncated loss as one writes it in PyTorch."""
    loss = F.cross_entropy(logits, target, reduction="none")
    return torch.where(loss >= -math.log(THRESHOLD), loss, 0).mean()


def providers(device: torch.device) -> list[Provider]:
    """The first is what the others' times are divided by."""
    found = [
        Provider("F.cross_entropy (no truncation)", F.cross_entropy, truncates=False),
        Provider("tce_kernels", lambda logits, target: tce_kernels.truncated_cross_entropy(logits, target, THRESHOLD)),
        Provider("plain PyTorch", plain_truncated),
    ]
    if compiles(device):
        found.append(Provider("plain PyTorch, torch.compile", torch.compile(plain_truncated, dynamic=False)))
    if device.type == "cuda" and LigerCrossEntropyLoss is not None:
        found.append(
            Provider("Liger-Kernel (no truncation)", LigerCrossEntropyLoss(), truncates=False, overwrites=True)
        )
    return found


def make_inputs(N: int, V: int, dtype: torch.dtype, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random normal logits (N, V), round(share * N) rows of which have p_t of about CONFIDENT, and targets (N,)."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(N, V, dtype=dtype, device=device, generator=generator)
    target = torch.randint(V, (N,), device=device, generator=generator)
    rows = torch.randperm(N, device=device, generator=generator)[: round(share * N)]
    for row in rows.split(CHECKED_ROWS):
        lse = logits[row].float().logsumexp(-1)
        logits[row, target[row]] = (lse + math.log(CONFIDENT / (1 - CONFIDENT))).to(dtype)
    return logits.requires_grad_(), target


def check(provider: Provider, logits: Tensor, target: Tensor) -> None:
    """Stop the program unless loss and gradient (of the first rows) agree with the reference in float64."""
    N = len(target)
    loss, (gradient,) = run(provider, prepare(provider, (logits, target)))
    total = 0.0
    for x, t in zip(logits.detach().split(CHECKED_ROWS), target.split(CHECKED_ROWS), strict=True):
        total += reference(x.double(), t)
    x, t = logits.detach()[:CHECKED_ROWS].double().requires_grad_(), target[:CHECKED_ROWS]
    expected = torch.autograd.grad(reference(x, t) / N, x)[0]

    # Relative to each entry, as log p of about -12 is rounded before it is exponentiated; and to 1/N at the target,
    # where the gradient is the difference of two terms. Dropped rows are exact zeros.
    tolerance = 16 * torch.finfo(logits.dtype).eps
    allowed = tolerance * expected.abs()
    rows = torch.arange(len(t), device=t.device)
    allowed[rows, t] += tolerance / N * (expected[rows, t] != 0)
    wrong_entries = int((~((gradient[:CHECKED_ROWS] - expected).abs() <= allowed)).sum())
    if wrong_entries:
        sys.exit(f"{provider.name}: {wrong_entries} of {expected.numel()} checked gradients differ from the reference")
    if not abs(loss - total / N) <= tolerance * total / N:
        sys.exit(f"{provider.name}: the loss is {loss.item():.9g}, the reference says {(total / N).item():.9g}")


def reference(logits: Tensor, target: Tensor) -> Tensor:
    return tce_kernels.truncated_cross_entropy(logits, target, THRESHOLD, reduction="sum", backend="reference")


def measure(candidates: list[Provider], inputs: tuple[Tensor, Tensor], rounds: int, progress: tqdm) -> list[dict]:
    """One row of results per provider."""
    for provider in candidates:
        if provider.truncates:
            progress.set_postfix_str(f"check {provider.name}")
            check(provider, *inputs)
    extra = [observe(provider, inputs).extra_mebibytes for provider in candidates]
    times = interleaved(candidates, inputs, rounds, progress)
    return [
        dict(provider=provider.name)
        | quantiles(times[i])
        | dict(ratio=ratio(times[i], times[0]), extra_peak_MiB=extra[i], truncates=provider.truncates)
        for i, provider in enumerate(candidates)
    ]


def as_table(results: list[dict]) -> list[dict]:
    table = []
    for row in results:
        rivals = [r for r in results if r["truncates"] and r["share"] == row["share"]]
        best_time, least_memory = min(r["ms_p50"] for r in rivals), min(r["extra_peak_MiB"] for r in rivals)
        table.append(
            {
                "loss + gradient": row["provider"],
                "truncated rows": f"{row['share']:.0%}",
                "median ms": f"{row['ms_p50']:.4g}" + (" *" if row in rivals and row["ms_p50"] == best_time else "  "),
                "p20-p80 ms": f"{row['ms_p20']:.4g} - {row['ms_p80']:.4g}",
                "time / F.cross_entropy": f"{row['ratio']:.2f}",
                "extra peak MiB": f"{row['extra_peak_MiB']:.1f}"
                + (" *" if row in rivals and row["extra_peak_MiB"] == least_memory else "  "),
            }
        )
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks logits", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shares and few rounds")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("N", "V"), help="rows and vocabulary of the logits")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(arguments)

    device = report.default_device()
    on_gpu = device.type == "cuda"
    N, V = args.shape or ((8192, 128256) if on_gpu else (1024, 49152))
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    shares = [0.0, 0.8] if args.quick else [0.0, 0.5, 0.8, 0.95]
    rounds = 7 if args.quick else 20
    candidates = providers(device)

    dtype_name = str(dtype).removeprefix("torch.")
    heading = [
        report.describe(device),
        f"logits {N} x {V} {dtype_name}, threshold {THRESHOLD}, forward and backward, {rounds} interleaved rounds",
    ]
    print(*heading, sep="\n")
    results = []
    status = 0
    with tqdm(total=len(shares) * rounds * len(candidates), unit="run", leave=False) as progress:
        try:
            for share in shares:
                inputs = make_inputs(N, V, dtype, share, device)
                for row in measure(candidates, inputs, rounds, progress):
                    results.append(dict(N=N, V=V, dtype=dtype_name, share=share) | row)
        except KeyboardInterrupt:
            status = report.INTERRUPTED
    if results:
        report.publish(report.results_path(device, "logits.csv", args.quick), heading, results, as_table(results))
        print("* least of the truncated losses. Extra peak: memory beyond the logits, target and returned gradient.")
        print("F.cross_entropy computes another loss: it is the price to compare with, not a rival.")
    if not compiles(device):
        print("plain PyTorch, torch.compile: no C++ compiler found")
    if on_gpu and LigerCrossEntropyLoss is None:
        print("Liger-Kernel: not installed")
    return status
