"""Compile, for a GPU that is not there, every kernel that the losses launch.

    python -m benchmarks.codegen.compiled cuda 90 [--core] [--liger]

A stand-in takes the place of the driver: Triton specialises and compiles as for a launch, and the launch is left out.
A process can stand for one target only. Prints one line per case: the JSON list of its launches, each with its grid,
constants, compile options and what the compiled kernel needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

import tce_kernels
from tce_kernels import head, kernels, stats, triton_ops
from tce_kernels.options import Form

from .cases import EVALUATION, LINEAR, RETAINED, SHARD, Case, cases
from .devices import DEVICES, LIMITS
from .resources import resources, row_work

ARGUMENTS = {
    "sm_80": ("cuda", "80"),
    "sm_90": ("cuda", "90"),
    "sm_100": ("cuda", "100"),
    "gfx942": ("hip", "gfx942"),
}
RANKS = 3
FEATURES = 16  # of the linear path's hidden states: no kernel sees them


def compile_for(
    target: str, options: list[str], processes: list[subprocess.Popen], on_case: Callable[[], object]
) -> list[dict]:
    """All launches for one target, from a process of its own, which joins `processes` for the caller to end."""
    command = [sys.executable, "-m", "benchmarks.codegen.compiled", *ARGUMENTS[target], *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    launches = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # Ctrl-C is the caller's business
        )
        processes.append(process)
        for line in process.stdout:
            launches += json.loads(line)
            on_case()
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"compiling for {target} failed:\n{errors.read()[-3000:]}")
    return [{"target": target} | launch for launch in launches]


class Driver:
    """Stands in for the driver of a GPU of the given target."""

    def __init__(self, target: GPUTarget):
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
    phase = "forward"

    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            asked = {
                "phase": self.phase,
                "kernel": self.kernel.__name__,
                "grid": list(grid),
                "constants": {name: value for name, value in kwargs.items() if name.isupper()},
                "options": {name: value for name, value in kwargs.items() if name not in self.kernel.arg_names},
            }
            self.launches.append((compiled, asked))

        return launch


def stand_in(target: GPUTarget, name: str, liger: bool) -> None:
    """Let the launchers of this process work for a target that is not there."""
    triton.runtime.driver.set_active(Driver(target))
    if target.backend == "hip":
        torch.version.hip = "6.0"  # as the user's torch says it there
    device = next(device for device in DEVICES if device.target == name)
    triton_ops.serves = lambda device: True
    # The dtype of the linear path's matmuls as on a GPU, whatever the processor here multiplies fast.
    head.supported = lambda dtype, device: dtype
    triton_ops._device_figures = lambda _: (device.multiprocessors, device.cache_mib * 2**20)
    triton_ops._warp_size = lambda _: target.warp_size
    modules = [kernels]
    if liger:
        import liger_kernel.ops.cross_entropy as liger_module

        generation = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}
        liger_module.infer_device_arch = lambda: generation[name]
        liger_module.is_hip = lambda: target.backend == "hip"
        modules.append(liger_module)
    for module in modules:
        for attribute, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction) and attribute.endswith("_kernel"):
                setattr(module, attribute, Compiled(kernel))


def launch(case: Case) -> None:
    """Call a public function as a user would, on memory that nobody touches."""
    Compiled.phase = "forward"
    if case.path == LINEAR:
        return launch_linear(case)
    if case.path == SHARD:
        return launch_shard(case)
    logits = torch.empty(case.N, case.V + case.padding, dtype=case.dtype)[:, : case.V]
    target = torch.zeros(case.N, dtype=torch.int64)
    if case.path == EVALUATION:
        loss_of(case, logits, target)
        return
    logits.requires_grad_()
    loss = loss_of(case, logits, target)
    Compiled.phase = "backward"
    torch.autograd.grad(loss, logits)


def loss_of(case: Case, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if case.liger:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return LigerCrossEntropyLoss()(logits, target)
    options = {"allow_retain_graph": case.path == RETAINED, "backend": "triton"}
    if "entropy" in case.flags:
        options["return_stats"] = "entropy"
    if "softcap" in case.flags:
        options["softcap"] = 30.0
    if "focal" in case.flags:
        return tce_kernels.focal_cross_entropy(logits, target, **options)
    smoothing = 0.1 if "smoothing" in case.flags else 0.0
    returned = tce_kernels.truncated_cross_entropy(logits, target, label_smoothing=smoothing, **options)
    return returned[0] if "entropy" in case.flags else returned


def launch_linear(case: Case) -> None:
    """The chunk buffer of the linear path: padded to aligned rows, its kept rows packed."""
    make_rows = triton_ops.loss_and_dlogits

    def half_kept(logits, *args, **options):  # nothing is launched, so nothing would be kept
        loss, rows = make_rows(logits, *args, **options)
        rows[stats.COEF] = torch.arange(len(loss)) % 2
        return loss, rows

    triton_ops.loss_and_dlogits = half_kept
    input = torch.zeros(case.N, FEATURES, dtype=case.dtype, requires_grad=True)
    weight = torch.zeros(case.V, FEATURES, dtype=case.dtype)
    target = torch.zeros(case.N, dtype=torch.int64)
    loss = tce_kernels.linear_truncated_cross_entropy(input, weight, target, backend="triton")
    torch.autograd.grad(loss, input)
    triton_ops.loss_and_dlogits = make_rows


def launch_shard(case: Case) -> None:
    """What one of RANKS ranks launches, each of which has V classes; only the device knows how many that makes."""
    form = Form(
        rule="focal" if "focal" in case.flags else "truncated", param_number=1.0, alpha=1.0, ignore_index=-100,
        z_loss=0.0, label_smoothing=0.1 if "smoothing" in case.flags else 0.0,
        softcap=30.0 if "softcap" in case.flags else None, logit_scale=1.0, entropy="entropy" in case.flags,
    )  # fmt: skip
    logits = torch.empty(1, case.N, case.V, dtype=case.dtype)
    target, row_scale = torch.zeros(case.N, dtype=torch.int64), torch.ones(case.N)
    n_classes = torch.tensor(RANKS * case.V)
    sums = torch.stack(RANKS * [triton_ops.shard_sums(logits, target, form)])
    loss, rows = triton_ops.row_loss_of_sums(sums, target, row_scale, None, form, n_classes)
    Compiled.phase = "backward"
    triton_ops.dlogits(logits, target, row_scale, rows, form, torch.empty_like(logits), n_classes)


def report(case: Case, target: GPUTarget, known: dict) -> list[dict]:
    """One object per launch of the case; `known` keeps the resources of the kernels seen so far, by hash."""
    launches = []
    for compiled, asked in Compiled.launches:
        if compiled.hash not in known:
            known[compiled.hash] = resources(compiled, target.backend)
        described = {
            "path": case.path,
            "provider": case.provider,
            "N": case.N,
            "V": case.V,
            "layout": case.layout,
            "dtype": str(case.dtype).removeprefix("torch."),
            "flags": list(case.flags),
            "core": case.core,
            "warps": compiled.metadata.num_warps,
            "hash": compiled.hash,  # Triton's cache keeps the compiled kernel under it
        }
        launches.append(described | asked | known[compiled.hash])
        if case.core and target.backend == "cuda":
            launches[-1]["work"] = row_work(compiled, case, asked)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen.compiled", description=__doc__)
    parser.add_argument("backend", choices=["cuda", "hip"])
    parser.add_argument("arch")
    parser.add_argument("--core", action="store_true", help="only what users launch most")
    parser.add_argument("--liger", action="store_true", help="Liger-Kernel's cross-entropy too")
    args = parser.parse_args()
    arch = int(args.arch) if args.arch.isdigit() else args.arch
    name = f"sm_{arch}" if args.backend == "cuda" else arch
    target = GPUTarget(args.backend, arch, LIMITS[name].warp_size)
    stand_in(target, name, args.liger)
    known = {}
    for case in cases(args.core, args.liger):
        Compiled.launches.clear()
        launch(case)
        print(json.dumps(report(case, target, known)), flush=True)


if __name__ == "__main__":
    main()
