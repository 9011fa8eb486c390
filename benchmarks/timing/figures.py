"""The picture of a suite: providers against each other, in time and memory."""

from pathlib import Path

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .. import plots
from .measure import OURS


def logarithmic(panel) -> None:
    """Few ticks, but enough for an axis of less than a decade, and numbers as people write them."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def in_thousands(V: float, _=None) -> str:
    return f"{V / 1000:.0f}k"


def comparison(heading: list[str], rows: list[dict], floor: str, path: Path) -> None:
    """Time over the share of truncated rows; time / floor and memory over the vocabulary at half of them truncated."""
    figure, (by_share, by_V, memory) = plots.new_figure(3, 5)
    first = rows[0]
    rows = [row for row in rows if row["N"] == first["N"] and row["dtype"] == first["dtype"]]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    rivals = [name for name in names if name != names[-1]]
    colours = dict(zip(rivals, plots.COLOURS, strict=False))
    for i, name in enumerate(names):
        mine = [row for row in rows if row["provider"] == name]
        is_floor, hollow = mine[0]["is_floor"], not mine[0]["truncates"]
        colour = "0.2" if is_floor else colours[name]
        line = dict(color=colour, linestyle="--" if is_floor else "-", linewidth=2.6 if name == OURS else 1.4)
        # Markers shrink, so that lines which coincide are seen to.
        line |= dict(marker="o", markersize=max(8 - i, 3), markerfacecolor="white" if hollow else colour)
        line |= dict(zorder=4 if name == OURS else 3)
        same_V = sorted((100 * row["share"], row["ms_p50"]) for row in mine if row["V"] == first["V"])
        by_share.plot(*zip(*same_V, strict=True), label=name, **line)
        half = sorted((row["V"], row["time_over_floor"], row["extra_peak_MiB"]) for row in mine if row["share"] == 0.5)
        if half:
            V, time_over_floor, extra = zip(*half, strict=True)
            by_V.plot(V, time_over_floor, **line)
            if not is_floor:
                memory.plot(V, extra, **line)
    by_share.set(xlabel="truncated rows (%)", title=f"time of one step (ms), vocabulary {in_thousands(first['V'])}")
    by_V.set(title=f"time / {floor}, half truncated")
    memory.set(title="extra memory (MiB), half truncated", ylim=(0, None))
    memory.yaxis.set_major_formatter("{x:g}")
    for panel in (by_share, by_V):
        logarithmic(panel)
    for panel in (by_V, memory):
        panel.set(xscale="log", xlabel="vocabulary")
        panel.set_xticks(sorted({row["V"] for row in rows}))
        panel.xaxis.set_major_formatter(FuncFormatter(in_thousands))
        panel.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside lower center", ncols=3, title="hollow markers: plain cross-entropy, without truncation")
    plots.finish(figure, heading, path)
