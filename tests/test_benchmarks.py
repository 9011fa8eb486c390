"""What the benchmarks conclude from what they see: correct or not, launches and waits, tables, files."""

import functools
import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import correctness, profiles

SMALL = (60, 257, 1000)


@pytest.fixture
def timing():
    """The modules that need more than PyTorch."""
    for package in ("matplotlib", "tabulate", "tqdm"):
        pytest.importorskip(package, reason="only python -m benchmarks needs it")
    from benchmarks import report
    from benchmarks.timing import gpu, heads, linear, logits, measure, suite

    return SimpleNamespace(
        report=report, gpu=gpu, heads=heads, linear=linear, logits=logits, measure=measure, suite=suite
    )


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


def test_calls_are_counted_by_amd_s_names_too():
    names = ["hipLaunchKernel", "hipModuleLaunchKernel", "hipExtModuleLaunchKernel", "hipGraphLaunch"]
    names += ["hipDeviceSynchronize", "hipStreamSynchronize", "hipMemcpyWithStream", "hipStreamIsCapturing"]
    events = [event(profiles.CALL, 0, end=50)] + [event(name, 10) for name in names]
    events += [event("Memcpy DtoH (Device -> Host)", 20, "CUDA"), event("CopyHostToDevice", 21, "CUDA")]
    assert profiles.calls_in(events) == profiles.Calls(launches=4, waits=2, copies_to_host=1)


def test_a_profile_of_the_cpu_has_no_calls():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        with torch.profiler.record_function(profiles.CALL):
            torch.ones(3).sum()
    assert profiles.calls_in(profiled.events()) == (0, 0, 0)


def test_saved_rows_come_back(timing, tmp_path):
    rows = [dict(provider="a, b", V=5, share=0.5, truncates=True), dict(provider="c", V=6, share=0.0, truncates=False)]
    timing.report.save(tmp_path / "rows.csv", ["where", "what"], rows)
    assert timing.report.load(tmp_path / "rows.csv") == (["where", "what"], rows)


def test_the_heading_names_the_precision_of_float32_matmuls(timing, device):
    assert "float32 matmuls: highest precision" in timing.report.describe(device)


def test_share_of_the_bandwidth(timing):
    row = dict(N=1000, V=2000, dtype="bfloat16", ms_p50=1.0)  # 4 MB read and 4 MB written in a millisecond: 8 GB/s
    columns = timing.gpu.roofline(row, timing.gpu.Bandwidth(copy=10e9, peak=16e9))
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


def head(timing, device, share, seed=0):
    *tensors, target = timing.linear.make_inputs(timing.linear.Case(60, 64, 700, torch.float32, share, 1), device)
    if seed:
        tensors[1].detach()[5] += 0.01
    return *tensors, target


def test_what_heads_have_to_give(timing, device, monkeypatch):
    """Loss and gradients by definition, over cases of which each knows rows of the one before."""
    monkeypatch.setattr(timing.heads, "CHECKED_CLASSES", 300)
    monkeypatch.setattr(timing.heads, "CHECKED_LOGITS", 7 * 700)
    reference = timing.heads.Reference()
    for share, seed in [(0.0, 0), (0.3, 0), (0.8, 0), (0.8, 1), (0.1, 1)]:
        inputs = head(timing, device, share, seed)
        expected, dropped = reference(inputs)
        assert dropped.sum() == round(share * 60)
        x, w = (tensor.detach().double().requires_grad_() for tensor in inputs[:2])
        losses = F.cross_entropy(F.linear(x, w), inputs[2], reduction="none")
        for threshold, exact in expected.items():
            loss = torch.where(dropped, 0, losses).mean() if threshold < 1 else losses.mean()
            dinput, dweight = torch.autograd.grad(loss, (x, w), retain_graph=True)
            assert exact.loss == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(exact.dinput.double(), dinput, rtol=1e-6, atol=1e-12)
            torch.testing.assert_close(exact.dweight, exact.signs.double().T @ dweight, rtol=1e-9, atol=1e-12)


def test_rows_are_computed_once(timing, device, monkeypatch):
    computed = []
    loss = timing.heads.tce_kernels.truncated_cross_entropy

    def counted(logits, *arguments, **options):
        computed.append(len(logits))
        return loss(logits, *arguments, **options)

    monkeypatch.setattr(timing.heads.tce_kernels, "truncated_cross_entropy", counted)
    reference = timing.heads.Reference()
    for share, rows in [(0.0, 60), (0.5, 30), (0.8, 18), (0.8, 0)]:
        computed.clear()
        reference(head(timing, device, share))
        assert sum(computed) == rows

    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing.heads.tce_kernels, "truncated_cross_entropy", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        reference(head(timing, device, 0.0))
    monkeypatch.setattr(timing.heads.tce_kernels, "truncated_cross_entropy", counted)
    computed.clear()
    reference(head(timing, device, 0.0))
    assert sum(computed) == 60


