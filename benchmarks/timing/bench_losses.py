"""The core cases for pytest-benchmark: `pytest benchmarks`, with --benchmark-autosave and --benchmark-compare.

Memory is printed below the times and saved with them as extra_info: MiB beyond inputs and returned gradients.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytest_benchmark", reason='not installed: pip install -e ".[bench]"')
pytest.importorskip("tqdm", reason='not installed: pip install -e ".[bench]"')

from . import heads, linear, logits  # noqa: E402 - after what skips the module
from .measure import OURS, Provider, observe, run, synchronise  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20 if DEVICE.type == "cuda" else 5
DTYPES = ["float32", "bfloat16"]
SHARES = [0.0, 0.8]  # of the rows that are truncated

LOGITS = [
    Provider(OURS, logits.ours),
    Provider("plain PyTorch", logits.plain_truncated),
    Provider("F.cross_entropy", F.cross_entropy, truncates=False),
]
LINEAR = [
    Provider(OURS, heads.ours),
    Provider("F.linear + plain PyTorch", heads.plain),
    Provider("F.linear + F.cross_entropy", heads.cross_entropy, truncates=False),
]
if hasattr(F, "linear_cross_entropy"):
    chunked = functools.partial(heads.chunked, batch_chunk_size=512)
    LINEAR.append(Provider("F.linear_cross_entropy", chunked, truncates=False))


@pytest.mark.parametrize("provider", LOGITS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("share", SHARES, ids="{:.0%} truncated".format)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_logits(benchmark, record_property, provider, share, dtype):
    N, V = (8192, 128256) if DEVICE.type == "cuda" else (512, 32000)
    inputs = logits.make_inputs(logits.Case(N, V, getattr(torch, dtype), share, ROUNDS), DEVICE)
    benchmark.group = f"logits {N} x {V}, {dtype}, {share:.0%} truncated"
    measure(benchmark, record_property, provider, inputs)


@pytest.mark.parametrize("provider", LINEAR, ids=lambda provider: provider.name)
@pytest.mark.parametrize("share", SHARES, ids="{:.0%} truncated".format)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_linear(benchmark, record_property, provider, share, dtype):
    N, D, V = (8192, 4096, 128256) if DEVICE.type == "cuda" else (512, 256, 32000)
    inputs = linear.make_inputs(linear.Case(N, D, V, getattr(torch, dtype), share, ROUNDS), DEVICE)
    benchmark.group = f"input {N} x {D}, weight {V} x {D}, {dtype}, {share:.0%} truncated"
    measure(benchmark, record_property, provider, inputs)


def measure(benchmark, record_property, provider, inputs):
    run(provider, inputs)  # kernels compile
    benchmark.extra_info["extra_peak_MiB"] = extra = observe(provider, inputs).extra_mebibytes
    record_property("extra_peak_MiB", extra)

    def call():
        run(provider, inputs)
        synchronise(DEVICE)

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
