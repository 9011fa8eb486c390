"""What the Triton kernels promise row by row: what they read and write, where, how often, and with which digits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import (
    INTERPRETED,
    assert_linear_matches_reference,
    assert_matches_reference,
    cross_entropy,
    focal,
    linear_loss_and_gradients,
    linear_truncated,
    loss_and_gradient,
    make_inputs,
    make_linear_inputs,
    needs_triton,
    truncated,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402 - after the skip

from benchmarks.codegen.devices import DEVICES  # noqa: E402
from tce_kernels import kernels, sweeps, triton_ops  # noqa: E402
from tce_kernels.options import Form  # noqa: E402
from tce_kernels.stats import COEF, CORRECT, LSE, N_FIELDS, SHARD_SUM, SUM_EXP  # noqa: E402

pytestmark = needs_triton
interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")

N, V = 8, 199  # with `small_blocks`: blocks of 64 logits, masked ones of 16, 2 threads a row
BLOCK = 64
ONE_BLOCK = 13  # columns of rows that stay in registers, aligned or not
MOST_SPLITS = 16


def share_rows(monkeypatch, n_multiprocessors):
    """Let `2 * n_multiprocessors // N` programs share a row, if it has as many blocks."""
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (n_multiprocessors, 2**30))


def unwritten(n, device):
    """n bfloat16 numbers of memory, of which pages that nobody touches cost nothing."""
    if device.type == "cuda":
        return torch.empty(n, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.empty(n, dtype=np.int16)).view(torch.bfloat16)


@triton.jit
def lift_kernel(x_ptr, u_ptr, n, logit_scale, softcap, BLOCK_N: tl.constexpr):
    cols = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + cols, mask=cols < n)
    tl.store(u_ptr + cols, sweeps.lift(x, logit_scale, softcap, True), mask=cols < n)


@triton.jit
def store_row_kernel(loss_ptr, rows_ptr, N):
    """Numbers of row 0 of N."""
    one = tl.cast(1.0, tl.float32)
    sweeps.store_row(
        loss_ptr, rows_ptr, 0, N, 1, one, one, one, one, N > 0, one, one, one, 0.0, 0.0, one, "truncated", False
    )


class Memory:
    """Global memory as the interpreted kernels use it: every access, and the claims about alignment."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.accesses = {"read": [], "written": []}
        self.launches = []  # name and arguments
        self.wide_blocks = self.claims = 0
        self._vector = 1
        self._watch_launches(monkeypatch)
        self._watch_accesses(monkeypatch, interpreter.InterpreterBuilder)
        set_attr = interpreter.TensorHandle.set_attr

        def checked(handle, name, value):
            if name == "tt.divisibility":
                assert (np.asarray(handle.data) % np.max(value) == 0).all(), "a pointer is said to be aligned"
                self.claims += 1
            set_attr(handle, name, value)

        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)

    def _watch_launches(self, monkeypatch):
        memory = self

        class Watched:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    memory._vector = kwargs.get("VECTOR", 1)
                    memory.launches.append((self.kernel.__name__, args))
                    self.kernel[grid](*args, **kwargs)

                return launch

        for name, kernel in list(vars(kernels).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernels, name, Watched(kernel))

    def _watch_accesses(self, monkeypatch, builder):
        load, store = builder.create_masked_load, builder.create_masked_store
        whole_load, whole_store = builder.create_load, builder.create_store

        def watched_load(this, ptrs, mask, *rest):
            self._record("read", ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def watched_store(this, ptrs, value, mask, *rest):
            self._record("written", ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        def aligned_load(this, ptrs, *rest):
            self._check_block(ptrs)
            return whole_load(this, ptrs, *rest)

        def aligned_store(this, ptrs, *rest):
            self._check_block(ptrs)
            return whole_store(this, ptrs, *rest)

        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)
        monkeypatch.setattr(builder, "create_load", aligned_load)
        monkeypatch.setattr(builder, "create_store", aligned_store)

    def _record(self, kind, ptrs, mask):
        itemsize = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        self.accesses[kind].append((np.asarray(ptrs.data)[np.asarray(mask.data)], itemsize))

    def _check_block(self, ptrs):
        """Full blocks, the only ones without a mask, are what goes 16 bytes at a time."""
        addresses = np.asarray(ptrs.data)
        if self._vector > 1 and addresses.size > MOST_SPLITS:
            assert addresses.flat[0] % 16 == 0, "a block of 16-byte accesses starts between two of them"
            self.wide_blocks += 1

    def forget(self):
        """What was accessed; not what was claimed."""
        for accesses in self.accesses.values():
            accesses.clear()

    def count(self, kind, tensor):
        """How often each element was read or written."""
        storage = tensor.untyped_storage()
        start, itemsize = storage.data_ptr(), tensor.element_size()
        counts = np.zeros(len(storage), np.int32)
        for addresses, width in self.accesses[kind]:
            offsets = addresses.astype(np.int64) - start
            offsets = offsets[(offsets >= 0) & (offsets < len(storage))]
            for byte in range(width):
                np.add.at(counts, offsets + byte, 1)
        by_element = torch.from_numpy(counts[: len(counts) // itemsize * itemsize]).view(-1, itemsize)
        assert (by_element == by_element[:, :1]).all(), "half of an element"
        return by_element[:, 0].contiguous().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def outside(self, kind, tensor):
        """How often memory next to a tensor was touched: what its storage holds besides its elements."""
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return int(self.count(kind, whole).sum() - self.count(kind, tensor).sum())


@pytest.fixture
def memory(monkeypatch, small_blocks):
    return Memory(monkeypatch)


def offset_rows(x, start):
    """The same rows one after the other, the first `start` elements past a 16-byte boundary."""
    memory = x.new_zeros(x.numel() + start + 16)
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


def padded_rows(x, padding):
    return torch.nn.functional.pad(x, (0, padding))[:, : x.shape[1]]


LAYOUTS = {
    "aligned": lambda x: padded_rows(x, -x.shape[1] % 16),
    "one after the other": lambda x: offset_rows(x, 0),
    "odd start": lambda x: offset_rows(x, 1),
    "another odd start": lambda x: offset_rows(x, 5),
    "one off": lambda x: padded_rows(x, 1),
    "seven off": lambda x: offset_rows(padded_rows(x, 9).contiguous(), 7)[:, : x.shape[1]],
}
WAYS = {  # in which kernels are launched
    "one launch": {},
    "in place": {"inplace": True},
    "gradient in backward": {"reduction": "none"},
    "retained": {"allow_retain_graph": True},
}


@interpreted
@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_16_bytes_at_a_time_start_at_a_multiple_of_16_bytes(dtype, way, shared, device, memory, monkeypatch):
    """A GPU stops at a misaligned access; here no address may be claimed aligned, or used so, that is not."""
    if shared:
        share_rows(monkeypatch, 8)
    for make_layout in LAYOUTS.values():
        logits, target = make_inputs(3, V, dtype, device)
        _, exact = loss_and_gradient(truncated, logits, target, backend="torch", **WAYS[way])
        memory.forget()
        _, gradient = loss_and_gradient(truncated, make_layout(logits), target, backend="triton", **WAYS[way])
        torch.testing.assert_close(gradient, exact, atol=2e-6, rtol=2 * torch.finfo(dtype).eps + 1e-5)
    assert memory.claims > 0
    assert memory.wide_blocks > 0


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_alignment_is_that_of_both_strides(way, device, memory):
    """Every row of the logits starts at a boundary but for those after the gap, which the gradient has not."""
    logits, target = make_inputs(8, 200, torch.bfloat16, device)
    gapped = logits.new_zeros(2 * 803).as_strided((2, 4, 200), (803, 200, 1)).copy_(logits.view(2, 4, 200))
    _, exact = loss_and_gradient(truncated, logits.view(2, 4, 200), target.view(2, 4), backend="torch", **WAYS[way])
    _, gradient = loss_and_gradient(truncated, gapped, target.view(2, 4), backend="triton", **WAYS[way])
    torch.testing.assert_close(gradient, exact, atol=2e-6, rtol=2 * torch.finfo(torch.bfloat16).eps)


@interpreted
def test_rows_of_one_block_are_read_once(device, memory):
    """They stay in registers for the gradient; ignored ones are not read."""
    logits, target = make_inputs(N, ONE_BLOCK, torch.bfloat16, device)
    ignored, target[target != -100] = target == -100, 5
    others = torch.arange(ONE_BLOCK) != 5
    _, gradient = loss_and_gradient(cross_entropy, logits, target, backend="triton")
    read = memory.count("read", logits)
    assert (read[ignored] == 0).all()
    assert (read[~ignored][:, others] == 1).all()
    assert memory.outside("read", logits) == memory.outside("written", gradient) == 0


@interpreted
@pytest.mark.parametrize("columns", [ONE_BLOCK, V], ids=["one block", "blocks"])
def test_dropped_rows_of_a_chunk_are_not_written(columns, device, memory):
    """The linear path packs the kept rows, and wants nothing of the others."""
    inputs = make_linear_inputs(9, 8, columns, torch.float32, device, confident=0.6)
    _, stats = linear_truncated(*inputs, return_stats=True, backend="triton")
    memory.forget()
    linear_loss_and_gradients(linear_truncated, *inputs, backend="triton")
    (buffer,) = [args[0] for name, args in memory.launches if name == "loss_and_dlogits_kernel"]
    kept = stats.kept[stats.valid]
    written = memory.count("written", buffer[0])[:, :columns]
    assert 0 < kept.sum() < len(kept) and not kept[kept.sum() :].all()
    assert (written[kept.sum() :][~kept[kept.sum() :]] == 0).all()
    assert (written[: kept.sum()] > 0).all()


@interpreted
@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_logit_is_read_once_and_every_gradient_written_once(layout, shared, device, memory, monkeypatch):
    """Once a sweep, but for the target; ignored rows are not read, dropped rows not again, and nothing beside a row."""
    if shared:
        share_rows(monkeypatch, 16)
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    ignored, others = target == -100, torch.arange(V) != V // 2
    logits[~ignored, target[~ignored]], target[~ignored] = 0.0, V // 2
    logits[:, V // 2] = torch.linspace(-4, 18, N)
    logits = LAYOUTS[layout](logits)

    _, stats = truncated(logits, target, backend="triton", return_stats=True)
    dropped = ~ignored & ~stats.kept
    assert dropped.any() and stats.kept.any()
    read = memory.count("read", logits)
    assert (read[ignored] == 0).all()
    assert (read[~ignored][:, others] == 1).all()
    assert memory.outside("read", logits) == memory.outside("written", logits) == 0

    for way in ("one launch", "gradient in backward"):
        memory.forget()
        _, gradient = loss_and_gradient(truncated, logits, target, backend="triton", **WAYS[way])
        read, written = memory.count("read", logits)[:, others], memory.count("written", gradient)
        assert (read[ignored] == 0).all()
        assert (read[dropped] == 1).all()
        assert (read[stats.kept] == 2).all()
        scaled = 1 if way == "one launch" else 0  # by the upstream gradient
        assert (written[:, others] == 1 + scaled).all()
        assert (written[~stats.kept] == 1 + scaled).all()
        assert (written[stats.kept][:, ~others] == 2 + scaled).all()
        assert memory.outside("read", logits) == memory.outside("written", gradient) == 0


@interpreted
def test_scaling_by_one_touches_no_gradient(device, memory):
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    for upstream, times in ((1.0, 0), (2.0, 1)):
        leaf = logits.clone().requires_grad_()
        value = truncated(leaf, target, backend="triton")
        memory.forget()
        (gradient,) = torch.autograd.grad(value, leaf, torch.tensor(upstream, device=device))
        assert (memory.count("read", gradient) == times).all()
        assert (memory.count("written", gradient) == times).all()


@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
def test_rows_of_no_upstream_gradient_contain_their_nan(shared, device, small_blocks, monkeypatch):
    """They are not read; nor are dropped rows, though a NaN row is not dropped."""
    if shared:
        share_rows(monkeypatch, 16)
    logits, target = make_inputs(N, V, torch.float32, device)
    target[target == -100] = 3
    logits[1], logits[4, 7], logits[5, 100] = math.nan, math.inf, -math.inf
    logits.requires_grad_()
    upstream = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0, 1.0], device=device)
    value = cross_entropy(logits, target, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(value, logits, upstream)
    assert (gradient[upstream == 0] == 0).all()
    others = logits.detach()[upstream != 0].double().requires_grad_()
    exact = cross_entropy(others, target[upstream != 0], reduction="none", backend="reference")
    (exact_gradient,) = torch.autograd.grad(exact, others, upstream[upstream != 0].double())
    torch.testing.assert_close(gradient[upstream != 0].double(), exact_gradient, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum"])  # whose gradient is made in backward, or in the same launch
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("n_columns", [ONE_BLOCK, V], ids=["one block", "blocks"])
@pytest.mark.parametrize("n_multiprocessors", [2, 16], ids=["a program a row", "shared rows"])
def test_a_row_of_nothing_but_minus_infinity(
    n_multiprocessors, n_columns, requires_grad, reduction, device, small_blocks, monkeypatch
):
    """As the reference has it: the logsumexp is -inf, the loss NaN."""
    share_rows(monkeypatch, n_multiprocessors)
    for dtype, options in DTYPES_AND_SCALES[:3]:
        logits = torch.full((3, n_columns), -math.inf, dtype=dtype, device=device)
        logits[1, 5:9] = 2.0
        target = torch.tensor([5, 5, n_columns - 1], device=device)
        reduction = "mean" if requires_grad else "none"  # a gradient in the forward pass, or none
        value, stats = cross_entropy(
            logits.requires_grad_(requires_grad), target, reduction=reduction, return_stats=True, backend="triton",
            **options,
        )  # fmt: skip
        lse = 2 * options.get("logit_scale", 1.0) + math.log(4)
        assert stats.lse.tolist() == [-math.inf, pytest.approx(lse), -math.inf]
        assert value.isnan().tolist() == ([True, False, True] if reduction == "none" else True)
        assert stats.kept.all()
        assert stats.correct.tolist() == [False, True, False]


DTYPES_AND_SCALES = [
    (torch.float32, {}),
    (torch.float32, {"logit_scale": 1.5}),
    (torch.bfloat16, {"logit_scale": 3.0}),
    (torch.float16, {"softcap": 30.0}),
    (torch.bfloat16, {"label_smoothing": 0.1, "logit_scale": 3.0, "z_loss": 1e-2}),
]


@pytest.mark.parametrize("dtype, options", DTYPES_AND_SCALES, ids=str)
def test_programs_that_share_a_row_and_get_none_of_it(dtype, options, device, small_blocks, monkeypatch):
    """Rows are peeled, so that there is a block less than programs, and less outside of blocks than they could take."""
    for n_splits, start in ((2, 0), (4, 1), (8, 1), (8, 6)):
        columns = n_splits * BLOCK
        share_rows(monkeypatch, 2 * n_splits)
        logits, target = make_inputs(2, columns, dtype, device, seed=start)
        target[0] = 1  # before the first boundary
        logits = offset_rows(logits, start)
        assert triton_ops._n_splits(logits[None]) == n_splits
        assert_matches_reference(cross_entropy, logits, target, backend="triton", **options)


@pytest.mark.parametrize("dtype, options", DTYPES_AND_SCALES[:-1], ids=str)
def test_programs_that_share_a_row_and_see_nothing_but_masked_logits(dtype, options, device, small_blocks, monkeypatch):
    """All is masked but one program's columns, only one's are, or all but a logit; a target among the masked ones."""
    columns = 4 * BLOCK + 7
    rows, target = [], []
    for mask in (-math.inf, torch.finfo(dtype).min):
        for visible, column in [
            (slice(BLOCK, 2 * BLOCK), BLOCK + 1), (slice(0, -BLOCK), columns - 1), (slice(9, 10), 9)
        ]:  # fmt: skip
            row = torch.full((columns,), mask)
            row[visible] = 0.01 * torch.arange(columns)[visible]
            rows.append(row)
            target.append(column)
    share_rows(monkeypatch, 2 * len(target))
    logits, target = padded_rows(torch.stack(rows).to(dtype).to(device), 1), torch.tensor(target, device=device)
    assert triton_ops._n_splits(logits[None]) == 4
    value, gradient = loss_and_gradient(cross_entropy, logits, target, backend="triton", reduction="none", **options)
    exact, exact_gradient = loss_and_gradient(
        cross_entropy, logits.double(), target, backend="reference", reduction="none", **options
    )
    # Beyond float32's range a loss is infinite.
    torch.testing.assert_close(value.double().clamp(max=3e38), exact.clamp(max=3e38), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        gradient.double(), exact_gradient, atol=2e-6 + (2**-24 if dtype == torch.float16 else 0),
        rtol=1e-5 + 2 * torch.finfo(dtype).eps,
    )  # fmt: skip
    if "softcap" not in options:
        masked = (logits <= torch.finfo(dtype).min).scatter(1, target[:, None], False)
        assert (gradient[masked] == 0).all()


@pytest.mark.parametrize("logit_scale", [1.0, 1.5])
@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
@pytest.mark.parametrize("common", [2.0**31, -(2.0**33), 1e30, -2e38])
def test_logits_that_no_product_fits(common, shared, logit_scale, device, small_blocks, monkeypatch):
    """Equal maxima share the probability among them, whatever their size; the next smaller number has none."""
    if shared:
        share_rows(monkeypatch, 16)
    if logit_scale * abs(common) > 3e38:
        pytest.skip("z is infinite in float32")
    highest = torch.tensor(common, device=device)
    logits = torch.full((3, V), torch.nextafter(highest, torch.tensor(-math.inf)).item(), device=device)
    logits[0], logits[1, 90:94], logits[2, -1] = highest, highest, highest
    target = torch.tensor([4, 91, V - 1], device=device)
    value, gradient = loss_and_gradient(
        cross_entropy, logits, target, logit_scale=logit_scale, backend="triton", reduction="none"
    )
    torch.testing.assert_close(value.cpu(), torch.tensor([V, 4, 1]).log(), atol=2e-6, rtol=1e-5)
    exact = loss_and_gradient(
        cross_entropy, logits.double(), target, logit_scale=logit_scale, backend="reference", reduction="none"
    )
    torch.testing.assert_close(gradient.double(), exact[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("common", [1e4, 3e6, -3e6])
@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
def test_the_common_size_of_logits_costs_no_digits(common, shared, device, small_blocks, monkeypatch):
    """A product with log2(e) is rounded by up to 0.25 here, in the maximum's exponent as in all others."""
    if shared:
        share_rows(monkeypatch, 16)
    logits = common + (torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 2).round() / 2
    logits, target = logits.to(device), torch.tensor([3, 100, V - 1], device=device)
    for way in ({"reduction": "none"}, {"reduction": "sum"}):
        assert_matches_reference(cross_entropy, logits, target, backend="triton", **way)


@pytest.mark.parametrize(
    "dtype, start, inplace", [(torch.bfloat16, 1, False), (torch.bfloat16, 6, True), (torch.float32, 3, False)]
)
def test_the_program_that_holds_the_target_writes_it(dtype, start, inplace, device, small_blocks, monkeypatch):
    """Targets on either side of every border: first boundary, blocks, what is left after them."""
    share_rows(monkeypatch, 64)
    columns, vector = 4 * BLOCK + 21, 16 // dtype.itemsize
    head = -start % vector
    borders = [*(head + n * BLOCK for n in range(5)), head + 4 * BLOCK + 16, columns]
    target = torch.tensor(sorted({0, *(at for border in borders for at in (border - 1, border) if at < columns)}))
    logits, _ = make_inputs(len(target), columns, dtype, device)
    logits = offset_rows(torch.nn.functional.pad(logits, (0, -columns % vector)), start)[:, :columns]
    assert triton_ops._n_splits(logits[None]) == 4
    assert_matches_reference(
        cross_entropy, logits, target.to(device), backend="triton", reduction="none", inplace=inplace
    )


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_rows_that_are_larger_than_the_cache(n_rows, device, small_blocks, monkeypatch):
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (4, 128))
    logits, target = make_inputs(n_rows, V, torch.bfloat16, device)
    target[0] = 7
    assert_matches_reference(truncated, logits, target, backend="triton")
    assert_matches_reference(truncated, logits, target, backend="triton", reduction="none")


@interpreted
@pytest.mark.parametrize("cache_bytes, shares", [(2**20, True), (128, False)])
def test_rows_are_shared_if_the_cache_holds_them(cache_bytes, shares, device, memory, monkeypatch):
    """Sharing needs a launch between the two sweeps: without the cache the second would read device memory again."""
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: (16, cache_bytes))
    logits, target = make_inputs(2, V * 40, torch.bfloat16, device)
    assert_matches_reference(truncated, logits, target, backend="triton")
    assert ("split_sums_kernel" in [name for name, _ in memory.launches]) == shares


FIGURES = {device.name: (device.multiprocessors, device.cache_mib * 2**20) for device in DEVICES} | {
    "L40S": (142, 96 * 2**20),
    "RTX 4090": (128, 72 * 2**20),
    "RTX 3090": (82, 6 * 2**20),
    "A30": (56, 24 * 2**20),
    "T4": (40, 4 * 2**20),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gpu", FIGURES)
def test_rows_in_flight_fit_the_cache_and_keep_memory_busy(gpu, dtype, monkeypatch):
    """For any vocabulary. Where next to nothing fits, every multiprocessor has a row, and reads it twice."""
    n_multiprocessors, cache_bytes = FIGURES[gpu]
    share = cache_bytes * triton_ops.CACHE_SHARE
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: FIGURES[gpu])
    item = torch.empty(1, dtype=dtype)
    for columns in [*range(1024, 300_000, 13), 32000, 50257, 128256, 151936, 262144]:
        logits = item.expand(1, 10**6, columns)
        n_programs, n_warps = triton_ops._n_programs(logits), triton_ops._n_warps(logits)
        if n_programs * columns * dtype.itemsize > share:
            assert share // (columns * dtype.itemsize) < n_multiprocessors / 4
            assert n_programs == n_multiprocessors
        n_rows, idle = divmod(n_programs, n_multiprocessors)
        assert idle == 0 or n_rows == 0, "some multiprocessors have a row more than others"
        assert n_rows > 0 or n_programs >= n_multiprocessors / 4, "most multiprocessors have nothing to do"
        if n_warps < 16:
            assert n_programs * n_warps >= 15 * n_multiprocessors, "too little is on its way"
        assert n_warps == 2 or n_programs * n_warps < 30 * n_multiprocessors, "half of the warps would do"
        assert triton_ops._n_splits(logits) == 1


@pytest.mark.parametrize("gpu", FIGURES)
def test_few_rows_are_shared_among_the_multiprocessors(gpu, monkeypatch):
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: FIGURES[gpu])
    n_multiprocessors, _ = FIGURES[gpu]
    for columns in (32000, 50257, 128256, 151936, 262144):
        logits = torch.empty(1, dtype=torch.bfloat16).expand(1, n_multiprocessors // 4, columns)
        assert triton_ops._n_splits(logits) in (2, 4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gpu", FIGURES)
def test_unaligned_rows_of_more_than_one_block_are_peeled(gpu, dtype, monkeypatch):
    """However many warps they are given."""
    monkeypatch.setattr(triton_ops, "_device_figures", lambda device: FIGURES[gpu])
    for columns in range(2049, 60_000, 26):
        logits = torch.empty(1, 8192, columns, dtype=dtype, device="meta")
        for warps in (triton_ops._n_warps, triton_ops._n_row_warps):
            options = triton_ops._blocks(logits, warps=warps)
            assert options["PEEL"] and options["BLOCK_V"] < columns


@pytest.mark.parametrize("hip, warp_size", [(None, 32), ("6.0", 32), ("6.0", 64)], ids=["NVIDIA", "RDNA", "CDNA"])
def test_a_program_has_the_threads_that_its_blocks_are_for(hip, warp_size, monkeypatch):
    """Whatever the GPU calls a warp; and AMD's compiler knows no bound on registers."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=warp_size))
    size = triton_ops._warp_size.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(triton_ops, "_warp_size", lambda device: size)
    for n_warps in (2, 4, 8, 16):
        logits = torch.empty(1, dtype=torch.bfloat16).expand(1, 8, 10**6)
        options = triton_ops._blocks(logits, warps=lambda _, n=n_warps: n)
        assert options["num_warps"] * warp_size == options["THREADS"] == 32 * n_warps
        assert ("maxnreg" in options) == (hip is None)


@pytest.mark.parametrize(
    "architecture, cache_bytes",
    [({}, 2**22), ({"gcnArchName": "gfx90a"}, 2**22), ({"gcnArchName": "gfx942:sramecc+:xnack-"}, 2**28)],
)
def test_the_cache_is_the_last_before_device_memory(architecture, cache_bytes, monkeypatch):
    properties = SimpleNamespace(multi_processor_count=100, L2_cache_size=2**22, **architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert triton_ops._device_figures.__wrapped__(torch.device("cuda", 0)) == (100, cache_bytes)


def test_other_gpus_are_not_taken_for_the_interpreter(monkeypatch):
    """Even if there is a Triton for them: nothing is known of their caches and of its options."""
    monkeypatch.setattr(triton, "JITFunction", type(kernels.row_loss_kernel))  # as if nothing were interpreted
    for device_type, served in (("cpu", True), ("xpu", False)):
        device = torch.device(device_type)
        driver = SimpleNamespace(get_active_torch_device=lambda device=device: device)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
        assert triton_ops.serves(device) == served


class Given(torch.autograd.Function):
    """What a function returns, as if it had been computed from `source`; the gradient is source's."""

    @staticmethod
    def forward(ctx, source, make):
        return make()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("way", WAYS)
def test_outer_offsets_beyond_32_bits(way, device):
    """Logits [3, 2, 40] whose last pair of rows starts 2^31 elements after the first."""
    logits = unwritten(2**31 + 90, device).as_strided((3, 2, 40), (2**30, 48, 1))
    values, target = make_inputs(6, 40, torch.bfloat16, device)
    values, target = values.view(3, 2, 40).requires_grad_(), target.view(3, 2)
    target[2] = 5
    results = []
    for tensor in (values.detach().clone(), logits.copy_(values.detach())):
        value = truncated(Given.apply(values, lambda: tensor), target, backend="triton", **WAYS[way])  # noqa: B023
        (gradient,) = torch.autograd.grad(value, values, torch.full_like(value, 1.5))
        results.append((value.detach(), gradient))
        assert gradient.isfinite().all()
        assert (gradient.data_ptr() == tensor.data_ptr()) == (way == "in place")
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rows_move_beyond_32_bit_offsets(device):
    """Row 2049 to row 2048 of rows of 2^20, all others staying where they are."""
    V = 2**20
    rows = unwritten(2050 * V, device).view(2050, V)
    rows[2048].zero_()
    rows[2049].copy_(torch.arange(V) % 256)
    source = torch.arange(2049, device=device)
    source[2048] = 2049
    kernels.move_rows_kernel[(2049,)](rows, source, rows.stride(0), BLOCK_V=V if INTERPRETED else triton_ops.COPY_V)
    assert torch.equal(rows[2048], rows[2049])
    assert rows[2048].sum(dtype=torch.float32) == V // 256 * 255 * 128


FORM = Form("truncated", math.log(0.6), 1.0, -100, z_loss=0.0, label_smoothing=0.0, softcap=None, logit_scale=1.0)
SHARDS = {  # of V classes, by rank
    "one": [V],
    "even": [100, 99],
    "three": [1, 150, V - 151],
    "an empty one": [64, 0, 135, 0],
    "eight": [25] * 7 + [24],
}


def in_one_process(logits, target, row_scale, form):
    """Loss [N], rows [6, N] and gradient of logits [1, N, V]."""
    loss, rows = triton_ops.row_loss(logits, target, row_scale, None, form)
    gradient = torch.empty_like(logits)
    triton_ops.dlogits(logits, target, row_scale, rows, form, gradient)
    return loss, rows, gradient


def over_ranks(logits, target, row_scale, form, widths, n_classes=V):
    """The same from shards of so many classes, each seen by itself: only sums [F, N] go from one to another."""
    ignored, elsewhere = target == form.ignore_index, -(2**63)
    form = form._replace(ignore_index=elsewhere)
    starts = np.cumsum([0, *widths[:-1]])
    targets = [torch.where(ignored, elsewhere, target - int(start)) for start in starts]
    gradient = torch.empty_like(logits)
    shards = list(zip(logits.split(widths, 2), targets, gradient.split(widths, 2), strict=True))
    sums = torch.stack([triton_ops.shard_sums(shard, local, form) for shard, local, _ in shards])
    assert sums.shape == (len(widths), SHARD_SUM + bool(form.label_smoothing), len(target))
    loss, rows = triton_ops.row_loss_of_sums(sums, targets[-1], row_scale, None, form, n_classes)
    for shard, local, out in shards:
        triton_ops.dlogits(shard, local, row_scale, rows, form, out, n_classes)
    return loss, rows, gradient


def assert_same_over_ranks(found, expected):
    """Loss to 1e-6, gradient to a last digit, the mask and NaN to the bit."""
    (loss, rows, gradient), (whole_loss, whole_rows, whole_gradient) = found, expected
    eps = torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(rows, whole_rows, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient, whole_gradient, rtol=max(eps, 1e-6), atol=1e-7, equal_nan=True)
    assert torch.equal(rows[COEF] == 0, whole_rows[COEF] == 0)
    assert torch.equal(rows[CORRECT], whole_rows[CORRECT])


@pytest.mark.parametrize("widths", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.bfloat16, {"z_loss": 1e-2, "logit_scale": 1.5}),
        (torch.float16, {"label_smoothing": 0.1}),
        (torch.float32, {"rule": "focal", "param_number": 2.0, "alpha": 0.7, "softcap": 9.0}),
        (torch.bfloat16, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0, "logit_scale": 1.3}),
    ],
    ids=str,
)
def test_shards_of_the_classes_give_what_one_process_does(dtype, options, widths, device, small_blocks):
    logits, target = make_inputs(N, V, dtype, device)
    target[1], target[4], target[5] = V, -1, V + 70  # nobody has them
    row_scale = torch.rand(N, generator=torch.Generator().manual_seed(5)).to(device)
    row_scale[3] = 0
    args = logits[None], target, row_scale, FORM._replace(**options)
    assert_same_over_ranks(over_ranks(*args, widths), in_one_process(*args))


def test_the_number_of_classes_may_be_known_to_the_device_only(device, small_blocks):
    logits, target = make_inputs(N, V, torch.float32, device)
    args = logits[None], target, torch.ones(N, device=device), FORM._replace(label_smoothing=0.1), SHARDS["three"]
    for given, read in zip(over_ranks(*args), over_ranks(*args, torch.tensor(V, device=device)), strict=True):
        assert torch.equal(given, read)


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 1.5}, {"softcap": 9.0}, {"label_smoothing": 0.1, "z_loss": 1e-2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_one_shard_holds_stays_in_its_row(dtype, options, device, small_blocks):
    """Infinities and NaN of one rank, or of all; the other rows are as they would be without them."""
    widths = [64, 70, 0, 30, V - 164]
    logits, target = make_inputs(10, V, dtype, device)
    target[:] = 65  # on rank 1
    target[8] = 3
    logits[9] -= 200
    logits[0, :64], logits[1, 64:134], logits[2] = -math.inf, -math.inf, -math.inf
    logits[3, 140], logits[4, 134:] = math.nan, math.nan
    logits[5, 2], logits[6, 65] = math.inf, math.inf
    args = logits[None], target, torch.ones(10, device=device), FORM._replace(**options)
    found = over_ranks(*args, widths)
    assert_same_over_ranks(found, in_one_process(*args))
    assert found[0][2 if "softcap" not in options else 3 : 5].isnan().all()
    assert found[0][0 if "label_smoothing" not in options else 7].isfinite() and found[0][7:].isfinite().all()


@interpreted
def test_a_shard_is_read_once_by_whoever_has_it(device, memory):
    """Its rows, but for the ignored ones, and the target's logit once more; for the loss none is read again."""
    logits, target = make_inputs(N, V, torch.bfloat16, device)
    target[1] = V  # not here
    sums = triton_ops.shard_sums(logits[None], target, FORM)
    expected = (target != -100).int()[:, None].expand(N, V).clone()
    here = (target >= 0) & (target < V)
    expected[here, target[here]] += 1
    assert torch.equal(memory.count("read", logits), expected)
    memory.forget()
    triton_ops.row_loss_of_sums(sums[None], target, torch.ones(N), None, FORM, V)
    assert (memory.count("read", logits) == 0).all()
    assert (memory.count("read", sums) == 1).all()


@pytest.mark.parametrize("columns", [0, 1, 33])
def test_kept_rows_are_packed_alike_on_all_ranks(columns, device):
    """Whatever their width: the order depends on which are kept, and each row arrives whole."""
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        is_kept = torch.rand(37, generator=torch.Generator().manual_seed(4)).to(device) < share
        K = int(is_kept.sum())
        x = torch.arange(37.0, device=device)[:, None].repeat(1, columns)
        kept = triton_ops.pack(x, is_kept, K)
        assert torch.equal(kept.sort().values, is_kept.nonzero().flatten())
        assert torch.equal(x[:K], kept[:, None].expand(K, columns).to(x.dtype))
        assert torch.equal(kept, triton_ops.pack(torch.zeros(37, 5, device=device), is_kept, K))


@pytest.mark.parametrize("columns", [31, 33, 100])
def test_kept_rows_of_any_length_are_packed(columns, device, small_blocks, monkeypatch):
    """Shorter and longer than what is moved at a time, and several times as long."""
    monkeypatch.setattr(triton_ops, "COPY_V", 32)
    inputs = make_linear_inputs(9, 8, columns, torch.float32, device, confident=0.6)
    _, stats = linear_truncated(*inputs, return_stats=True, backend="triton")
    assert 0 < stats.n_kept < stats.n_valid
    assert_linear_matches_reference(linear_truncated, *inputs, backend="triton")


@interpreted
def test_numbers_of_more_rows_than_32_bits_address(device, memory, monkeypatch):
    """Six numbers a row: the last ones of 2^29 rows are 5 * 2^31 bytes away. Only where they would be is looked at."""
    from triton.runtime import interpreter

    n_rows, rows = 2**29, torch.zeros(1)
    monkeypatch.setattr(interpreter._interpreter, "load", lambda ptrs, mask, other, dtype: np.zeros_like(other))
    monkeypatch.setattr(interpreter._interpreter, "store", lambda *_: None)
    memory.forget()
    store_row_kernel[(1,)](torch.zeros(1), rows, n_rows)
    fields = {int(ptrs[0]) - rows.data_ptr() for ptrs, _ in memory.accesses["written"]}
    assert {4 * field * n_rows for field in range(N_FIELDS)} <= fields
    options = dict(SOFTCAP=False, SMOOTHING=False, PEEL=False, VECTOR=1, BLOCK_V=16, THREADS=2)
    kernels.dlogits_kernel[(1, 1)](
        *(torch.zeros(1) for _ in range(4)), rows, 0, 0, 0, 0, 1, n_rows, 1, 1, 0.0, 0.0, 1.0, 1.0, **options
    )
    fields = {int(ptrs[0]) - rows.data_ptr() for ptrs, _ in memory.accesses["read"] if len(ptrs)}
    assert {4 * field * n_rows for field in (LSE, COEF, SUM_EXP)} <= fields

    sums, numbers, options = torch.zeros(1), [torch.zeros(1) for _ in range(4)], options | {"SMOOTHING": True}
    of_sums = {4 * field * n_rows for field in range(2 * (SHARD_SUM + 1))}  # of two splits
    memory.forget()
    kernels.split_sums_kernel[(1, 2)](*numbers[:2], sums, 0, 0, 1, n_rows, 1, -100, 1.0, 1.0, **options)
    assert of_sums <= {int(ptrs[0]) - sums.data_ptr() for ptrs, _ in memory.accesses["written"]}
    kernels.row_loss_of_sums_kernel[(1,)](
        sums, *numbers[:2], 0.0, numbers[2], rows, n_rows, 2, 1, -100, 1.0, 0.0, 0.1, 1.0, 1.0,
        RULE="truncated", SOFTCAP=False, SMOOTHING=True, BLOCK_SPLITS=2,
    )  # fmt: skip
    assert of_sums <= {int(ptr) - sums.data_ptr() for ptrs, _ in memory.accesses["read"] for ptr in ptrs}


def lift(x, logit_scale, softcap):
    u = torch.empty_like(x)
    lift_kernel[(1,)](x, u, len(x), logit_scale, softcap, BLOCK_N=triton.next_power_of_2(len(x)))
    return u


@pytest.mark.parametrize("logit_scale, softcap", [(1.0, 1.0), (1.0, 30.0), (1.5, 1e8), (3.0, 1e4)])
def test_softcap_keeps_the_digits_of_small_logits(logit_scale, softcap, device):
    """tanh within a few eps of itself, not of 1: the softcap multiplies the error."""
    magnitude = torch.cat([torch.logspace(-30, 2, 1200), torch.linspace(0.3, 0.8, 700)]) * (softcap / logit_scale)
    x = torch.cat([magnitude, -magnitude]).to(device)
    exact = torch.tanh(x.double() * logit_scale / softcap)
    eps = torch.finfo(torch.float32).eps
    # Of the argument: two roundings, of logit_scale / softcap and of its product with x. Of tanh: those of a GPU's
    # exponential (2 eps) and of the sums and the quotient after it, weighed by its derivative, add up to 2 eps.
    torch.testing.assert_close(lift(x, logit_scale, softcap).double(), exact, atol=0, rtol=3 * eps)


def test_softcap_at_the_ends(device):
    ends = torch.tensor([math.inf, -math.inf, 3e38, -3e38, 1e3, 0.0, math.nan], device=device)
    u = lift(ends, 1.5, 30.0).tolist()
    assert u[:6] == [1, -1, 1, -1, 1, 0]
    assert math.isnan(u[6])


@pytest.mark.parametrize(
    "loss, softcap", [*((cross_entropy, softcap) for softcap in (1.0, 5.0, 30.0, 1e3, 1e4, 1e8)), (focal, 1e4)]
)
def test_any_softcap_for_logits_of_any_size(loss, softcap, device, small_blocks):
    eps = torch.finfo(torch.float32).eps
    size = torch.tensor([1e-4, 1e-2, 1.0, 10.0, 100.0, 1e3], device=device)
    logits = torch.randn(len(size), V, generator=torch.Generator().manual_seed(0)).to(device) * size[:, None]
    target = torch.arange(len(size), device=device) * 20
    options = {"softcap": softcap, "reduction": "none"}
    value, gradient = loss_and_gradient(loss, logits, target, backend="triton", **options)
    exact, exact_gradient = loss_and_gradient(loss, logits.double(), target, backend="reference", **options)
    # The target's z and the logsumexp are off by 4 eps of the largest z each: 3 of tanh, see above, and a rounding
    # after it. The gradient has that error relative to p, and twice more where focal's factor has it as well.
    off = 8 * eps * logits.abs().amax(1).clamp(max=softcap).double()
    assert ((value - exact).abs() <= 2e-6 + 1e-5 * exact + off).all()
    relative = 1e-5 + off[:, None] * (3 if loss is focal else 1)
    assert ((gradient - exact_gradient).abs() <= 1e-6 + relative * exact_gradient.abs()).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("shared", [False, True], ids=["a program a row", "shared rows"])
def test_the_target_has_the_bits_of_the_maximum(softcap, shared, device, small_blocks, monkeypatch):
    """`correct` compares the two: once as one number, once from among the row's others."""
    if shared:
        share_rows(monkeypatch, 64)
    right = torch.arange(8, device=device) < 6
    for columns in (ONE_BLOCK, V):
        logits = torch.randn(8, columns, generator=torch.Generator().manual_seed(3)).to(device)
        target = (logits.argmax(1) + ~right) % columns
        for requires_grad in (False, True):
            logits.requires_grad_(requires_grad)
            _, stats = truncated(logits, target, softcap=softcap, return_stats=True, backend="triton")
            assert torch.equal(stats.correct, right)
