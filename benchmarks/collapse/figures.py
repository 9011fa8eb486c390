"""The pictures of the report: fidelity over generations, with intervals, of every arm."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .. import plots
from . import categorical as bigrams
from . import fidelity, measures, published
from . import gaussian as gaussians
from . import gmm as mixtures
from . import lm as language
from .groups import Group, Values, column, values_of

CLAIM = 2.3  # the paper's ratio
# Levels that count as failure: of retention, and of KL(real || generated) in nats.
RETENTIONS, DIVERGENCES = np.arange(0.6, 0.96, 0.01), np.arange(0.2, 2.5, 0.1)
BASELINES = (language.CROSS_ENTROPY, "all samples", "no truncation", "ELBO")


def line(arms: list[str], arm: str) -> dict:
    """The baseline is black; the others have a colour each, and controls are dashed."""
    if arm in BASELINES:
        return dict(color="0.1", linewidth=2, label=arm)
    others = [name for name in arms if name not in BASELINES]
    control = any(word in arm for word in ("random", "smoothing", "kept", "early"))
    return dict(color=plots.COLOURS[others.index(arm)], linewidth=1.6, linestyle="--" if control else "-", label=arm)


def curves(panel, group: Group, values: Values, arms: list[str], shown: Callable = lambda mean: mean) -> None:
    """Mean over seeds and its interval, of each arm, as `shown` makes them."""
    x = group.positions()
    for arm in group.arms:
        style = line(arms, arm)
        mean, low, high = fidelity.mean_curve(group.sample(arm, values))
        panel.plot(x, shown(mean), **style)
        panel.fill_between(x, shown(low), shown(high), color=style["color"], alpha=0.15, linewidth=0)
    panel.set_xlim(x[0], x[-1])


def logarithm(name: str, least: float = 0) -> Values:
    """Its mean is a geometric one: what one seed in twenty does is not to hide the others."""
    return lambda rows: np.log(column(rows, name).clip(least))


def all_arms(groups: list[Group]) -> list[str]:
    """Of all groups, in an order that fits each of them."""
    arms = list(dict.fromkeys(arm for group in groups for arm in group.arms))
    return [arm for arm in language.LOSSES if arm in arms] or arms


def finish(figure, panels: list, heading: list[str], path: Path) -> None:
    """One legend for all panels, below them."""
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), 5))
    plots.finish(figure, heading, path)


def gaussian(groups: list[Group], heading: list[str], path: Path) -> None:
    figure, panels = plots.new_figure(len(groups), 4.6)
    arms = all_arms(groups)
    for panel, group in zip(panels, groups, strict=True):
        curves(panel, group, logarithm("sigma"), arms, np.exp)
        panel.set(yscale="log", xlabel="generation")
        if group.setting == gaussians.FIGURE_11:
            panel.set_title("Fig. 11: nothing dropped")
            continue
        panel.set_title(f"Fig. 2: dropped below the {group.setting}")
        for values in published.FIGURE_2.values():
            panel.plot(published.FIGURE_2_GENERATIONS, values, "o", color="0.1", markersize=4, fillstyle="none",
                       label="the paper's Fig. 2")  # fmt: skip
    panels[0].set_ylabel("standard deviation $\\sigma$, geometric mean of the seeds")
    finish(figure, panels, heading, path)


def categorical(groups: list[Group], heading: list[str], path: Path) -> None:
    figure, panels = plots.new_figure(len(groups), 4.6)
    arms = all_arms(groups)
    for panel, group in zip(panels, groups, strict=True):
        curves(panel, group, bigrams.entropy_kept, arms)
        panel.set(title=group.setting, xlabel="generation", ylim=(0, None))
        panel.axhline(bigrams.FAILURE, color="0.6", linewidth=1)
    panels[0].set_ylabel("entropy / entropy of the real text")
    finish(figure, panels, heading, path)


def gmm(groups: list[Group], heading: list[str], path: Path) -> None:
    figure, (divergence, scale) = plots.new_figure(2, 4.6)
    arms = all_arms(groups)
    for group in groups[:1]:
        curves(divergence, group, logarithm("real_over_model", 1e-3), arms, np.exp)
        curves(scale, group, logarithm("scale"), arms, np.exp)
    divergence.axhline(mixtures.FAILURE, color="0.6", linewidth=1)
    divergence.set(yscale="log", ylim=(0.01, None), xlabel="generation", title="KL(real || model), nats")
    scale.axhline(1, color="0.6", linewidth=1)
    scale.set(yscale="log", xlabel="generation", title="scale of the model (real: 1)")
    finish(figure, [divergence, scale], heading, path)


def vae(groups: list[Group], heading: list[str], path: Path) -> None:
    figure, panels = plots.new_figure(2 * len(groups), 4.6)
    arms = all_arms(groups)
    for i, group in enumerate(groups):
        for panel, name, title in zip(
            panels[2 * i :],
            ("frechet", "class_entropy"),
            ("Frechet distance", "entropy of classes, nats"),
            strict=False,
        ):
            curves(panel, group, values_of(name), arms)
            panel.set(title=f"{group.setting}: {title}", xlabel="generation", ylim=(0, None))
    finish(figure, panels, heading, path)


def main_groups(groups: list[Group]) -> list[Group]:
    """The paper's scheme and the synthetic loop, with the main decoder."""
    wanted = [f"{language.MAIN_DECODER}, {data}" for data in (language.PAPER, language.SYNTHETIC)]
    return [group for name in wanted for group in groups if group.setting == name] or groups[:1]


