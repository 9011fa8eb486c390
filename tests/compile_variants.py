"""Run by test_compile.py: compile, for a GPU that is not there, every kernel that the public functions ask for.

Triton specialises and compiles as for a launch; the launch itself is left out. Prints one JSON object a launch.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

import tce_kernels
from tce_kernels import kernels, stats

KERNELS = ("row_loss_kernel", "dlogits_kernel", "loss_and_dlogits_kernel", "move_rows_kernel", "scale_kernel")

FLAGS = [
    (tce_kernels.truncated_cross_entropy, {"softcap": softcap, "label_smoothing": smoothing})
    for softcap, smoothing in itertools.product([None, 30.0], [0.0, 0.1])
] + [(tce_kernels.focal_cross_entropy, {"softcap": softcap}) for softcap in (None, 30.0)]


def rows(name, V, padding, dtype):
    return name, torch.zeros(2, V + padding, dtype=dtype)[:, :V]


def layouts(dtype):
    """One row length for each way in which blocks and alignment can come out."""
    return [
        rows("one aligned block", 4096, 0, dtype),
        rows("one unaligned block", 33, 0, dtype),
        rows("aligned", 32000, 0, dtype),
        rows("peeled", 50257, 0, dtype),
        rows("padded to aligned rows", 50257, 47, dtype),  # vectors in, but not out
        rows("unaligned", 50257, 2, dtype),  # gradient and logits disagree
    ]


class Driver:
    """Stands in for the driver of a GPU of the given target."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiled:
    """A kernel that is compiled, not launched; `launches` keeps what was asked for."""

    launches = []

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            constants = {name: value for name, value in kwargs.items() if name.isupper()}
            self.launches.append((compiled, dict(kernel=self.kernel.__name__, **constants)))

        return launch


def compile_all(target):
    triton.runtime.driver.set_active(Driver(target))
    if target.backend == "hip":
        torch.version.hip = "6.0"  # as the user's torch says it there: warps have 64 threads
    for name in KERNELS:
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    kernels.serves = lambda device: True
    known = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for (layout, logits), (loss, flags) in itertools.product(layouts(dtype), FLAGS):
            Compiled.launches.clear()
            for allow_retain_graph in (False, True):
                leaf = logits.detach().requires_grad_()
                targets = torch.zeros(2, dtype=torch.int64)
                loss(leaf, targets, allow_retain_graph=allow_retain_graph, backend="triton", **flags).backward()
            report(layout, dtype, known, target)
    compile_linear(known, target)


def compile_linear(known, target):
    """The chunk buffer of the linear path: padded to aligned rows, its kept rows packed."""
    make_rows = kernels.loss_and_dlogits

    def half_kept(logits, *args, **options):  # nothing is launched, so nothing would be kept
        loss, rows = make_rows(logits, *args, **options)
        rows[stats.COEF] = torch.arange(len(loss)) % 2
        return loss, rows

    kernels.loss_and_dlogits = half_kept
    for dtype, V in itertools.product((torch.float32, torch.bfloat16, torch.float16), (32000, 50257)):
        Compiled.launches.clear()
        input, weight = torch.zeros(4, 16, dtype=dtype, requires_grad=True), torch.zeros(V, 16, dtype=dtype)
        target_rows = torch.zeros(4, dtype=torch.int64)
        tce_kernels.linear_truncated_cross_entropy(input, weight, target_rows, backend="triton").backward()
        report(f"chunk of {V}", dtype, known, target)
    kernels.loss_and_dlogits = make_rows


def report(layout, dtype, known, target):
    for compiled, launch in Compiled.launches:
        if compiled.hash not in known:
            known[compiled.hash] = resources(compiled, target)
        print(json.dumps(launch | dict(dtype=str(dtype), layout=layout) | known[compiled.hash]), flush=True)


def resources(compiled, target):
    found = {"shared": compiled.metadata.shared}
    if target.backend == "hip":
        return found
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    # A register that spills lives in the stack frame, which is local memory.
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    found |= {"registers": registers, "stack": stack, "local": local}
    for name, instruction in [("load", "ld"), ("store", "st")]:
        accesses = re.findall(rf"\b{instruction}\.global\S*?\.((?:v\d\.)?b\d+)", ptx)
        found[f"{name}s_128"] = sum(access in ("v4.b32", "v2.b64") for access in accesses)
        found[f"{name}s_narrow"] = sum(access in ("b16", "v2.b16") for access in accesses)
    return found


if __name__ == "__main__":
    backend, arch, warp_size = sys.argv[1:]
    compile_all(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size)))
