"""The style of all plots."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of backend
from matplotlib.figure import Figure  # noqa: E402

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
