"""Losses whose classes are split over ranks, against one process: `pytest` starts four processes that talk by gloo.

On several GPUs: torchrun --standalone --nproc-per-node 4 -m pytest tests/test_distributed.py
"""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.distributed.calls import LOGITS, REPLICATED, SHARDED, Call, assert_same, in_one_process, layouts, on_a_rank
from tests.distributed.drawing import OPTIONS, drawn
from tests.distributed.ranks import processes

pytestmark = [
    pytest.mark.xdist_group("distributed"),  # in one worker, which starts the processes
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"),
]
WAYS = LOGITS, REPLICATED, SHARDED


@pytest.fixture(scope="module")
def ranks():
    processes_here = processes()
    yield processes_here
    processes_here.stop()


def compare(ranks, p, call):
    assert_same(call, in_one_process(call, ranks.device), ranks.run(on_a_rank, p, call))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_every_option_on_every_layout(ranks, way, name):
    whole = in_one_process(Call(way, (211,), OPTIONS[name], (37,)), ranks.device)
    for p in (1, 2, 3, 4):
        for sizes, counts in layouts(p):
            call = Call(way, sizes, OPTIONS[name], counts)
            assert_same(call, whole, ranks.run(on_a_rank, p, call))


def test_truncation_leaves_rows_out_and_keeps_some(ranks):
    """Otherwise the comparisons would be worth less."""
    for name, options in OPTIONS.items():
        if 0.1 < options.get("threshold", 1) < 1 and options.get("denominator") != 0:
            kept = in_one_process(Call(LOGITS, (211,), options | {"return_stats": True}), ranks.device)["kept"].sum()
            assert 5 < kept < 30, name


@pytest.mark.parametrize("name", ["truncated", "everything", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_other_dtypes(ranks, way, dtype, name):
    sizes, counts = list(layouts(4))[1]
    compare(ranks, 4, Call(way, sizes, OPTIONS[name], counts, dtype=dtype))


@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_autocast(ranks, way):
    sizes, counts = next(layouts(3))
    compare(ranks, 3, Call(way, sizes, OPTIONS["truncated"], counts, autocast=torch.bfloat16))


@pytest.mark.parametrize("name, options", [
    ("everything", {"chunk_size": 1}), ("everything", {"chunk_size": 8}), ("everything", {"chunk_size": 36}),
    ("everything", {"chunk_size": 8, "allow_retain_graph": True}), ("everything, none", {"chunk_size": 2}),
    ("by what is kept", {"chunk_size": 5}), ("everything", {"chunk_size": 8, "accumulate_dtype": torch.float64}),
])  # fmt: skip
@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_chunks(ranks, way, name, options):
    for p in (2, 4):
        sizes, counts = next(layouts(p))
        compare(ranks, p, Call(way, sizes, OPTIONS[name] | options, counts))


@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_every_combination_of_frozen_tensors(ranks, way):
    sizes, counts = list(layouts(3))[2]
    for needs in itertools.product([False, True], repeat=3):
        for options in ({}, {"reduction": "none"}):
            compare(ranks, 3, Call(way, sizes, OPTIONS["truncated"] | options | {"chunk_size": 8}, counts, needs=needs))
    for needs in itertools.product([False, True], repeat=2):
        compare(ranks, 3, Call(way, sizes, OPTIONS["z-loss"], counts, needs=(*needs, False), has_bias=False))


@pytest.mark.parametrize("changes", [
    {"trailing": (5,), "n_rows": 4}, {"is_strided": True}, {"trailing": (5,), "n_rows": 4, "is_strided": True},
    {"target_dtype": torch.int32}, {"ignored": tuple(range(37))}, {"n_rows": 0, "ignored": ()}, {"n_rows": 1},
    {"options": {"threshold": 0.5, "inplace": True}}, {"options": {"gamma": 1.0, "inplace": True, "reduction": "none"}},
])  # fmt: skip
def test_shapes_of_given_logits(ranks, changes):
    for p in (2, 4):
        for sizes, _ in layouts(p):
            call = Call(LOGITS, sizes, **{"options": OPTIONS["everything"]} | changes)
            compare(ranks, p, call)


@pytest.mark.parametrize("changes", [
    {"counts": (2, 1, 0, 4), "trailing": (5,)}, {"counts": (0, 0, 0, 0)}, {"counts": (0, 0, 3, 0)},
    {"counts": (9, 9, 9, 10), "ignored": tuple(range(9, 18))},  # nothing but ignored rows on a rank
    {"counts": (9, 9, 9, 10), "ignored": tuple(range(37))}, {"counts": (9, 9, 9, 10), "target_dtype": torch.int32},
])  # fmt: skip
def test_rows_that_ranks_have_of_their_own(ranks, changes):
    for name in ("truncated", "everything", "by what is kept, weighted", "none"):
        for sizes, _ in layouts(4):
            call = Call(SHARDED, sizes, OPTIONS[name], **{"n_rows": sum(changes["counts"])} | changes)
            compare(ranks, 4, call)


@pytest.mark.parametrize("first", range(0, 150, 15))
def test_calls_drawn_at_random(ranks, first):
    for number in range(first, first + 15):
        compare(ranks, *drawn(number))
