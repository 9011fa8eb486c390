"""What a compiled kernel needs of a GPU, and the work that it does per logit."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from . import sass
from .cases import Case


def resources(compiled, backend: str) -> dict:
    """What the compiled kernel needs, and how often it reads and writes global memory, by width."""
    if backend == "hip":
        return amd_resources(compiled)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    accesses = re.findall(r"\b(ld|st)\.global\S*?\.((?:v\d\.)?b\d+)", compiled.asm["ptx"])
    return {
        "registers": registers,
        "spills": max(stack, local) // 4,  # registers that spill live in the stack frame, which is local memory
        "stack": stack,
        "shared": compiled.metadata.shared,
        "loads": count(width for kind, width in accesses if kind == "ld"),
        "stores": count(width for kind, width in accesses if kind == "st"),
    }


def amd_resources(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    accesses = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly)
    return {
        "registers": field("vgpr_count"),
        "scalar_registers": field("sgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "stack": field("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,  # allocated at launch, so the assembly says 0
        "loads": count(width for kind, width in accesses if kind == "load"),
        "stores": count(width for kind, width in accesses if kind == "store"),
    }


def count(words) -> dict[str, int]:
    found = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items()))


def row_work(compiled, case: Case, asked: dict) -> dict:
    """Thread-instructions and special-function operations per logit, of whole rows and of the loops over full blocks.

    Liger-Kernel drops no rows: all cost what a kept one does.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = sass.disassemble(cubin)
    threads = compiled.metadata.num_warps * 32
    work = sass.row_work(listing, case.V, threads, case.dtype.itemsize)
    if not work.persistent and asked["grid"][0] != case.N:
        raise ValueError(f"neither a program per row nor a loop over rows: {asked}")
    scale = threads / case.V
    found = {}
    for name, row in [("kept", work.kept), ("dropped", work.kept if case.liger else work.dropped)]:
        found[f"instructions_{name}"] = row and row.instructions * scale
        found[f"special_functions_{name}"] = row and row.special_functions * scale
    for role in ("sweep", "gradient"):
        full = next((loop for loop in work.loops if loop.role == role), None)
        found[f"{role}_loop_instructions"] = full and full.work.instructions * threads / full.logits
        found[f"{role}_loop_special_functions"] = full and full.work.special_functions * threads / full.logits
        found[f"{role}_loop_barriers"] = full and full.work.barriers
    return found
