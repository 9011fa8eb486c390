"""Training over ranks: DDP, FSDP2 and its own shards, accumulation, DTensors, compilers and other mechanisms.

The processes are those of test_distributed.py.
"""

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

from tests.distributed import mechanisms, placements, training
from tests.distributed.calls import (
    LOGITS,
    REPLICATED,
    SHARDED,
    Call,
    bits,
    distance,
    in_one_process,
    layouts,
    tensors_of,
)
from tests.distributed.drawing import OPTIONS

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 has no FSDP2 on a CPU"),
]
ANY_LOSS = pytest.mark.parametrize("name", training.OPTIONS)


def train(ranks, p, case, name, n_batches=None, tolerance=1e-6, dtype=torch.float32, **how):
    """What a step does, against one process with all batches; the text of a refusal, if all ranks refuse."""
    results = ranks.run(training.run, p, case, name, how)
    if any(isinstance(result, str) for result in results):
        assert len(set(results)) == 1, results
        return results[0]
    want = training.in_one_process(n_batches or p, name, how.get("tied", False), dtype)
    for rank, got in enumerate(results):
        assert got.keys() == want.keys()
        for key in want:
            error = distance(got[key].to(want[key]), want[key], want[key])
            assert error <= tolerance, f"{key} on rank {rank}: {error:.1e}"
        assert bits(got["loss"]) == bits(results[0]["loss"])
    return None


