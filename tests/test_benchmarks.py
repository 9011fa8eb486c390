"""What the benchmarks conclude from what they see: correct or not, launches and waits, tables, files."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

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


@pytest.fixture
def tolerances():
    for package in ("matplotlib", "scipy", "tabulate", "tokenizers", "tqdm"):
        pytest.importorskip(package, reason="only python -m benchmarks needs it")
    from benchmarks.training import tolerances

    return tolerances


def test_the_filter_leaves_out_small_entries_of_the_gradient(tolerances):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 20, 8), torch.randn(300, 8)
    target = torch.randint(300, (2, 20))
    weight[target[0, 0]] = 40 * input[0, 0]  # a sure row, of which nothing is left
    input, weight = (x.double().requires_grad_() for x in (input, weight))
    loss, share = tolerances.filtered(input, weight, target)
    got = torch.autograd.grad(3 * loss, (input, weight))

    logits = input @ weight.t()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    entries = logits.softmax(-1) - F.one_hot(target, 300)
    used = entries.abs() >= 2**-12
    assert not used[0, 0].any() and 0.2 < used.double().mean() < 0.8
    assert share.item() == pytest.approx(used.double().mean().item())
    expected = torch.autograd.grad(logits, (input, weight), 3 * torch.where(used, entries, 0) / target.numel())
    torch.testing.assert_close(got, expected)


def trained(variant, seed, cross_entropy):
    return SimpleNamespace(variant=variant, seed=seed, cross_entropy=cross_entropy)


def test_differences_are_paired_by_seed(tolerances):
    finished = [trained("exact", seed, 10.0 * seed) for seed in (3, 0, 2, 1)]
    finished += [
        trained("other", seed, 10.0 * seed + extra) for seed, extra in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 9.0))
    ]
    found = tolerances.difference(finished, "other", "cross_entropy")
    assert found == pytest.approx((2.0, 4.302653 / 3**0.5, (4.302653 + 1.060660) / 3**0.5), rel=1e-6)  # t, 2 degrees
    assert str(tolerances.difference(finished[:5], "other", "cross_entropy")) == "+1.0000 ± nan"


def test_gradients_are_compared_on_paired_seeds(tolerances, monkeypatch, tmp_path):
    from benchmarks import report

    def short_text():
        train, held_out = torch.randint(200, (2, 2000), generator=torch.Generator().manual_seed(0))
        return tolerances.Text(train, held_out, torch.arange(100, 120))

    monkeypatch.setattr(tolerances, "QUICK", (2, 3))
    monkeypatch.setattr(tolerances, "load_text", short_text)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "default_device", lambda: torch.device("cpu"))
    assert tolerances.compare(quick=True, first_seed=5) == 0

    folder = tmp_path / "results" / "cpu" / "quick"
    assert (folder / "tolerances.png").exists()
    rows = report.load(folder / "tolerances.csv")[1]
    assert [(row["seed"], row["variant"]) for row in rows] == [
        (s, name) for s in (5, 6) for name in tolerances.VARIANTS
    ]
    for exact, *others in (rows[:4], rows[4:]):
        assert exact["share"] == 1
        for other in others:
            # Weights and batches are those of the exact run: what leaves nothing out ends where it does.
            assert (other["cross_entropy"] == exact["cross_entropy"]) == (other["share"] == 1)
        assert others[-1]["share"] < 0.5
    assert rows[0]["cross_entropy"] != rows[4]["cross_entropy"]
