"""Losses whose classes are split over ranks, against one process: `pytest` starts four processes that talk by gloo.

On several GPUs: torchrun --standalone --nproc-per-node 4 -m pytest tests/test_distributed*.py
"""

import itertools
import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import needs_triton

from tests.distributed import refusals
from tests.distributed.calls import (
    LOGITS,
    REPLICATED,
    SHARDED,
    Call,
    assert_same,
    in_one_process,
    layouts,
    on_a_rank,
    on_a_rank_again,
    share_of,
    tensors_of,
)
from tests.distributed.drawing import OPTIONS, drawn
from tests.distributed.refusals import DISAGREEMENTS, LINEAR_DISAGREEMENTS, ODD, OWN, REFUSALS

pytestmark = [
    pytest.mark.xdist_group("distributed"),  # in one worker, which starts the processes
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"),
]
WAYS = LOGITS, REPLICATED, SHARDED


def compare(ranks, p, call, case=on_a_rank):
    assert_same(call, in_one_process(call, ranks.device), ranks.run(case, p, call))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_every_option(ranks, way, name):
    whole = in_one_process(Call(way, (211,), OPTIONS[name], (37,)), ranks.device)
    for p in (1, 2, 3, 4):
        sizes, counts = list(layouts(p))[p - 2 if p > 1 else 0]  # even, uneven, with an empty shard
        call = Call(way, sizes, OPTIONS[name], counts)
        assert_same(call, whole, ranks.run(on_a_rank, p, call))


@pytest.mark.parametrize("name", ["everything", "everything, none", "by what is kept, weighted"])
@pytest.mark.parametrize("way", WAYS)
def test_every_layout(ranks, way, name):
    for p in (2, 3, 4):
        for sizes, counts in layouts(p):
            compare(ranks, p, Call(way, sizes, OPTIONS[name], counts), case=on_a_rank_again)


@pytest.mark.parametrize("name", ["entropy", "entropy, everything", "entropy, none"])
@pytest.mark.parametrize("way", WAYS)
def test_entropy_in_every_layout(ranks, way, name):
    """Shards without classes among them."""
    for dtype, p in itertools.product((torch.float32, torch.float64), (2, 4)):
        for sizes, counts in layouts(p):
            call = Call(way, sizes, OPTIONS[name], counts, dtype=dtype)
            whole = in_one_process(call, ranks.device)
            assert whole["entropy"].max() > 0.1
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


@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_tolerances(ranks, way):
    """Loss and statistics are exact; the classes of least gradient mass stand in as the product of their marginals."""
    tolerance, exact = 0.2, {"threshold": 0.5, "return_stats": True}
    sizes = 500, 700, 0, 800
    call = Call(way, sizes, exact | {"gradient_tolerance": tolerance}, (20, 0, 10, 7))
    whole = in_one_process(replace(call, options=exact), ranks.device)
    mass = in_one_process(replace(call, way=LOGITS, options=exact), ranks.device)["gradient of logits"].abs().sum()
    x, weight, *_ = tensors_of(call)
    largest = {"input": weight.abs().max(), "weight": x.abs().max(), "bias": torch.tensor(1.0)}
    results = ranks.run(on_a_rank_again, 4, call)
    fractions = {result.pop("class_fraction").item() for result in results}
    assert len(fractions) == 1 and 0 < fractions.pop() < 1
    for rank, result in enumerate(results):
        for name, factor in largest.items():  # what is left out and what stands in for it: the tolerated mass each
            key = f"gradient of {name}"
            error = (result.pop(key) - share_of(call, key, whole[key], rank)).abs()
            assert not error.numel() or 0 < error.max() <= 2 * tolerance * mass * factor
    assert_same(call, {name: whole[name] for name in results[0]}, results)


@needs_triton
@pytest.mark.parametrize("name", ["everything", "everything, none", "both weights, focal"])
@pytest.mark.parametrize("way", WAYS)
def test_triton(ranks, way, name):
    """On a CPU in the interpreter: few rows, and what that gives in one process."""
    options = OPTIONS[name] | {"backend": "triton"}
    for sizes, counts in (((30, 0, 41), (5, 0, 3)), ((1, 60, 10), (0, 8, 0))):
        compare(ranks, 3, Call(way, sizes, options, counts, n_rows=8, ignored=(3,)))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("options", [{"reduction": "none", "return_stats": True}, {"z_loss": 1e-2}])
@pytest.mark.parametrize("row, columns, value", [
    (2, (50, 51), NAN), (2, (210, 211), INF), (2, (0, 211), -INF), (2, (0, 211), NAN),
    (2, (0, 71), -INF), (2, (71, 141), -INF), (2, (141, 211), -INF),  # all that one rank has
    (17, (0, 211), NAN),  # an ignored row
])  # fmt: skip
def test_values_that_break_a_row(ranks, row, columns, value, options):
    """The row is what it is in one process, on every rank, and no other row is touched."""
    sizes, _ = next(layouts(3))
    poison = slice(row, row + 1), slice(*columns), value
    for rule in ({"threshold": 0.5}, {"threshold": 0.5, "label_smoothing": 0.1}, {"gamma": 2.0}):
        compare(ranks, 3, Call(LOGITS, sizes, rule | options, poison=poison))


