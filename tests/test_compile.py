"""Every kernel variant through the real compiler, for GPUs that need not be there: see benchmarks/codegen."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks.codegen.devices import TARGETS  # noqa: E402 - after the skip

pytestmark = pytest.mark.xdist_group("compiler")  # with all that compiles, which happens once a process

NVIDIA = ["sm_80", "sm_90", "sm_100"]
# Shared memory that one block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WRITERS = ("dlogits_kernel", "loss_and_dlogits_kernel")
ON_SHARDS = ("split_sums_kernel", "row_loss_of_sums_kernel")


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles(variants, target):
    """Each dtype, flag, block and way of access that the launchers choose is among them."""
    reports = variants(target)
    for report in reports:
        assert report["shared"] <= SHARED_LIMIT[target], report
    flags = ("RULE", "SOFTCAP", "SMOOTHING")
    seen = {(r["kernel"], r["dtype"], r["layout"], *map(r["constants"].get, flags)) for r in reports}
    for kernel, dtype, rules in [
        ("loss_and_dlogits_kernel", "float32", ("truncated", "focal")),
        ("loss_and_dlogits_kernel", "bfloat16", ("truncated", "focal")),
        ("row_loss_kernel", "float16", ("truncated", "focal")),
        ("dlogits_kernel", "float16", (None,)),
        ("row_loss_of_sums_kernel", "bfloat16", ("truncated", "focal")),
        ("split_sums_kernel", "bfloat16", (None,)),
    ]:
        for rule in rules:
            for layout in ("aligned", "peeled", "unaligned", "one unaligned block"):
                if kernel in ON_SHARDS and layout not in ("aligned", "peeled"):
                    continue
                if (kernel, layout) == ("row_loss_kernel", "unaligned"):
                    continue  # reading alone can always be peeled
                for softcap in (False, True):
                    for smoothing in (False, True) if rule != "focal" else (False,):
                        assert (kernel, dtype, layout, rule, softcap, smoothing) in seen
    ours = [r["constants"] for r in reports if r["kernel"] == "loss_and_dlogits_kernel"]
    assert {(c["PEEL"], c["ONE_BLOCK"], c["VECTOR"] > 1) for c in ours} == {
        (False, True, True), (False, True, False), (False, False, True), (True, False, True), (False, False, False)
    }  # fmt: skip
    assert {c["THREADS"] // 32 for c in ours} >= {2, 4, 8}  # warps a row


@pytest.mark.parametrize("target", NVIDIA)
def test_no_variant_spills_or_uses_the_stack(variants, target):
    spilling = [report for report in variants(target) if report["stack"] or report["spills"]]
    assert not spilling


def vectors(accesses):
    """Accesses of 16 bytes, of a count by type in PTX or by instruction of AMD's."""
    return sum(accesses.get(kind, 0) for kind in ("v4.b32", "v2.b64", "dwordx4"))


def narrow(accesses):
    """Accesses of one or two 16-bit numbers."""
    return accesses.get("b16", 0) + accesses.get("v2.b16", 0)


@pytest.mark.parametrize("target", NVIDIA)
def test_aligned_16_bit_rows_move_16_bytes_at_a_time(variants, target):
    checked = 0
    for report in variants(target):
        if report["dtype"] == "float32" or report["layout"] not in ("aligned", "one aligned block"):
            continue
        if report["kernel"] == "row_loss_of_sums_kernel":
            continue  # no logits
        assert vectors(report["loads"]) > 0, report
        assert narrow(report["loads"]) <= 1, report  # the target's logit
        assert narrow(report["stores"]) <= 1, report
        assert vectors(report["stores"]) > 0 or report["kernel"] not in WRITERS, report
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("target", NVIDIA)
def test_chunks_of_the_linear_path_move_16_bytes_at_a_time(variants, target):
    """The vocabulary may be odd: the buffer's rows are padded."""
    checked = 0
    for report in variants(target):
        if not report["layout"].startswith("chunk of") or report["kernel"] == "scale_kernel":
            continue
        assert vectors(report["loads"]) > 0 and vectors(report["stores"]) > 0, report
        if report["kernel"] == "move_rows_kernel":
            assert narrow(report["loads"]) == narrow(report["stores"]) == 0, report
        else:
            assert not report["constants"]["PEEL"], report
        checked += 1
    assert checked == 12


@pytest.mark.parametrize("target", TARGETS)
def test_the_body_of_unaligned_rows_moves_16_bytes_at_a_time(variants, target):
    checked = 0
    for report in variants(target):
        if report["layout"] != "peeled" or report["kernel"] in ("scale_kernel", "row_loss_of_sums_kernel"):
            continue
        assert vectors(report["loads"]) > 0, report
        assert vectors(report["stores"]) > 0 or report["kernel"] not in WRITERS, report
        checked += 1
    assert checked > 20