@pytest.mark.parametrize("how", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
@ANY_LOSS
def test_ddp(ranks, name, how):
    """Micro-batches and ranks with very different numbers of valid tokens, one with none: one mean over all."""
    for p in (2, 4):
        assert train(ranks, p, "ddp", name, **how) is None


@pytest.mark.parametrize("how", [
    {"head": "own unit"}, {"head": "own unit", "reshard_after_forward": False}, {"head": "own unit", "outside": True},
    {"head": "root"}, {"head": "root", "reshard_after_forward": True}, {"head": "root", "tied": True},
    {"head": "root", "tied": True, "reshard_after_forward": True}, {"head": "root", "outside": True},
    {"head": "own unit", "way": "read_unsharded"}, {"head": "root", "way": "read_weight"},
])  # fmt: skip
@ANY_LOSS
def test_fsdp2(ranks, name, how):
    for p in (2, 4):
        assert train(ranks, p, "fsdp", name, **how) is None


@pytest.mark.parametrize("head", ["own unit", "root"])
@ANY_LOSS
def test_fsdp2_in_bfloat16(ranks, name, head):
    """Each rank rounds its part of a gradient by half an eps, and so does the one process the whole."""
    how = {"head": head, "bf16": True, "dtype": torch.bfloat16, "tolerance": 2 * torch.finfo(torch.bfloat16).eps}
    assert train(ranks, 2, "fsdp", name, **how, as_number=True) is None
    refusal = train(ranks, 2, "fsdp", name, **how)  # FSDP2 casts what goes into a module
    assert "denominator must not be in torch.bfloat16" in refusal and "cast_forward_inputs=False" in refusal


@pytest.mark.parametrize("how, text", [
    ({"head": "own unit", "way": "read_weight"}, "ranks with rows of their own need rows='sharded'"),
    ({"head": "own unit", "way": "read_weight", "outside": True}, "ranks with rows of their own need rows='sharded'"),
    ({"head": "root", "outside": True, "reshard_after_forward": True}, "need rows='sharded'"),
    ({"head": "root", "way": "read_own_shard"}, "rows must be left at 'replicated' where linear_weight has all"),
])  # fmt: skip
def test_wrong_ways_under_fsdp2_are_refused(ranks, how, text):
    assert text in (train(ranks, 2, "fsdp", "truncated", **how) or "no error")


@ANY_LOSS
def test_fsdp2_s_own_shard(ranks, name):
    """The head's weight is never gathered: ranks exchange hidden states."""
    for p in (2, 4):
        assert train(ranks, p, "own_shard", name) is None


def test_averages_with_fsdp2_s_own_shard_are_warned_of(ranks):
    """The gradients of the body would be too small by the number of ranks."""
    for summed in (True, False):
        for texts in ranks.run(training.warnings_of_own_shard, 2, summed):
            assert [("set_gradient_divide_factor(1.0)" in text) for text in texts] == [True] * (not summed)


def test_a_weight_from_full_tensor_is_warned_of(ranks):
    """Its gradient would be that of this rank's rows alone."""
    for texts in ranks.run(training.warnings_of_fsdp, 2, "read_full_tensor"):
        assert texts and all("full_tensor(), which takes its gradient for the same on all ranks" in t for t in texts)
    assert ranks.run(training.warnings_of_fsdp, 2, "call_head") == [[], []]


@pytest.mark.parametrize("own", [False, True])
@ANY_LOSS
def test_hybrid_shards(ranks, name, own):
    """HSDP: gradients arrive in the placements of the parameters, whole on both copies."""
    assert train(ranks, 4, "hybrid", name, own=own) is None


@pytest.mark.skipif(torch.__version__ < "2.10", reason="full_tensor() of shards of shards is wrong in torch 2.9")
@ANY_LOSS
def test_fsdp2_over_tensor_parallel(ranks, name):
    assert train(ranks, 4, "fsdp_and_tensor_parallel", name, n_batches=2) is None


def test_denominators(ranks):
    for averaged in (False, True):
        for weighted in (False, True):
            got = ranks.run(training.denominator, 4, averaged, weighted)
            want = training.total_weight(4, weighted) / (4 if averaged else 1)
            assert len({bits(total) for total in got}) == 1
            assert got[0].dtype == torch.float32 and got[0].dim() == 0
            torch.testing.assert_close(got[0].double(), want, rtol=2**-24, atol=0)


def test_a_denominator_that_one_rank_refuses(ranks):
    if ranks.device.type != "cpu":
        pytest.skip("on a GPU with TORCH_DISTRIBUTED_DEBUG only")
    for rank, (kind, text) in enumerate(ranks.run(training.refused_denominator, 4)):
        assert kind is (TypeError if rank == 1 else RuntimeError), text
        assert ("int32 or int64" if rank == 1 else "refused on rank 1") in text


# DTensors


def placed(ranks, way, table, name, option, n_rows):
    of_input, of_target, of_mean, of_none = table[name]
    of_loss = of_none if OPTIONS[option].get("reduction") == "none" else of_mean
    call = Call(way, (211,), OPTIONS[option] | {"return_stats": False}, n_rows=n_rows)
    want = in_one_process(call, ranks.device)
    for outright in (False, True) if of_loss is of_mean else (False,):
        for got in ranks.run(placements.placed, 4, call, of_input, of_target, of_loss, outright):
            assert got.keys() == want.keys()
            for key in want:
                assert distance(got[key], want[key], want[key]) <= 1e-6, key


@pytest.mark.parametrize("option", ["truncated", "class weights", "by what is kept, weighted", "none"])
@pytest.mark.parametrize("name", placements.HEADS)
def test_placements_of_hidden_states(ranks, name, option):
    for n_rows in (37, 3):  # 3: a rank has none
        placed(ranks, REPLICATED, placements.HEADS, name, option, n_rows)


@pytest.mark.parametrize("option", ["truncated", "token weights", "by what is kept, weighted", "none"])
@pytest.mark.parametrize("name", placements.LOGITS)
def test_placements_of_logits(ranks, name, option):
    for n_rows in (37, 1):
        placed(ranks, LOGITS, placements.LOGITS, name, option, n_rows)


@pytest.mark.parametrize("name", placements.REFUSED | placements.REFUSED_2D)
def test_placements_of_a_head_that_are_refused(ranks, name):
    *_, text = (placements.REFUSED | placements.REFUSED_2D)[name]
    for kind, message in ranks.run(placements.refused_head, 4, name):
        assert kind is TypeError and message.startswith(text)


@pytest.mark.parametrize("name", placements.REFUSED_LOGITS)
def test_placements_of_logits_that_are_refused(ranks, name):
    for kind, message in ranks.run(placements.refused_logits, 4, name):
        assert kind is TypeError and message.startswith("logits must be Shard(-1) on one mesh dimension")
        assert "got a DTensor with placements (" in message


# Where PyTorch users put a loss

ANY_WAY = pytest.mark.parametrize("way", [LOGITS, REPLICATED, SHARDED])
ANY_REDUCTION = pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"denominator": "kept"}])


