"""The figures of benchmarks/results/codegen.csv against fresh ones, and the parts of `python -m benchmarks codegen`."""

import csv
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.runtime.cache import get_cache_manager  # noqa: E402 - after the skip

from benchmarks.codegen import devices, sass  # noqa: E402

pytestmark = pytest.mark.xdist_group("compiler")  # with all that compiles, which happens once a process

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks/results/codegen.csv"
IDENTITY = ["path", "phase", "kernel", "layout", "N", "V", "dtype", "flags"]
RESOURCES = ["registers", "spills", "stack", "shared", "loads", "stores"]


def committed():
    """Heading and our own launches by target and identity."""
    with COMMITTED.open() as file:
        lines = file.readlines()
    heading = [line for line in lines if line.startswith("#")]
    rows = csv.DictReader(lines[len(heading) :])
    ours = [row for row in rows if row["provider"] == "tce_kernels"]
    return heading[0], {(row["target"], *(row[name] for name in IDENTITY)): row for row in ours}


def text(value):
    """A figure as codegen writes it to the file."""
    if isinstance(value, dict):
        return " ".join(f"{name}={x}" for name, x in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("target", devices.TARGETS)
def test_the_committed_resources_are_those_of_the_kernels(variants, target):
    heading, rows = committed()
    version = re.search(r"triton ([^,]+)", heading)[1]
    if version != triton.__version__:
        pytest.skip(f"the committed figures are of triton {version}, this is triton {triton.__version__}")
    rows = {identity: row for identity, row in rows.items() if identity[0] == target}
    changes = []
    for launch in variants(target):
        identity = (target, *(text(launch[name]) for name in IDENTITY))
        row = rows.pop(identity, None)
        if row is None:
            changes.append(f"{identity}: not among the committed")
            continue
        for name in RESOURCES:
            if row[name] != text(launch[name]):
                changes.append(f"{identity}: {name} was {row[name]}, is {text(launch[name])}")
    changes += [f"{identity}: committed, but no longer launched" for identity in rows]
    message = "run `python -m benchmarks codegen` and commit benchmarks/results if this is meant:\n"
    assert not changes, message + "\n".join(changes)


ON_A_SLOW_PROCESSOR = """if True:
    import sys
    import torch
    from benchmarks.codegen import compiled
    from tce_kernels import head

    every = compiled.cases
    compiled.cases = lambda *options: [case for case in every(*options) if case.path == compiled.LINEAR]
    with torch.backends.mkldnn.flags(enabled=False):
        assert head.supported(torch.float16, torch.device("cpu")) == torch.float32
        sys.argv = ["compiled", *compiled.ARGUMENTS["sm_90"]]
        compiled.main()
"""


def test_the_launches_do_not_depend_on_the_processor(variants):
    """One that multiplies 16-bit matrices element by element would be given float32 logits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_SLOW_PROCESSOR], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [launch for line in done.stdout.splitlines() for launch in json.loads(line)]
    assert {launch["dtype"] for launch in found} == {"bfloat16", "float16", "float32"}
    expected = [launch for launch in variants("sm_90") if launch["path"] == "linear, one chunk"]
    assert found == [{name: x for name, x in launch.items() if name != "target"} for launch in expected]


@pytest.mark.parametrize(
    "target, warps, registers, shared, blocks",
    [  # by the occupancy calculator of NVIDIA's Nsight Compute
        ("sm_80", 4, 32, 0, 16),  # 64 warps
        ("sm_80", 1, 16, 0, 32),  # 32 blocks
        ("sm_90", 32, 64, 128, 1),  # 65536 registers
        ("sm_90", 16, 64, 64, 2),
        ("sm_90", 16, 65, 64, 1),  # registers come in eights
        ("sm_90", 16, 95, 64, 1),
        ("sm_90", 8, 80, 64, 3),
        ("sm_90", 3, 168, 0, 4),  # 12 warps, 3 in each part
        ("sm_90", 4, 32, 227 * 1024, 1),
        ("sm_90", 4, 32, 56 * 1024, 4),
        ("sm_80", 4, 32, 56 * 1024, 2),  # a kilobyte of each block is the system's
        ("gfx942", 8, 64, 0, 4),
        ("gfx942", 8, 65, 0, 3),
        ("gfx942", 8, 64, 40 * 1024, 1),
    ],
)
def test_occupancy(target, warps, registers, shared, blocks):
    assert devices.blocks_per_multiprocessor(target, warps, registers, shared) == blocks


def test_floor_is_the_longest_of_three():
    device = devices.Device("one", "sm_90", 100, 1.0, 1.0, 40, "")
    memory, issue, special = devices.floor(device, bytes_=4, instructions=12.8, special_functions=3.2)
    assert (memory, issue, special) == pytest.approx((4.0, 1.0, 2.0))  # us: 1e12 B/s, 12.8e12 and 1.6e12 a second
    assert devices.floor(device, 4, 12.8, 3.2).bound == "memory"
    assert devices.stay_in_cache(device, 30, 2**20) and not devices.stay_in_cache(device, 31, 2**20)


LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/               @P2 BRA `(.L_x_4) ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
.L_x_4:
        /*0090*/              @!P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5) ;
"""


def test_the_work_of_a_row():
    """32 threads of 8 logits: 600 logits are two full blocks and a masked one; the gradient is masked throughout."""
    found = sass.row_work(LISTING, V=600, threads=32, item_bytes=2)
    assert [(loop.role, loop.masked, loop.logits) for loop in found.loops] == [
        ("sweep", False, 256), ("sweep", True, 256), ("gradient", True, 256)
    ]  # fmt: skip
    assert found.kept.instructions == 1 + 2 * 3 + 1 * 2 + 3 * 5 + 1
    assert found.dropped.instructions == 1 + 2 * 3 + 1 * 2 + 3 * 3 + 1
    assert (found.kept.special_functions, found.dropped.special_functions) == (5, 2)
    assert not found.persistent


def test_a_loop_that_is_not_understood_is_an_error():
    unread = LISTING.replace("LDG.E.128", "LDS.128").replace("STG.E.128", "STS.128")
    with pytest.raises(ValueError, match="moves no logits"):
        sass.row_work(unread, V=600, threads=32, item_bytes=2)
    with pytest.raises(ValueError, match="in none of the loops"):
        sass.row_work(LISTING.replace("@!P1 LDG", "LDG"), V=600, threads=32, item_bytes=2)


@pytest.mark.parametrize("kernel", ["row_loss_kernel", "dlogits_kernel", "loss_and_dlogits_kernel"])
def test_the_disassembly_is_read_as_by_hand(variants, kernel):
    """Counts of the whole kernel and of its loops over full blocks, against a search through what cuobjdump prints."""
    launch = next(launch for launch in variants("sm_90") if launch["core"] and launch["kernel"] == kernel)
    cubin = get_cache_manager(launch["hash"]).get_file(f"{kernel}.cubin")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    printed = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = {int(at, 16): words for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.+?) *;", printed)}

    def count(start, end):
        lines = [words for at, words in code.items() if start <= at <= end]
        vectors = sum("LDG" in words and ".128" in words for words in lines)
        return len(lines), sum("MUFU" in words for words in lines), sum("BAR.SYNC" in words for words in lines), vectors

    blocks = sass.blocks_of(sass.disassemble(cubin))
    whole = functools.reduce(sass.Work.plus, (block.work for block in blocks))
    *by_hand, vectors = count(0, max(code))
    assert [whole.instructions, whole.special_functions, whole.barriers] == by_hand
    assert vectors == launch["loads"]["v4.b32"] and whole.loaded_bytes >= 16 * vectors

    jumps = [(int(to, 16), at) for at, words in code.items() for to in re.findall(r"BRA 0x([0-9a-f]+)", words)]
    loops = [count(to, at) for to, at in jumps if to < at]
    work = sass.row_work(sass.disassemble(cubin), launch["V"], 32 * launch["warps"], 2)
    full = [loop.work for loop in work.loops if not loop.masked]
    assert full
    for loop in full:
        assert (loop.instructions, loop.special_functions, loop.barriers, loop.loaded_bytes // 16) in loops
