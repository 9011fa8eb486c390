"""The lm-head: its matmuls, in which dtype they are, and how many rows go through them at a time."""

import functools

import torch
from torch import Tensor

from .checks import is_autocast

GPU_CHUNK_ROWS, GPU_CHUNK_BYTES = 4096, 2**30
GPU_TILE_ROWS = 1024  # of which chunks are multiples: whole waves of the tiles that a GPU's matmuls are cut into
CPU_CHUNK_ROWS, CPU_TILE_ROWS = 1024, 64


def auto_chunk_size(N: int, V: int, itemsize: int, on_cpu: bool, over_ranks: bool = False) -> int:
    """Rows per chunk of N rows, for logits of `itemsize` bytes; no chunk is a sliver."""
    if on_cpu:
        most, tile = CPU_CHUNK_ROWS, CPU_TILE_ROWS
    else:
        tile = GPU_TILE_ROWS
        most = max(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // (V * itemsize) // tile * tile)
        if over_ranks:  # four, if they are not too small: what one sends has the work on the next to hide behind
            most = min(most, max(-(-N // (4 * tile)), 1) * tile)
    n_chunks = max(-(-N // most), 1)
    return max(-(-N // (n_chunks * tile)), 1) * tile


def matmul_dtype(input: Tensor) -> torch.dtype:
    """The dtype that F.linear would multiply in: autocast's, or the input's."""
    device = input.device.type
    if is_autocast(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def supported(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 on a processor on which PyTorch multiplies 16-bit matrices element by element."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return dtype
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return torch.float32
    mkldnn = torch.ops.mkldnn
    fast = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if fast() else torch.float32


@functools.cache
def adds_inside(dtype: torch.dtype, total_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matmul in `dtype` can add to a total of another dtype, tried out once, the result included."""
    if device.type != "cuda":
        return False
    matrix = torch.full((16, 16), 0.5, dtype=dtype, device=device)
    total = torch.full((16, 16), torch.nan, dtype=total_dtype, device=device)
    try:
        for beta in (0, 1):
            torch.addmm(total, matrix.t(), matrix, beta=beta, out_dtype=total_dtype, out=total)
    except (RuntimeError, TypeError):  # this device, or this version of torch, has no such matmul
        return False
    return bool((total == 8).all())


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total [V, D] = beta * total + a [V, K] b [K, D], in the dtype of the total wherever that can be."""
    if total.dtype == b.dtype:
        total.addmm_(a, b, beta=beta)
    elif adds_inside(b.dtype, total.dtype, b.device):
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:  # products rounded to the 16 bits of the matmul, of a few classes at a time
        for some, some_a in zip(total.split(4096), a.split(4096), strict=True):
            product = torch.mm(some_a, b)
            some.copy_(product) if beta == 0 else some.add_(product)


class Head:
    """The linear map from input [N, D] to logits [N, V], in the dtype of the matmuls."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.dtype = supported(dtype, input.device)
        self.input = input.reshape(-1, input.shape[-1])
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def inputs(self, rows: Tensor) -> Tensor:
        return self.input[rows].to(self.dtype)

    def write_logits(self, rows: Tensor, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(self.inputs(rows), self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, self.inputs(rows), self.weight.t(), out=out)