@pytest.mark.parametrize("start, stop, value", [(0, 53, -INF), (53, 211, -INF), (0, 211, -INF), (7, 8, NAN)])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_entropy_of_rows_that_some_ranks_have_nothing_of(ranks, backend, start, stop, value):
    options = {"threshold": 0.5, "return_stats": "entropy", "reduction": "none", "backend": backend}
    call = Call(LOGITS, list(layouts(4))[0][0], options, poison=(slice(5, 9), slice(start, stop), value))
    whole = in_one_process(call, ranks.device)
    assert whole["entropy"][5:9].isnan().all() == (stop - start in (1, 211))
    assert_same(call, whole, ranks.run(on_a_rank, 4, call))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_hidden_states_that_break_a_row(ranks, way, value):
    sizes, counts = next(layouts(3))
    options = {"threshold": 0.5, "reduction": "none", "return_stats": True, "chunk_size": 8}
    for row in (2, 17):  # one that counts and one that is ignored
        compare(ranks, 3, Call(way, sizes, options, counts, poison=(slice(row, row + 1), slice(3, 4), value)))


@pytest.mark.parametrize("first", range(0, 150, 15))
def test_calls_drawn_at_random(ranks, first):
    for number in range(first, first + 15):
        compare(ranks, *drawn(number))


# Ranks that do not call alike. Every rank raises or none does, and the next call works.


@pytest.fixture
def compared(ranks):
    if ranks.device.type != "cpu" and os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF") == "OFF":
        pytest.skip("losses of logits on a GPU compare their arguments with TORCH_DISTRIBUTED_DEBUG only")


def refused(ranks, case, *arguments):
    """The error of each rank, if the next call worked."""
    outcomes = ranks.run(case, 4, *arguments)
    errors, following = zip(*outcomes, strict=True)
    assert all(isinstance(error, tuple) for error in errors), errors
    assert len(set(following)) == 1 and isinstance(following[0][0], float), following
    return errors


WITH_DISAGREEMENTS = [(LOGITS, name) for name in DISAGREEMENTS]
WITH_DISAGREEMENTS += [
    (way, name)
    for way in (REPLICATED, SHARDED)
    for name in DISAGREEMENTS | LINEAR_DISAGREEMENTS
    if way == REPLICATED or name not in OWN
]


@pytest.mark.parametrize("way, name", WITH_DISAGREEMENTS)
def test_a_disagreement_raises_the_same_error_on_all_ranks(ranks, compared, way, name):
    errors = refused(ranks, refusals.disagree, way, name)
    assert len(set(errors)) == 1
    kind, text = errors[0]
    assert kind is ValueError
    assert (DISAGREEMENTS | LINEAR_DISAGREEMENTS)[name][-1] in text
    assert re.search(r"must (be|hold) the same .*on all ranks of the group, got .*rank by rank", text)


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("way", WAYS)
def test_what_one_rank_refuses_fails_on_the_others(ranks, compared, way, name):
    _, kind, text = REFUSALS[name]
    for rank, (got, message) in enumerate(refused(ranks, refusals.refuse, way, name)):
        if rank == ODD:
            assert got is kind and re.match(text, message)
        else:
            assert got is RuntimeError and f"refused on rank {ODD} of the group" in message
    for got, message in refused(ranks, refusals.refuse, way, name, True):
        assert got is kind and re.match(text, message), "all of them have their own error"


@pytest.mark.parametrize("value", [20, -1, 10**12])
@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_no_rank_has(ranks, way, value):
    if ranks.device.type != "cpu":
        pytest.skip("a NaN row on a GPU")
    for only_on in (None, ODD) if way == SHARDED else (None,):
        errors = refused(ranks, refusals.bad_target, way, value, only_on)
        assert len(set(errors)) == 1
        assert errors[0][0] is IndexError and re.match(rf"target must be in \[0, 20\).*got {value}", errors[0][1])


@pytest.mark.parametrize("way", WAYS)
def test_class_weights_of_a_wrong_number(ranks, compared, way):
    errors = refused(ranks, refusals.wrong_class_weights, way)
    assert set(errors) == {(ValueError, "weight must have one entry per class of all ranks, [20], got [19]")}


@pytest.mark.parametrize("kind", ["a name", "ranks", "not a member", "a mesh"])
@pytest.mark.parametrize("way", WAYS)
def test_a_group_that_is_none(ranks, way, kind):
    for got, message in refused(ranks, refusals.wrong_group, way, kind):
        assert got is TypeError and message.startswith("group must be None or a torch.distributed.ProcessGroup")


def test_rows_are_replicated_or_sharded(ranks):
    for got, message in refused(ranks, refusals.wrong_rows):
        assert got is ValueError
        assert message == "rows must be one of 'replicated', 'sharded', got 'split'"


@pytest.mark.parametrize("way", [REPLICATED, SHARDED])
def test_no_grad_on_one_rank(ranks, way):
    errors, following = zip(*ranks.run(refusals.no_grad_on_one, 4, way), strict=True)
    assert len(set(errors)) == 1 and errors[0][0] is ValueError
    assert len(set(following)) == 1