def lm(groups: list[Group], heading: list[str], path: Path) -> None:
    """Retention over stages."""
    shown = main_groups(groups)
    figure, panels = plots.new_figure(len(shown), 5)
    arms = all_arms(groups)
    for panel, group in zip(panels, shown, strict=True):
        curves(panel, group, measures.retention(group.config), arms, lambda mean: 100 * mean)
        panel.axhline(published.LEVEL, color="0.6", linewidth=1)
        floor = np.mean([rows[0]["floor"] for runs in group.arms.values() for rows in runs.values()])
        panel.axhline(100 * floor, color="0.6", linewidth=1, linestyle=":")
        panel.text(0.99, 100 * floor + 0.5, "never trained on it", color="0.4", ha="right", fontsize=8,
                   transform=panel.get_yaxis_transform())  # fmt: skip
        panel.set(title=group.setting, xlabel="stage")
    panels[0].set_ylabel("knowledge retention, split 0 (%)")
    finish(figure, panels, heading, path)


def lm_ratios(groups: list[Group], heading: list[str], path: Path) -> None:
    """Ratio to cross-entropy with its interval, a line per setting and arm; arrows for lower bounds."""
    pairs = [(group, arm) for group in groups for arm in compared(group)]
    figure, panels = plots.new_figure(2, 2 + 0.22 * len(pairs))
    arms = all_arms(groups)
    for y, (group, arm) in enumerate(pairs):
        colour = line(arms, arm)["color"]
        both = [(measures.retention(group.config), published.LEVEL / 100)]
        if group.setting != f"{language.MAIN_DECODER}, {language.REAL}":
            both.append((measures.text_fidelity, -language.FAILURE))
        for panel, (values, level) in zip(panels, both, strict=False):
            found = group.ratio(arm, language.CROSS_ENTROPY, values, level)
            panel.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6)
            panel.plot(found.median, y, ">" if found.at_least else "o", color=colour, markersize=5)
            if np.isnan(found.median):
                panel.text(1.02, y, "cross-entropy does not fail", color="0.5", fontsize=7, va="center")
    for panel in panels:
        panel.set_yticks(range(len(pairs)), [f"{group.setting}: {arm}" for group, arm in pairs], fontsize=8)
        panel.set_ylim(len(pairs) - 0.5, -0.5)
        panel.axvline(1, color="0.4", linewidth=1)
        panel.axvline(CLAIM, color="0.4", linewidth=1, linestyle=":")
        panel.set_xlabel("fidelity interval / cross-entropy's, in stages\n(dotted: the paper's 2.3; arrows: at least)")
    panels[1].set_yticklabels([])
    panels[0].set_title(f"knowledge: retention above {published.LEVEL:.0f}%")
    panels[1].set_title(f"text: KL(real || generated) below {language.FAILURE} nats")
    plots.finish(figure, heading, path)


def compared(group: Group) -> list[str]:
    """The arms that have a ratio."""
    return [arm for arm in group.arms if arm != language.CROSS_ENTROPY and language.CROSS_ENTROPY in group.arms]