def test_the_host_gets_ahead_before_a_run_is_timed(timing, monkeypatch):
    """With stand-ins for a GPU whose clock makes 2 million cycles a millisecond, as the first of two sleeps tells."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("mark")

        def elapsed_time(self, end):
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    cache = SimpleNamespace(zero_=lambda: done.append("empty the cache"))
    monkeypatch.setattr(timing.measure, "larger_than_cache", lambda device: cache)
    monkeypatch.setattr(timing.measure, "cycles_per_ms", timing.measure.cycles_per_ms.__wrapped__)
    timed = timing.measure.clocked(lambda: done.append("call"), torch.device("cuda"))
    assert timed.ms == 0.5 and 0 <= timed.host_ms < 1000
    assert done[done.index("empty the cache") :] == ["empty the cache", 4_000_000, "mark", "call", "mark", "wait"]


@pytest.mark.parametrize("wrong", ["loss", "row", "class", "dropped", None])
def test_a_wrong_head_is_found(timing, device, wrong):
    """One row or one class among all is enough, if it weighs more than rounding."""
    inputs = head(timing, device, 0.5)
    expected, dropped = timing.heads.Reference()(inputs)
    provider = timing.measure.Provider("rival", timing.heads.plain)
    observed = timing.measure.observe(provider, inputs)
    dinput, dweight = observed.gradients
    if wrong == "loss":
        observed = observed._replace(loss=1.001 * observed.loss)
    elif wrong == "row":
        dinput[(~dropped).nonzero()[3]] *= 1.01
    elif wrong == "class":
        dweight[inputs[2][~dropped][3]] *= 1.01
    elif wrong == "dropped":
        dinput[dropped.nonzero()[0], 0] = 1e-9
    check = functools.partial(timing.heads.check, provider, observed, expected[timing.suite.THRESHOLD], dropped)
    if wrong:
        with pytest.raises(timing.measure.Inexact):
            check()
    else:
        check()


def test_no_gradient_outlives_its_check(timing, device):
    """Or the next provider would have less memory."""
    kept = []

    def rival(x, target):
        assert not any(gradient() is not None for gradient in kept)
        return x.square().sum()

    def check(provider, observed):
        kept.append(weakref.ref(observed.gradients[0]))
        if provider.chunk == 2:
            raise timing.measure.Inexact("on purpose")

    sizes = [timing.measure.Provider("rival", rival, chunk=chunk) for chunk in (1, 2, 3)]
    inputs = torch.ones(5, device=device, requires_grad=True), torch.zeros(5, device=device)
    with timing.measure.tqdm(disable=True) as progress:
        admitted, _ = timing.measure.admit(sizes, inputs, check, False, float("inf"), progress)
    assert admitted.name == "rival" and len(kept) == 3


TINY = dict(N=40, V=300, dtype=torch.float32, share=0.5, rounds=2)


def report_of(timing, device, folder, monkeypatch, cases, providers=None):
    """What `--gpu-report` does on a GPU, with a few small cases; the page, which is there whatever ends it."""
    monkeypatch.setattr(timing.gpu, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(timing.logits, "compiles", lambda device: False)
    monkeypatch.setattr(timing.gpu.report, "announce", print)
    tested = timing.logits.SUITE._replace(**dict(providers=providers) if providers else {})
    parts = [timing.gpu.Part(tested, cases, 1e9)]
    backend = "triton" if device.type == "cuda" else "torch"
    return timing.gpu.write(device, backend, correctness.cases(SMALL)[:2], parts, folder)


def test_the_report_of_a_gpu(timing, device, tmp_path, monkeypatch, capsys):
    cases = [timing.logits.Case(**TINY | dict(V=V)) for V in (300, 500)]
    assert report_of(timing, device, tmp_path, monkeypatch, cases) == 0
    page = (tmp_path / "report.md").read_text()
    assert "2 of 2 cases agree" in page and "![loss and gradient: time and memory](logits.png)" in page
    assert page in capsys.readouterr().out
    _, rows = timing.report.load(tmp_path / "logits.csv")
    assert {row["V"] for row in rows} == {300, 500}
    assert ("host ms" in page) == (device.type == "cuda")


def test_what_ends_the_report_does_not_take_the_page_along(timing, device, tmp_path, monkeypatch):
    """As a rival does that leaves the GPU unusable, in the second of three cases."""
    poisoned = []

    def ours(logits, target):
        if poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return timing.logits.ours(logits, target)

    def rival(logits, target):
        if logits.shape[1] == 301:
            poisoned.append(True)
        return timing.logits.plain_truncated(logits, target)

    def providers(case, device, quick):
        copy = timing.logits.providers(case, device, quick)[-1]
        return [[timing.measure.Provider(timing.measure.OURS, ours)], [timing.measure.Provider("rival", rival)], copy]

    cases = [timing.logits.Case(**TINY | dict(V=V)) for V in (300, 301, 302)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        report_of(timing, device, tmp_path, monkeypatch, cases, providers)
    page = (tmp_path / "report.md").read_text()
    assert "## loss and gradient" in page and "rival" in page
    assert [row["V"] for row in timing.report.load(tmp_path / "logits.csv")[1]] == [300] * 3


def test_a_gpu_too_small_for_the_first_case_is_measured_in_the_others(timing, device, tmp_path, monkeypatch):
    def make_inputs(case, device):
        if case.V == 300:
            raise torch.OutOfMemoryError
        return timing.logits.make_inputs(case, device)

    monkeypatch.setattr(timing.logits, "SUITE", timing.logits.SUITE._replace(make_inputs=make_inputs))
    cases = [timing.logits.Case(**TINY | dict(V=V)) for V in (300, 301)]
    assert report_of(timing, device, tmp_path, monkeypatch, cases) == 0
    assert {row["V"] for row in timing.report.load(tmp_path / "logits.csv")[1]} == {301}


def test_a_launch_that_fails_is_told_in_a_line(timing, device, tmp_path, monkeypatch, capsys):
    def loss(*arguments, **options):
        raise subprocess.CalledProcessError(1, ["/usr/bin/gcc", *["a page of options"] * 1000])

    monkeypatch.setattr(timing.gpu.tce_kernels, "truncated_cross_entropy", loss)
    assert report_of(timing, device, tmp_path, monkeypatch, [timing.logits.Case(**TINY)]) == 1
    _, line = capsys.readouterr().out.splitlines()
    assert "CalledProcessError" in line and "python3-dev" in line and len(line) < 600
    assert not list(tmp_path.iterdir())


def test_rounded_float32_matmuls_are_refused(timing, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.gpu, "write", lambda *arguments: pytest.fail("begun"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert timing.gpu.main() == 1
    assert capsys.readouterr().out.startswith("NVIDIA_TF32_OVERRIDE=1")


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


@pytest.fixture
def states():
    pytest.importorskip("tqdm", reason="only python -m benchmarks needs it")
    from benchmarks.states import file, rows

    return SimpleNamespace(file=file, rows=rows)


@pytest.fixture
def on_states(states, timing, device, tmp_path, monkeypatch):
    """Runs `linear --states` on a small file with rows on both sides of 0.9; its exit status and its rows."""
    monkeypatch.setattr(timing.heads, "compiles", lambda device: False)
    monkeypatch.setattr(timing.heads, "missing", lambda device, quick: [])
    monkeypatch.setattr(timing.report, "announce", print)
    monkeypatch.setattr(timing.report, "results_path", lambda device, name, partial: tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(2000, 16, generator=generator), torch.arange(40) % 8
    input = weight[target] * torch.linspace(0.5, 1.5, 40)[:, None]
    found = states.file.States(input, weight, target, None, 2.0, None, "forty rows")
    states.file.save(found, tmp_path / "states.pt")

    def run(*arguments):
        status = timing.linear.main(["--states", str(tmp_path / "states.pt"), *arguments])
        path = tmp_path / "linear_states.csv"
        return status, timing.report.load(path)[1] if path.exists() else []

    return run


def test_heads_on_saved_states(on_states, tmp_path, capsys):
    status, rows = on_states()
    printed, errors_printed = capsys.readouterr()
    assert status == 0 and "forty rows" in printed and "left out" not in printed + errors_printed
    assert (tmp_path / "linear_states.png").stat().st_size > 1000
    for threshold in (1.0, 0.9):
        mine = [row for row in rows if row["threshold"] == threshold and row["provider"] == "tce_kernels"]
        assert [row["gradient_tolerance"] for row in mine] == [0, 0.001, 0.003, 0.01]
        fractions, errors = ([row[name] for row in mine] for name in ("class_fraction", "dinput_error"))
        assert fractions[0] == 1 and fractions == sorted(fractions, reverse=True) and fractions[-1] < 0.5
        assert errors[0] < 1e-5 < errors[-1] < 0.025  # rounding of p_t - 1 in float32, and what was left out
    for name, thresholds in (("F.linear + F.cross_entropy", [1, 0.9]), ("F.linear + plain PyTorch", [0.9])):
        assert [row["threshold"] for row in rows if row["provider"] == name] == thresholds


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_head_on_saved_states(on_states, timing, monkeypatch, capsys, wrong):
    right = timing.heads.tce_kernels.linear_truncated_cross_entropy

    def skewed(*arguments, **options):
        loss = right(*arguments, **options)
        return Skewed.apply(loss) if wrong == "gradient" else loss + 1e-3 * loss.detach()

    monkeypatch.setattr(timing.heads.tce_kernels, "linear_truncated_cross_entropy", skewed)
    assert on_states("--quick") == (1, [])
    assert f"the {wrong}" in capsys.readouterr().out


class Letters:
    """A tokenizer of 26 letters. It begins a text with token 26, as some do."""

    bos_token_id = 26

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [self.bos_token_id] * add_special_tokens + [ord(letter) - ord("a") for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if options else ids)


class Model(torch.nn.Module):
    """Predicts from the sum of the tokens so far, with all that the file can say of a head."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.factor = torch.nn.Embedding(27, 8), torch.nn.Linear(8, 27), factor
        config = SimpleNamespace(logit_scale=0.5, final_logit_softcapping=2.0)
        self.config = SimpleNamespace(get_text_config=lambda: config)
        self.device = torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens, use_cache):
        hidden = self.factor * self.embedding(tokens).cumsum(1)
        return SimpleNamespace(logits=self.factor * 2 * torch.tanh(0.5 * self.head(hidden) / 2))


