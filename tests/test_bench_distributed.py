"""`python -m benchmarks distributed`: the model of the cost, counted bytes against formulas, the command."""

import importlib.util
import socket

import pytest
import torch
import torch.distributed as dist

ABSENT = [name for name in ("matplotlib", "tabulate", "tqdm") if importlib.util.find_spec(name) is None]
if ABSENT:
    pytest.skip(f"{', '.join(ABSENT)} not installed, which benchmarks need", allow_module_level=True)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from benchmarks import report
from benchmarks.distributed import cases, command, model, times, volume
from benchmarks.distributed.cases import LOGITS, MEGATRON, NO_GRADIENT, OURS, REPLICATED, SHARDED, Shape
from benchmarks.distributed.model import Head
from benchmarks.timing.measure import Inexact


def test_one_gpu_is_what_others_are_compared_with():
    for kept in model.SHARES:
        assert model.efficiency(Head(1, kept)) == 1 == model.efficiency(Head(1, kept, "sharded"))
        times = model.seconds(Head(1, kept))
        assert times.communication == 0 and times.serial == times.overlapped
        assert times.overlapped - times.compute == pytest.approx(2 * model.HOST_WAIT)  # two chunks
        assert times.compute >= 2 * model.N * model.D * model.V * (1 + 2 * kept) / model.FLOPS


@pytest.mark.parametrize("rows", ["replicated", "sharded"])
@pytest.mark.parametrize("kept", model.SHARES)
def test_more_gpus_are_faster_and_less_efficient(rows, kept):
    times = [model.seconds(Head(p, kept, rows)) for p in model.RANKS]
    for fewer, more in zip(times, times[1:], strict=False):
        assert more.compute < fewer.compute and more.communication > fewer.communication
    for each in times:
        assert max(each.compute, each.communication) <= each.overlapped <= each.serial
        waits = each.serial - each.compute - each.communication
        assert -1e-9 < waits <= 4 * model.HOST_WAIT * (1 + 1e-9)
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


TINY = command.Plan(
    volume=Shape(64, 128, 40), dtypes=[torch.float32, torch.bfloat16], kept=(1.0, 0.5), ranks=(2,),
    times=Shape(20, 8, 30), times_kept=(0.5,), rounds=2, agreement=Shape(20, 8, 30), agreement_rounds=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command has saved, with two ranks and tiny sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "ROOT", tmp_path_factory.mktemp("benchmarks"))
        patch.setattr(command, "QUICK", TINY)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert command.main(["--quick"]) == 0
        return report.ROOT / "results" / "cpu" / "quick"


def test_counted_bytes_are_the_formulas(folder):
    rows = report.load(folder / "distributed_volume.csv")[1]
    assert len(rows) == 2 * (2 * 4 + 4)
    for row in rows:
        counted = row["sent_bytes"] - row["agreement_bytes"]
        if (row["provider"], row["what"]) == (OURS, SHARDED):
            # The weights of the rows travel too, and some sums; kept rows of a rank are padded to those of the other.
            padding = 32 * 128 * 4 if row["kept"] < 1 else 0
            assert 0 < counted - row["formula_bytes"] <= 32 * 4 + 16 + padding
        else:
            assert counted == row["formula_bytes"]
        assert row["agreement_bytes"] < (1000 if row["provider"] == OURS else 1)


def test_the_volume_falls_with_the_truncated_share(folder):
    rows = report.load(folder / "distributed_volume.csv")[1]
    sent = {(row["provider"], row["what"], row["kept"]): row["sent_bytes"] for row in rows if row["dtype"] == "float32"}
    assert sent[OURS, REPLICATED, 0.5] <= 0.6 * sent[MEGATRON, REPLICATED, 1.0]
    assert sent[OURS, NO_GRADIENT, 0.5] == sent[OURS, LOGITS, 0.5] < 0.1 * sent[OURS, REPLICATED, 0.5]
    assert sent[OURS, SHARDED, 0.5] < sent[OURS, SHARDED, 1.0] < sent[MEGATRON, SHARDED, 1.0]


def test_the_command_saves_tables_and_a_picture(folder):
    page = (folder / "distributed.md").read_text()
    for name in ("volume", "agreement", "times", "model", "shards"):
        assert report.load(folder / f"distributed_{name}.csv")[1]
    assert page.count("\n## ") == 5 and (folder / "distributed.png").stat().st_size > 1000
    timed = report.load(folder / "distributed_times.csv")[1]
    assert {row["what"] for row in timed} == {LOGITS, REPLICATED, SHARDED}
    assert {OURS, MEGATRON, times.ONE_RANK, "DTensor, loss_parallel"} <= {row["provider"] for row in timed}


def test_under_torchrun(monkeypatch, tmp_path, capsys):
    """As its only process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **found}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick"]) == 0
    assert not dist.is_initialized()
    assert "cut-cross-entropy" in capsys.readouterr().out
    heading, rows = report.load(tmp_path / "results/cpu/quick/distributed_p1.csv")
    assert "1 ranks over gloo" in heading[1] and {row["dtype"] for row in rows} == {"bfloat16"}


def test_what_is_wrong_is_not_counted(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        reference = cases.Reference(cases.inputs_for(TINY.volume, torch.float32, 0.5, torch.device("cpu")))
        for scheme in cases.OURS_OVER_RANKS:
            volume.row_of(scheme, TINY.volume, reference, 0.5)
            skewed = scheme._replace(loss=lambda *tensors, loss=scheme.loss: 1.0001 * loss(*tensors))
            with pytest.raises(Inexact, match="of the largest entry"):
                volume.row_of(skewed, TINY.volume, reference, 0.5)
    finally:
        dist.destroy_process_group()
