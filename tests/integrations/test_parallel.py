"""Truncated models on several ranks: as the stock model under the same wrapper, without logits in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("torch.distributed.fsdp", reason="torch has been built without torch.distributed")

from . import parallel
from .tiny import collate, data

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.7 or later is not installed"),
]
ROOT = Path(__file__).parents[2]
EXACT = 1e-6  # of float32, relative to the largest
HEADS = {"in the root": None, "a unit": {}, "a unit that stays": {"reshard_after_forward": False}}
THRESHOLDS = pytest.mark.parametrize("threshold", [1.0, parallel.THRESHOLD])
DDP = {"plain": {}, "unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def assert_same(results, threshold):
    for losses, gradients, parameters, made, share in results:
        assert losses < EXACT and gradients < EXACT and parameters < EXACT
        assert made == 0
        assert share == 0 if threshold == 1 else 0.1 < share < 0.9


@THRESHOLDS
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", DDP)
def test_ddp(ranks, options, tied, threshold):
    assert_same(ranks.run(parallel.data_parallel, 2, DDP[options], threshold, tied), threshold)


@pytest.mark.parametrize("options", DDP)
def test_a_loss_of_the_users_own_on_what_ddp_returns(ranks, options):
    assert max(ranks.run(parallel.own_loss_on_outputs, 2, DDP[options])) < EXACT


@THRESHOLDS
@pytest.mark.parametrize("head", HEADS)
def test_fsdp(ranks, head, threshold):
    assert_same(ranks.run(parallel.fully_sharded, 2, HEADS[head], threshold, False), threshold)


def test_fsdp_with_tied_weights(ranks):
    assert_same(ranks.run(parallel.fully_sharded, 2, None, 1.0, True), 1.0)


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_with_logits(ranks, head):
    for logits, loss, is_sharded in ranks.run(parallel.evaluated, 2, HEADS[head]):
        assert logits < 1e-5 and loss < 1e-6
        assert is_sharded == (head == "a unit")


@pytest.mark.parametrize("is_after_backward", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_a_training_step(ranks, head, is_after_backward):
    results = ranks.run(parallel.read_before_a_step, 2, HEADS[head], is_after_backward)
    if is_after_backward and head == "in the root":  # which the head cannot call together again
        assert all("taken out of memory since the call: read the logits before" in said for said in results)
    else:
        assert max(results) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_weights_that_are_gone_are_refused(ranks, head, fused):
    for said in ranks.run(parallel.read_after_a_step, 2, HEADS[head], fused):
        assert "has changed since the call" in said


def test_statistics_of_all_ranks(ranks):
    (want, _), *others = results = ranks.run(parallel.statistics_of_all, 4)
    assert all(together == want for together, _ in others)
    mine = [statistics for _, statistics in results]
    labels = collate(data(16))["labels"][:, 1:] != -100
    assert want.n_tokens == labels[:4].sum() + labels[12:].sum()
    assert [own.n_calls for own in mine] == [1, 0, 1, 1] and want.n_calls == 3
    assert mine[1].n_tokens == mine[2].n_tokens == 0
    assert want.histogram == tuple(map(sum, zip(*(own.histogram for own in mine), strict=True)))
    for name in ("truncated", "accuracy", "confidence", "cross_entropy"):
        mean = sum(getattr(own, name) * own.n_tokens for own in mine) / want.n_tokens
        assert getattr(want, name) == pytest.approx(mean, rel=1e-12), name


def test_statistics_of_no_rank(ranks):
    assert all(
        statistics.n_tokens == statistics.n_calls == 0 for statistics in ranks.run(parallel.statistics_of_nothing, 4)
    )


def test_trainer_on_two_processes(tmp_path):
    """Losses and gradients of the stock model; the log, and the threshold that a rule chooses, are of both ranks."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests" / "integrations" / "two_processes.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command + script, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"average')))
    for average in ("average True", "average False"):
        losses, gradients = found[average]
        assert losses < EXACT and gradients < EXACT
    if "trl" in found:  # where it is installed
        stock, ours = found["trl"]
        for name in stock:
            assert len(stock[name]) == 2 and ours[name] == pytest.approx(stock[name], rel=EXACT), name
    (logs, threshold, confidence), (other_logs, other_threshold, other_confidence) = found["logs"]
    assert logs == other_logs and threshold == other_threshold and confidence != other_confidence
    assert len(logs) == 2 and logs[0]["threshold"] != logs[1]["threshold"] and 0.1 < logs[0]["truncated"] < 0.9