def over_three(way, options):
    sizes, counts = next(layouts(3))  # one rank has no rows of its own
    return Call(way, sizes, options, counts)


def same(got, want):
    return all(bits(one) == bits(other) for one, other in zip(got, want, strict=True))


@ANY_REDUCTION
@ANY_WAY
def test_compiled_without_a_break(ranks, way, options):
    """Thresholds that change from call to call are no reason to compile again."""
    for results, n_graphs in ranks.run(mechanisms.compiled, 3, over_three(way, options), "aot_eager", limit=120):
        assert n_graphs == 1
        assert all(same(*pair) for pair in results)


def test_compiled_by_inductor(ranks):
    """It leaves out what has no effect on one rank, such as sums over no rows; the others would wait for them."""
    for results, _ in ranks.run(mechanisms.compiled, 3, over_three(SHARDED, {}), "inductor", limit=300):
        for eager, fast in results:
            assert all(distance(got, want, want) <= 1e-6 for got, want in zip(fast, eager, strict=True))


@ANY_REDUCTION
@ANY_WAY
def test_compiled_autograd(ranks, way, options):
    for want, got in ranks.run(mechanisms.compiled_autograd, 3, over_three(way, options), limit=120):
        assert same(got, want)


@ANY_REDUCTION
@ANY_WAY
def test_checkpoints_and_hooks_of_saved_tensors(ranks, way, options):
    for pairs in ranks.run(mechanisms.checkpointed, 3, over_three(way, options)):
        assert all(same(*pair) for pair in pairs)
    for want, got in ranks.run(mechanisms.hooked, 3, over_three(way, options)):
        assert same(got, want)


@ANY_REDUCTION
@ANY_WAY
def test_functional_transforms(ranks, way, options):
    call = over_three(way, options)
    if options.get("reduction") != "none":
        for want, got in ranks.run(mechanisms.differentiated, 3, call):
            assert bits(got) == bits(want)
    for want, got in ranks.run(mechanisms.mapped, 3, call):
        assert bits(got) == bits(want)
    assert {
        text.partition(" with a group")[0].split(" ", 2)[2] for text in ranks.run(mechanisms.in_forward_mode, 3, call)
    } == {"must not carry a forward-mode tangent"}
    assert all("backend='reference'" in text for text in ranks.run(mechanisms.differentiated_twice, 3, call))


@ANY_REDUCTION
@ANY_WAY
def test_a_second_backward(ranks, way, options):
    """Made from the logits or from what they are made from, which nothing has written to."""
    for first, second in ranks.run(mechanisms.backward_twice, 3, over_three(way, options)):
        assert bits(second) == bits(first)


def test_upstream_gradients_say_nothing_of_what_travels(ranks):
    """Rows that one rank alone has no use for are sent all the same: the others wait for them."""
    call = over_three(REPLICATED, {"threshold": 1.0, "reduction": "none"})
    x, weight, bias, target, *_ = tensors_of(call)
    p = torch.softmax(torch.nn.functional.linear(x, weight, bias), 1)
    p[torch.arange(37), target.clamp(min=0)] -= 1
    p[target == -100] = 0
    p[5:, call.classes(1)] = 0
    for rank, (of_input, of_weight) in enumerate(ranks.run(mechanisms.zeros_from_above_on_one_rank, 3, call)):
        torch.testing.assert_close(of_input, p @ weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_weight, (p.t() @ x)[call.classes(rank)], rtol=1e-5, atol=1e-5)


def test_modules_are_the_functions(ranks):
    for kinds in ranks.run(mechanisms.through_modules, 3, over_three(REPLICATED, {})):
        assert [len(losses) for losses in kinds] == [1, 1, 1]