def test_windows_predict_every_token_once(states):
    sequences = list(states.rows.windows(Letters(), "abcdefgh", 3))
    assert [sequence.tolist() for sequence in sequences] == [[26, 0, 1, 2], [26, 3, 4, 5], [26, 6, 7]]


def test_saved_states_give_the_logits_of_the_model(states, tmp_path):
    model, sequences = Model(), [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6]), torch.tensor([5, 3])]
    rows = [(sequences[0], 2), (sequences[1], 0), (sequences[2], 0)]
    states.file.save(states.rows.collect(model, iter(rows), 3), tmp_path / "states.pt")
    found = states.file.load(tmp_path / "states.pt", torch.device("cpu"))
    assert found.target.tolist() == [1, 5, 2]
    logits = found.logit_scale * F.linear(found.input, found.linear_weight, found.linear_bias)
    logits = found.softcap * torch.tanh(logits / found.softcap)
    wanted = [model(sequence[None, :-1], use_cache=False).logits[0] for sequence in sequences]
    torch.testing.assert_close(logits, torch.cat([wanted[0][2:], wanted[1][:1]]))


def test_what_makes_no_file_of_states(states, tmp_path):
    with pytest.raises(ValueError, match="what follows the model's head is not known here"):
        states.rows.collect(Model(factor=1.01), iter([(torch.tensor([3, 1, 4]), 0)]), 2)
    with pytest.raises(ValueError, match="too short"):
        states.rows.collect(Model(), iter([]), 2)
    torch.save({"input": torch.ones(3, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="linear_weight"):
        states.file.load(tmp_path / "other.pt", torch.device("cpu"))


def test_states_of_a_model_s_own_samples(states, tmp_path, capsys):
    """From a folder, greedily: each target is the class of the largest logit."""
    transformers = pytest.importorskip("transformers", reason="python -m benchmarks states needs it")
    pytest.importorskip("tabulate", reason="only python -m benchmarks needs it")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from benchmarks.states import command

    tokenizer = Tokenizer(models.WordLevel({chr(ord("a") + i): i for i in range(26)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=26, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, initializer_range=1.0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "text").write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    arguments = ["--model", str(tmp_path), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "states.pt")]
    assert command.main([*arguments, "--rows", "20", "--context", "16", "--sample", "greedy"]) == 0
    found = states.file.load(tmp_path / "states.pt", torch.device("cpu"))
    assert found.input.shape == (20, 16)
    assert found.target.equal(F.linear(found.input, found.linear_weight).argmax(1))
    assert f"{tmp_path.name} on its own greedy samples after parts of text: 20 rows" in found.description
    assert command.main(["--model", str(tmp_path / "none"), *arguments[2:]]) == 1
    assert "states: " in capsys.readouterr().out
