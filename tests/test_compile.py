"""Every kernel variant through the real compiler, for GPUs that need not be there (see compile_variants.py)."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).with_name("compile_variants.py")
TARGETS = {
    "sm_80": ("cuda", "80", "32"),
    "sm_90": ("cuda", "90", "32"),
    "sm_100": ("cuda", "100", "32"),
    "gfx942": ("hip", "gfx942", "64"),
}
NVIDIA = ["sm_80", "sm_90", "sm_100"]
# Shared memory that one block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WRITERS = ("dlogits_kernel", "loss_and_dlogits_kernel")


def compile_for(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    done = subprocess.run([sys.executable, SCRIPT, *TARGETS[target]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def variants():
    """Reports by target; all targets compile side by side from the first test that asks for one."""
    pool = ThreadPoolExecutor(os.cpu_count())
    futures = {target: pool.submit(compile_for, target) for target in TARGETS}
    yield lambda target: futures[target].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles(variants, target):
    """Each dtype, flag, block and way of access that the launchers choose is among them."""
    reports = variants(target)
    for report in reports:
        assert report["shared"] <= SHARED_LIMIT[target], report
    seen = {
        (r["kernel"], r["dtype"], r["layout"], r.get("RULE"), r.get("SOFTCAP"), r.get("SMOOTHING")) for r in reports
    }
    for kernel, dtype, rules in [
        ("loss_and_dlogits_kernel", "torch.float32", ("truncated", "focal")),
        ("loss_and_dlogits_kernel", "torch.bfloat16", ("truncated", "focal")),
        ("row_loss_kernel", "torch.float16", ("truncated", "focal")),
        ("dlogits_kernel", "torch.float16", (None,)),
    ]:
        for rule in rules:
            for layout in ("aligned", "peeled", "unaligned", "one unaligned block"):
                if (kernel, layout) == ("row_loss_kernel", "unaligned"):
                    continue  # reading alone can always be peeled
                for softcap in (False, True):
                    for smoothing in (False, True) if rule != "focal" else (False,):
                        assert (kernel, dtype, layout, rule, softcap, smoothing) in seen
    assert {(r["PEEL"], r["ONE_BLOCK"], r["BLOCK_V"]) for r in reports if r["kernel"] == "loss_and_dlogits_kernel"} == {
        (False, True, 8192), (False, False, 8192), (True, False, 8192), (False, False, 2048)
    }  # fmt: skip


@pytest.mark.parametrize("target", NVIDIA)
def test_no_variant_spills_or_uses_the_stack(variants, target):
    spilling = [report for report in variants(target) if report["stack"] or report["local"]]
    assert not spilling


@pytest.mark.parametrize("target", NVIDIA)
def test_aligned_16_bit_rows_move_16_bytes_at_a_time(variants, target):
    checked = 0
    for report in variants(target):
        if report["dtype"] == "torch.float32" or report["layout"] not in ("aligned", "one aligned block"):
            continue
        assert report["loads_128"] > 0, report
        assert report["loads_narrow"] <= 1, report  # the target's logit
        assert report["stores_narrow"] == 0, report
        assert report["stores_128"] > 0 or report["kernel"] not in WRITERS, report
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("target", NVIDIA)
def test_chunks_of_the_linear_path_move_16_bytes_at_a_time(variants, target):
    """The vocabulary may be odd: the buffer's rows are padded."""
    checked = 0
    for report in variants(target):
        if not report["layout"].startswith("chunk of") or report["kernel"] == "scale_kernel":
            continue
        assert report["loads_128"] > 0 and report["stores_128"] > 0, report
        if report["kernel"] == "move_rows_kernel":
            assert report["loads_narrow"] == report["stores_narrow"] == 0, report
        else:
            assert not report["PEEL"], report
        checked += 1
    assert checked == 12


@pytest.mark.parametrize("target", NVIDIA)
def test_the_body_of_unaligned_16_bit_rows_moves_16_bytes_at_a_time(variants, target):
    checked = 0
    for report in variants(target):
        if report["dtype"] == "torch.float32" or report["layout"] != "peeled" or report["kernel"] == "scale_kernel":
            continue
        assert report["loads_128"] > 0, report
        assert report["stores_128"] > 0 or report["kernel"] not in WRITERS, report
        checked += 1
    assert checked > 15
