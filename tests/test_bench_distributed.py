"""`python -m benchmarks distributed`: the model of the cost, and counted bytes against formulas."""

import pytest

from benchmarks.distributed import model
from benchmarks.distributed.model import Head


def test_one_gpu_is_what_others_are_compared_with():
    for kept in model.SHARES:
        assert model.efficiency(Head(1, kept)) == 1 == model.efficiency(Head(1, kept, "sharded"))
        times = model.seconds(Head(1, kept))
        assert times.communication == 0 and times.serial == times.overlapped == times.compute
        assert times.compute >= 2 * model.N * model.D * model.V * (1 + 2 * kept) / model.FLOPS


@pytest.mark.parametrize("rows", ["replicated", "sharded"])
@pytest.mark.parametrize("kept", model.SHARES)
def test_more_gpus_are_faster_and_less_efficient(rows, kept):
    times = [model.seconds(Head(p, kept, rows)) for p in model.RANKS]
    for fewer, more in zip(times, times[1:], strict=False):
        assert more.compute < fewer.compute and more.communication > fewer.communication
    for each in times:
        assert max(each.compute, each.communication) <= each.overlapped <= each.serial
        assert each.serial == pytest.approx(each.compute + each.communication)
    found = [model.efficiency(Head(p, kept, rows)) for p in model.RANKS]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("kept", model.SHARES)
def test_what_eight_gpus_keep_of_their_time(kept):
    assert model.efficiency(Head(8, kept)) >= 0.97


def test_limits_of_the_model(monkeypatch):
    """Without a latency the volume decides, and without a volume the latency."""
    head = Head(64, 0.5)
    monkeypatch.setattr(model, "LATENCY_BETWEEN_NODES", 0.0)
    volume = 63 * head.N * model.SUM_BYTES + 2 * 63 / 64 * 0.5 * head.N * head.D * model.DX_BYTES
    assert model.seconds(head).communication == pytest.approx(volume / model.ADAPTERS)
    monkeypatch.setattr(model, "LATENCY_BETWEEN_NODES", 1.0)
    monkeypatch.setattr(model, "SUM_BYTES", 0)
    monkeypatch.setattr(model, "DX_BYTES", 0)
    assert model.seconds(head).communication == pytest.approx(3 * 4)  # four chunks: a gather and an all-reduce each


def test_a_shard_whose_rows_travel():
    shard = model.Shard(p=8, N=1024, valid=0.5, kept=0.25)
    matrix = model.V * model.D / 2**20
    assert shard.weight_once == pytest.approx(7 / 8 * matrix * 6)
    assert shard.weight_twice == pytest.approx(7 / 8 * matrix * 8)
    assert shard.rows == pytest.approx(7 * 512 * (model.D * (2 + 0.25 * 4) + 12) / 2**20)
