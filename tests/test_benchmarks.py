"""What the benchmarks conclude from what they see: correct or not, launches and waits, tables, files."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.timing import correctness, profiles

SMALL = (60, 257, 1000)


def test_core_cases_agree_with_the_reference(device):
    backend = "triton" if device.type == "cuda" else "torch"
    assert correctness.failures(correctness.cases(SMALL), device, backend) == []


class Skewed(torch.autograd.Function):
    """The identity, whose gradient is too large by one part in a hundred."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def test_a_wrong_gradient_fails_the_core_cases(device, monkeypatch):
    def skewed(loss):
        def wrong(logits, *arguments, backend, **options):
            logits = Skewed.apply(logits) if backend != "reference" else logits
            return loss(logits, *arguments, backend=backend, **options)

        return wrong

    todo = [case for case in correctness.cases(SMALL) if case.dtype == torch.float32]
    for name in {case.loss for case in todo}:
        monkeypatch.setattr(correctness.tce_kernels, name, skewed(getattr(correctness.tce_kernels, name)))
    assert len(correctness.failures(todo, device, "auto")) == len(todo)


def event(name, start, device="CPU", end=None):
    end = start + 1 if end is None else end
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=start, end=end)
    )


def test_calls_are_counted_within_the_call():
    events = [
        event("cudaDeviceSynchronize", 1),  # the profiler's own, before and after
        event(profiles.CALL, 10, end=50),
        event(profiles.CALL, 12, "CUDA", end=60),
        event("cudaLaunchKernel", 11),
        event("cudaLaunchKernelExC", 12),
        event("cuLaunchKernelEx", 13),
        event("cuLaunchKernel_v4000", 14),
        event("cudaMemcpyAsync", 15),
        event("cudaStreamSynchronize", 16),
        event("cudaStreamIsCapturing", 17),
        event("void at::native::reduce_kernel<512, 1>", 20, "CUDA"),
        event("Memcpy DtoH (Device -> Pageable)", 21, "CUDA"),
        event("Memcpy HtoD (Pageable -> Device)", 22, "CUDA"),
        event("cudaLaunchKernel", 55),
        event("cudaDeviceSynchronize", 70),
    ]
    assert profiles.calls_in(events) == profiles.Calls(launches=4, waits=1, copies_to_host=1)


def test_a_profile_of_the_cpu_has_no_calls():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        with torch.profiler.record_function(profiles.CALL):
            torch.ones(3).sum()
    assert profiles.calls_in(profiled.events()) == (0, 0, 0)


def test_saved_rows_come_back(tmp_path):
    pytest.importorskip("tabulate", reason="only python -m benchmarks needs it")
    pytest.importorskip("tqdm", reason="only python -m benchmarks needs it")
    from benchmarks import report

    rows = [dict(provider="a, b", V=5, share=0.5, truncates=True), dict(provider="c", V=6, share=0.0, truncates=False)]
    report.save(tmp_path / "rows.csv", ["where", "what"], rows)
    assert report.load(tmp_path / "rows.csv") == (["where", "what"], rows)


def test_share_of_the_bandwidth():
    for package in ("matplotlib", "tabulate", "tqdm"):
        pytest.importorskip(package, reason="only python -m benchmarks needs it")
    from benchmarks.timing import gpu

    row = dict(N=1000, V=2000, dtype="bfloat16", ms_p50=1.0)  # 4 MB read and 4 MB written in a millisecond: 8 GB/s
    columns = gpu.roofline(row, gpu.Bandwidth(copy=10e9, peak=16e9))
    assert columns == {"GB/s": "8", "of a copy's": "80%", "of the peak": "50%"}


def test_the_share_of_the_cache_is_varied(device, monkeypatch):
    """Rows of 16 KB in an L2 of 256 KB."""
    for package in ("matplotlib", "tabulate", "tqdm", "triton"):
        pytest.importorskip(package, reason="only python -m benchmarks needs it")
    from benchmarks.timing import gpu
    from tce_kernels import kernels, triton_ops

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    grids, kernel = [], kernels.loss_and_dlogits_kernel
    monkeypatch.setattr(kernels, "loss_and_dlogits_kernel", Watched())
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (2, 2**18))
    chosen = triton_ops.CACHE_SHARE
    title, table, note = gpu.share_of_cache(device, gpu.Bandwidth(1e9, None), shapes=((16, 8192),), rounds=1)
    assert grids == [(6,), (8,), (12,), (16,)] * 2
    assert triton_ops.CACHE_SHARE == chosen and str(chosen) in note
