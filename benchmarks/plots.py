"""The style of all plots, and the one that compares providers."""

from pathlib import Path

import matplotlib

from .measure import OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of backend
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

# Of Okabe and Ito, told apart by colour-blind readers too, and more for a GPU's longer list. The first is for us.
COLOURS = [
    "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00",
    "#882255", "#117733", "#999933", "#332288", "#44AA99", "#AA4499",
]  # fmt: skip
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def new_figure(columns: int, height: float) -> tuple[Figure, list]:
    """Panels beside each other, as wide as a README shows a picture."""
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(1, columns, figsize=(11, height), layout="constrained", squeeze=False)
    return figure, list(panels[0])


def finish(figure: Figure, heading: list[str], path: Path) -> None:
    """The heading of the saved figures goes on top, so that a picture alone says what it is of."""
    figure.suptitle("\n".join(heading), fontsize=8, color="0.35", linespacing=1.4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    figure, (by_share, by_V, memory) = new_figure(3, 5)
    first = rows[0]
    rows = [row for row in rows if row["N"] == first["N"] and row["dtype"] == first["dtype"]]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    rivals = [name for name in names if name != names[-1]]
    colours = dict(zip(rivals, COLOURS, strict=False))
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
    finish(figure, heading, path)
