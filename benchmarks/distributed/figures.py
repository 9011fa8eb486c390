"""The picture: what a rank sends over the truncated share, and how efficient a model finds p GPUs."""

from pathlib import Path

from matplotlib.ticker import PercentFormatter

from .. import plots
from . import model
from .cases import MEGATRON, OURS, REPLICATED, SHARDED


def draw(heading: list[str], volume: list[dict], modelled: list[dict], path: Path) -> None:
    figure, panels = plots.new_figure(3, 4.4)
    most = max(row["p"] for row in volume)
    for panel, what in zip(panels, (REPLICATED, SHARDED), strict=False):
        sent(panel, [row for row in volume if row["p"] == most and row["what"] == what])
        panel.set_title(f"{what}, {most} ranks")
    panels[0].set_ylabel("MiB that a rank sends")
    efficiency(panels[-1], [row for row in modelled if row["rows"] == "replicated"])
    entries = {}
    for panel in panels[:2]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=2)
    figure.legend(
        *panels[-1].get_legend_handles_labels(), loc="outside lower right", title="dotted: communication not overlapped"
    )
    plots.finish(figure, heading, path)


def sent(panel, rows: list[dict]) -> None:
    for dtype, marker, line in (("float32", "o", "-"), ("bfloat16", "s", "--")):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        mine = [row for row in of_dtype if row["provider"] == OURS]
        if not mine:
            continue
        truncated = [1 - row["kept"] for row in mine]
        panel.plot(
            truncated, [row["formula_bytes"] / 2**20 for row in mine], line, color=plots.COLOURS[0],
            linewidth=1.5, label=f"{OURS}, {dtype}: formula",
        )  # fmt: skip
        panel.plot(
            truncated, [row["sent_bytes"] / 2**20 for row in mine], marker, color=plots.COLOURS[0],
            markerfacecolor="white" if marker == "s" else plots.COLOURS[0], label=f"{OURS}, {dtype}: counted",
        )  # fmt: skip
        (theirs,) = (row for row in of_dtype if row["provider"] == MEGATRON)
        panel.axhline(
            theirs["sent_bytes"] / 2**20, linestyle=line, color=plots.COLOURS[1], label=f"{MEGATRON}, {dtype}: counted"
        )
    panel.set(xlabel="truncated share", xlim=(-0.03, 1), ylim=(0, None))
    panel.xaxis.set_major_formatter(PercentFormatter(1))


def efficiency(panel, rows: list[dict]) -> None:
    for kept, colour in zip(model.SHARES, (plots.COLOURS[0], plots.COLOURS[3], plots.COLOURS[4]), strict=True):
        of_share = [row for row in rows if row["kept"] == kept]
        for column, line in (("efficiency", "o-"), ("efficiency_serial", "o:")):
            label = f"{kept:.0%} kept" if column == "efficiency" else None
            p = [row["p"] for row in of_share]
            panel.plot(p, [row[column] for row in of_share], line, color=colour, markersize=4, label=label)
    panel.axvline(model.NODE, color="0.6", linewidth=1)
    panel.annotate("one node | more", (model.NODE, 0.03), (0, 0), textcoords="offset points", ha="center", color="0.4")
    panel.set_xscale("log", base=2)
    panel.set_xticks(model.RANKS, model.RANKS)
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set(title="model: efficiency on H100s", xlabel="GPUs", ylim=(0, 1.03))
