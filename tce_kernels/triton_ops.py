"""The row operations on Triton's kernels: how they are launched, and what for."""

import functools
import math

import torch
import triton

from . import kernels, stats

WARP = 32  # threads; what a GPU calls a warp may be twice that
LOGITS_PER_THREAD = 32
CACHE_SHARE = 3 / 4  # of the cache behind all multiprocessors: what the rows in flight may fill
COPY_V, COPY_WARPS = 4096, 4
MOST_PLANS = 1024  # that are kept; a batch of another length has another one
SUMMED_ROWS, SUMMED_V = 512, 1024
ADDED_D = 1024


def serves(device):
    """Whether the kernels run on this device: an NVIDIA or AMD GPU, or a CPU that plays one for Triton."""
    if device.type == "cuda" or not isinstance(kernels.row_loss_kernel, triton.JITFunction):
        return True
    try:  # of other GPUs neither cache nor compiler options are known here
        return device.type == "cpu" == triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:  # no driver at all
        return False


def _launch_options(n_warps, device):
    """Compiler options. Fusion is pinned because Triton 3.10 turns it off by default."""
    options = {"num_warps": n_warps * 32 // _warp_size(device), "enable_fp_fusion": True}
    # What 512 threads can have: left alone, ptxas aims at fewer and spills to get there.
    return options if torch.version.hip else options | {"maxnreg": 128}


@functools.cache
def _warp_size(device):
    """Threads that the device runs in step: 32, but 64 on AMD's CDNA."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def _device_figures(device):
    """Multiprocessors, and bytes of the cache that they share."""
    if device.type != "cuda":  # a CPU: so small that splits, and programs that take several rows, come up
        return 2, 2**18
    properties = torch.cuda.get_device_properties(device)
    # From MI300 on (gfx94*, gfx95*) there is an Infinity Cache of 256 MB behind the L2, which torch does not report.
    has_larger = getattr(properties, "gcnArchName", "").startswith(("gfx94", "gfx95"))
    return properties.multi_processor_count, 256 * 2**20 if has_larger else properties.L2_cache_size


def _rows_in_cache(logits):
    """Rows that CACHE_SHARE of the cache holds at once, so that the second read of a row hits."""
    _, cache_bytes = _device_figures(logits.device)
    return int(cache_bytes * CACHE_SHARE) // (logits.shape[2] * logits.element_size())


def _rows_in_flight(logits):
    """Rows that `loss_and_dlogits_kernel` has under way where there are enough: those in the cache, the same number on
    every multiprocessor.

    If they would leave three quarters of the multiprocessors idle, one row on each: reading it from device memory
    twice then costs less than hits that few ask for.
    """
    n_multiprocessors, _ = _device_figures(logits.device)
    rows = _rows_in_cache(logits)
    if rows < n_multiprocessors / 4:
        return n_multiprocessors
    return rows - rows % n_multiprocessors if rows > n_multiprocessors else rows


def _n_warps(logits):
    """Warps a row of `loss_and_dlogits_kernel`: as few as keep memory busy, since a row's reductions cost the same
    however many logits they sum up.

    Each thread has LOGITS_PER_THREAD logits on their way at a time: 64 bytes of a 16-bit type, 2 KB a warp. A
    multiprocessor of an H100 is due 13 to 15 bytes a cycle, which take about 1000 cycles to come: 8 warps or so have to
    ask for them at any moment. A warp that computes asks for nothing, so it takes twice as many, in all the rows that
    are in flight there: 4 warps a row at V = 32000, 8 at 50257, 16 from 128256 on, on an A100 too.
    """
    rows_per_multiprocessor = _rows_in_flight(logits) / _device_figures(logits.device)[0]
    return next((n for n in (2, 4, 8) if n * rows_per_multiprocessor >= 15), 16)


def _n_row_warps(logits):
    """Warps a program where each takes one row or a part of it: as many programs run as registers allow, about 32
    warps a multiprocessor, so that half of the above are enough."""
    return max(_n_warps(logits) // 2, 2)


def _n_programs(logits):
    """Programs of `loss_and_dlogits_kernel`: the rows in flight, or what fits the multiprocessors."""
    outer, inner, _ = logits.shape
    n_multiprocessors, _ = _device_figures(logits.device)
    return min(outer * inner, _rows_in_flight(logits), n_multiprocessors * 64 // _n_warps(logits))


def _n_splits(logits):
    """Programs that share a row, a power of two: more than one where there are fewer rows than multiprocessors."""
    outer, inner, V = logits.shape
    n_multiprocessors, _ = _device_figures(logits.device)
    if outer * inner >= n_multiprocessors:
        return 1
    most = min(2 * n_multiprocessors // (outer * inner), V // (WARP * _n_row_warps(logits) * LOGITS_PER_THREAD))
    return 2 ** (max(most, 1).bit_length() - 1)


def _strides(rows):
    """Strides of the two row dimensions; 0 where there is a single row, whose stride says nothing about alignment."""
    return [stride if size > 1 else 0 for stride, size in zip(rows.stride()[:2], rows.shape[:2], strict=True)]


def _blocks(*tensors, warps=_n_row_warps):
    """Constexprs and compiler options: how to read and write the rows of [outer, inner, V] tensors used side by side.

    16 bytes at a time. Triton does so by itself where it can prove that rows are aligned: pointer and strides are
    multiples of 16. Other rows are peeled, if all tensors are off the 16-byte boundaries by the same bytes. What is
    left goes one by one, in smaller blocks, since every address then takes registers of its own. warps(tensor): how
    many share a block.
    """
    V, item = tensors[0].shape[2], tensors[0].element_size()
    starts = [(tensor.data_ptr(), *_strides(tensor)) for tensor in tensors]
    offsets = {(ptr % 16, outer * item % 16, inner * item % 16) for ptr, outer, inner in starts}
    provable = all(number % 16 == 0 for start in starts for number in start)
    n_warps = warps(tensors[0])
    peelable = not provable and len(offsets) == 1
    while peelable and n_warps > 2 and V <= WARP * n_warps * LOGITS_PER_THREAD:  # where the cache is small
        n_warps //= 2
    block = WARP * n_warps * LOGITS_PER_THREAD
    wide = provable or peelable and V > block
    return {
        "PEEL": wide and not provable,
        "VECTOR": 16 // item if wide else 1,
        "BLOCK_V": block if wide else block // 4,
        "THREADS": WARP * n_warps,
        **_launch_options(n_warps, tensors[0].device),
    }


def _flags(form):
    return {"SOFTCAP": form.softcap is not None, "SMOOTHING": form.label_smoothing != 0.0}


def _entropy(form):
    """For the kernels that can have it. Without it they are launched, and compiled, as if there were no such flag."""
    return {"ENTROPY": True} if form.entropy else {}


def _param(param, form):
    """The rule's parameter as kernels take it: by value, or in memory."""
    return form.param_number if param is None else param


_plans = {}


def _planned(plan, *tensors):
    """plan(*tensors), worked out once for tensors that lie in memory alike: it takes 10 us."""
    device = tensors[0].device
    key = (
        plan, device, tensors[0].dtype, _device_figures(device), CACHE_SHARE, WARP,
        *[(tensor.shape, tensor.stride(), tensor.data_ptr() % 16) for tensor in tensors],
    )  # fmt: skip
    if key not in _plans:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan(*tensors)
    return _plans[key]


def _plan_of_row_loss(logits):
    """Splits of a row, strides and options of `row_loss_kernel` and `split_sums_kernel`."""
    return _n_splits(logits), _strides(logits), _blocks(logits)


def _plan_of_dlogits(logits, out):
    """Splits of a row, strides and options of `dlogits_kernel`."""
    return _n_splits(logits), _strides(out) + _strides(logits), _blocks(logits, out)


def _plan_of_loss_and_dlogits(logits, out):
    """Programs, strides and options of `loss_and_dlogits_kernel`; None where rows so few are better split."""
    outer, inner, V = logits.shape
    if outer * inner and _n_splits(logits) > 1 and outer * inner <= _rows_in_cache(logits):
        return None
    options = _blocks(logits, out, warps=_n_warps)
    options["ONE_BLOCK"] = V <= options["BLOCK_V"]
    return _n_programs(logits), _strides(out) + _strides(logits), options


def row_loss(logits, target, row_scale, param, form):
    """logits [outer, inner, V], target and row_scale [N] -> loss [N] and rows [F, N], both float32.

    param []: the rule's parameter, or None where the form has it as a number.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    n_splits, strides, options = _planned(_plan_of_row_loss, logits) if N else (1, None, None)
    if n_splits > 1:
        sums = _split_sums(logits, target, form, n_splits, strides, options)
        return row_loss_of_sums(sums, target, row_scale, param, form, V)
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    rows = torch.empty(stats.n_fields(form.entropy), N, dtype=torch.float32, device=logits.device)
    if N:
        with _device(logits):
            kernels.row_loss_kernel[(N,)](
                logits, target, row_scale, _param(param, form), loss, rows, *strides, inner, N, V,
                form.ignore_index, form.alpha, form.z_loss, form.label_smoothing, form.softcap or 1.0,
                form.logit_scale, RULE=form.rule, **options, **_flags(form), **_entropy(form),
            )  # fmt: skip
    return loss, rows


def _n_sums(form):
    return stats.n_sums(form.label_smoothing != 0, form.entropy)


def _split_sums(logits, target, form, n_splits, strides, options):
    """sums [n_splits, F, N] of rows that so many programs share."""
    outer, inner, V = logits.shape
    N = outer * inner
    sums = torch.empty(n_splits, _n_sums(form), N, dtype=torch.float32, device=logits.device)
    with _device(logits):
        kernels.split_sums_kernel[(N, n_splits)](
            logits, target, sums, *strides, inner, N, V,
            form.ignore_index, form.softcap or 1.0, form.logit_scale, **options, **_flags(form), **_entropy(form),
        )  # fmt: skip
    return sums


def shard_sums(logits, target, form):
    """sums [F, N], float32, of logits [outer, inner, V] that are a part of the classes, V = 0 among them.

    target [N]: a column here, or out of range where the target lies elsewhere. One split a row, whatever the shape:
    what is put together in `row_loss_of_sums` has as many from everyone.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    if N and V:
        _, strides, options = _planned(_plan_of_row_loss, logits)
        return _split_sums(logits, target, form, 1, strides, options)[0]
    sums = torch.zeros(_n_sums(form), N, dtype=torch.float32, device=logits.device)
    sums[stats.SHARD_MAX] = torch.finfo(torch.float32).min
    sums[stats.SHARD_TARGET] = math.nan
    return sums


def row_loss_of_sums(sums, target, row_scale, param, form, n_classes):
    """`row_loss` from the sums [p, F, N] of all p parts of the classes; target [N] says which rows are ignored.

    n_classes: of all parts together, a number or a tensor [].
    """
    n_splits, _, N = sums.shape
    loss = torch.empty(N, dtype=torch.float32, device=sums.device)
    rows = torch.empty(stats.n_fields(form.entropy), N, dtype=torch.float32, device=sums.device)
    if N:
        block = triton.next_power_of_2(n_splits)
        n_warps = min(max(block // WARP, 2), 16)  # a split a thread
        with _device(sums):
            kernels.row_loss_of_sums_kernel[(N,)](
                sums, target, row_scale, _param(param, form), loss, rows, N, n_splits, n_classes,
                form.ignore_index, form.alpha, form.z_loss, form.label_smoothing, form.softcap or 1.0,
                form.logit_scale, RULE=form.rule, BLOCK_SPLITS=block, **_flags(form), **_entropy(form),
                **_launch_options(n_warps, sums.device),
            )  # fmt: skip
    return loss, rows


def dlogits(logits, target, row_grad, rows, form, out, n_classes=None):
    """Write the gradient for row_grad [N] = upstream gradient * row_scale to out, which may be the logits.

    n_classes: of the whole row, a number or a tensor [], where the logits are a part of it, V = 0 among them.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    if N and V:
        n_splits, strides, options = _planned(_plan_of_dlogits, logits, out)
        with _device(logits):
            kernels.dlogits_kernel[(N, n_splits)](
                out, logits, target, row_grad, rows, *strides, inner, N, V, V if n_classes is None else n_classes,
                form.z_loss, form.label_smoothing, form.softcap or 1.0, form.logit_scale, **options, **_flags(form),
            )  # fmt: skip


def loss_and_dlogits(logits, target, row_scale, param, form, out, fill=True):
    """`row_loss`, and `dlogits` for an upstream gradient of 1, in one launch if there are rows enough for that.

    Without `fill` the dropped rows of `out` may stay as they were; with it they become zeros.
    """
    outer, inner, V = logits.shape
    N = outer * inner
    plan = _planned(_plan_of_loss_and_dlogits, logits, out)
    if plan is None:
        loss, rows = row_loss(logits, target, row_scale, param, form)
        dlogits(logits, target, row_scale, rows, form, out)
        return loss, rows
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    rows = torch.empty(stats.n_fields(form.entropy), N, dtype=torch.float32, device=logits.device)
    if N:
        n_programs, strides, options = plan
        with _device(logits):
            kernels.loss_and_dlogits_kernel[(n_programs,)](
                out, logits, target, row_scale, _param(param, form), loss, rows, *strides, inner, N, V,
                form.ignore_index, int(fill), form.alpha, form.z_loss, form.label_smoothing, form.softcap or 1.0,
                form.logit_scale, RULE=form.rule, **options, **_flags(form), **_entropy(form),
            )  # fmt: skip
    return loss, rows


def loss_and_kept_dlogits(logits, target, row_scale, param, form, count=None):
    """`loss_and_dlogits` over the logits [1, n, V] of a buffer of rows, no row of which is ignored, packed.

    Returns loss [n], rows [F, n], kept [K]: row i < K of the logits now holds the gradient of row kept[i]; and, as
    numbers, what count(dlogits, target, row_scale, rows) has found out about the kept rows, if it is given: the
    gradients are not packed yet when it looks, and the others hold anything.
    """
    loss, rows = loss_and_dlogits(logits, target, row_scale, param, form, logits, fill=False)
    is_kept = rows[stats.COEF] != 0
    # In either case here the host waits, to learn K.
    if count is None:
        K, counted = len(is_kept.nonzero()), []
    else:
        K, *counted = torch.cat([is_kept.sum()[None], count(logits[0], target, row_scale, rows)]).tolist()
    return loss, rows, pack(logits[0], is_kept, K), counted


def pack(x, is_kept, K):
    """Move the K rows of x [n, V] that are kept, bool [n], into the first K: returns which row each of those was.

    V may be 0. The rows behind hold anything.
    """
    order = torch.arange(K, device=x.device)
    if K in (0, len(x)):
        return order
    # The first K rows have as many gaps as there are kept rows behind them: gap h takes the h-th from the end.
    n_kept = is_kept.cumsum(0)
    gap = order + 1 - n_kept[:K]
    source = torch.where(is_kept[:K], order, torch.searchsorted(n_kept, K + 1 - gap))
    if x.shape[1]:
        with _device(x):
            kernels.move_rows_kernel[(K,)](
                x, source, x.stride(0), BLOCK_V=COPY_V, **_launch_options(COPY_WARPS, x.device)
            )
    return source


def class_sums(dlogits, groups):
    """Sums of dlogits [n, V] over each group of its rows, bool [2, n], to [2, V] in float32."""
    n, V = dlogits.shape
    n_parts = -(-n // SUMMED_ROWS)
    sums = torch.empty(n_parts, 2, V, dtype=torch.float32, device=dlogits.device)
    signs = groups[0].to(torch.int8) - groups[1].to(torch.int8)
    if n:
        with _device(dlogits):
            kernels.class_sums_kernel[(-(-V // SUMMED_V), n_parts)](
                dlogits, signs, sums, dlogits.stride(0), n, V,
                N_ROWS=SUMMED_ROWS, BLOCK_V=SUMMED_V, **_launch_options(COPY_WARPS, dlogits.device),
            )  # fmt: skip
    return sums.sum(0)


def keep_classes(dlogits, classes):
    """Move some classes [n], in ascending order, to the front of each row of dlogits [K, V].

    Returns the sums [K] of the rows over the other classes, in float32.
    """
    K, V = dlogits.shape
    place = torch.full((dlogits.stride(0),), -2, dtype=torch.int32, device=dlogits.device)
    place[:V] = -1
    place[classes] = torch.arange(len(classes), dtype=torch.int32, device=dlogits.device)
    sums = torch.empty(K, dtype=torch.float32, device=dlogits.device)
    with _device(dlogits):
        kernels.keep_classes_kernel[(K,)](
            dlogits, place, sums, dlogits.stride(0), BLOCK_V=COPY_V, **_launch_options(2 * COPY_WARPS, dlogits.device)
        )
    return sums


def add_rows(total, rows, addend):
    """total[rows] += addend, for rows [n] that differ and addend [n, D] in the dtype of the total."""
    n, D = addend.shape
    with _device(total):
        kernels.add_rows_kernel[(n,)](
            total, rows, addend, total.stride(0), D, BLOCK_D=ADDED_D, **_launch_options(COPY_WARPS, total.device)
        )


def scale_(dlogits, factor):
    """dlogits [outer, inner, V] *= factor []; device memory is not touched if the factor is 1."""
    outer, inner, V = dlogits.shape
    if outer * inner:
        with _device(dlogits):
            kernels.scale_kernel[(outer * inner,)](
                dlogits, factor, *_strides(dlogits), inner, V,
                BLOCK_V=COPY_V, **_launch_options(COPY_WARPS, dlogits.device),
            )  # fmt: skip


def _device(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)