def lm_levels(groups: list[Group], heading: list[str], path: Path) -> None:
    """The ratio as the level that counts as failure goes from the floor to the ceiling."""
    shown = main_groups(groups)
    figure, panels = plots.new_figure(2 * len(shown), 4.6)
    arms = all_arms(groups)
    for i, group in enumerate(shown):
        knowledge, text = panels[2 * i : 2 * i + 2]
        _over_levels(knowledge, group, arms, measures.retention(group.config), RETENTIONS, 100)
        knowledge.axvline(published.LEVEL, color="0.6", linewidth=1)
        knowledge.set(title=f"{group.setting}:\nknowledge", xlabel="failure: retention below (%)")
        _over_levels(text, group, arms, measures.text_fidelity, -DIVERGENCES, -1)
        text.axvline(language.FAILURE, color="0.6", linewidth=1)
        text.set(title=f"{group.setting}:\ntext", xlabel="failure: KL above (nats)")
    panels[0].set_ylabel("fidelity interval / cross-entropy's, in stages\n(dotted: a lower bound)")
    finish(figure, panels, heading, path)


def _over_levels(panel, group: Group, arms: list[str], values: Values, levels: np.ndarray, scale: float) -> None:
    for arm in compared(group):
        ours = group.sample(arm, values, language.CROSS_ENTROPY)
        theirs = group.sample(language.CROSS_ENTROPY, values, arm)
        found = [fidelity.ratio(group.positions(), ours, theirs, level) for level in levels]
        median, low, high = np.array([each[:3] for each in found]).T
        exact = np.array([not each.at_least for each in found])
        style = line(arms, arm)
        panel.plot(scale * levels, np.where(exact, median, np.nan), **style)
        panel.plot(scale * levels, np.where(exact, np.nan, median), color=style["color"], linestyle=":")
        panel.fill_between(scale * levels, low, high, color=style["color"], alpha=0.1, linewidth=0)
    panel.axhline(1, color="0.1", linewidth=1)


def lm_text(groups: list[Group], heading: list[str], path: Path) -> None:
    """What becomes of the text, and of the model's confidence in it."""
    shown = main_groups(groups)
    figure, panels = plots.new_figure(2 * len(shown), 4.6)
    arms = all_arms(groups)
    for i, group in enumerate(shown):
        divergence, confidence = panels[2 * i : 2 * i + 2]
        curves(divergence, group, values_of("unigram_kl_real_generated"), arms)
        divergence.axhline(language.FAILURE, color="0.6", linewidth=1)
        divergence.set(title=f"{group.setting}:\nKL(real || generated), nats", xlabel="stage", ylim=(0, None))
        curves(confidence, group, values_of("confidence"), arms)
        confidence.set(title=f"{group.setting}:\nmean probability in training", xlabel="stage", ylim=(0, 1))
    finish(figure, panels, heading, path)


def lm_rules(groups: list[Group], heading: list[str], path: Path) -> None:
    """Rules that choose the threshold beside fixed ones: knowledge in each group, text and thresholds in the last."""
    arms = [language.CROSS_ENTROPY, "TCE 0.7", "TCE 0.9", *language.RULES]
    groups = [group._replace(arms={arm: group.arms[arm] for arm in arms if arm in group.arms}) for group in groups]
    figure, panels = plots.new_figure(len(groups) + 2, 4.6)
    *knowledge, text, threshold = panels
    for panel, group in zip(knowledge, groups, strict=True):
        curves(panel, group, measures.retention(group.config), arms, lambda mean: 100 * mean)
        panel.axhline(published.LEVEL, color="0.6", linewidth=1)
        panel.set(title=f"{group.setting}:\nknowledge retention, split 0 (%)", xlabel="stage")
    curves(text, group, values_of("unigram_kl_real_generated"), arms)
    text.axhline(language.FAILURE, color="0.6", linewidth=1)
    text.set(title=f"{group.setting}:\nKL(real || generated), nats", xlabel="stage", ylim=(0, None))
    ruled = group._replace(arms={arm: runs for arm, runs in group.arms.items() if arm in language.RULES})
    curves(threshold, ruled, values_of("threshold"), arms)
    threshold.set(title=f"{group.setting}:\nthreshold at a stage's end", xlabel="stage", ylim=(0.45, 1.02))
    finish(figure, panels, heading, path)
