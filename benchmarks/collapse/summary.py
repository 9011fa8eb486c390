"""Tables and plots of the finished runs: report.md and one picture or more of each experiment, beside the CSV files."""

import textwrap
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import report
from . import categorical, fidelity, figures, gaussian, gmm, groups, lm, measures, published, vae
from .groups import Group, Values, values_of

REPORT = "report.md"


class Section(NamedTuple):
    title: str
    tables: list[tuple[str, list[dict]]]  # each with what it shows
    pictures: list[str]


def make(folder: Path) -> int:
    """Print and save the tables of all finished runs below the folder, and draw them."""
    sections = [
        section
        for name, (describe, arms) in SECTIONS.items()
        if (found := groups.load(folder, name, list(arms)))
        for section in describe(found, folder)
    ]
    if not sections:
        print(f"No finished runs in {folder.relative_to(report.ROOT.parent)}")
        return 1
    text = [
        "# What the runs say",
        "",
        "Written by `python -m benchmarks collapse report` from the CSV files beside it.",
    ]
    for section in sections:
        text += ["", f"## {section.title}"]
        print(f"\n{section.title}")
        for caption, table in section.tables:
            text += ["", caption, "", report.as_text(table, markdown=True)]
            print(f"\n{textwrap.fill(caption, 110)}\n\n{report.as_text(table)}")
        text += [f"\n![{section.title}]({name})" for name in section.pictures]
    (folder / REPORT).write_text("\n".join(text) + "\n")
    print()
    for name in [REPORT] + [name for section in sections for name in section.pictures]:
        report.announce(folder / name)
    return 0


def intervals(group: Group, baseline: str, values: Values, level: float) -> list[dict]:
    """Fidelity interval of each arm and its ratio to the baseline's."""
    table = []
    for arm in group.arms:
        compared = arm != baseline and baseline in group.arms
        table.append(
            {
                "arm": arm,
                "seeds": len(group.arms[arm]),
                "generations until failure": fidelity.interval(group.positions(), group.sample(arm, values), level),
                f"ratio to {baseline}": group.ratio(arm, baseline, values, level) if compared else "1",
            }
        )
    return table


def spread(values: np.ndarray, form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def seeds_in_words(group: Group) -> str:
    counts = sorted({len(runs) for runs in group.arms.values()})
    return f"{' to '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"


def heading(found: list[Group]) -> list[str]:
    """What a picture says of its origin."""
    return sorted({line for group in found for line in group.where})


# --- Gaussians


def of_gaussian(found: list[Group], folder: Path) -> list[Section]:
    found = sorted(found, key=lambda group: gaussian.SETTINGS.index(group.setting))
    truncated = [group for group in found if group.setting != gaussian.FIGURE_11]
    tables = []
    if truncated:
        rows = []
        for label, values in published.FIGURE_2.items():
            rows.append(_figure_2_row("the paper's Fig. 2", label, [f"{value:.3f}" for value in values]))
        for group in truncated:
            for arm in group.arms:
                cells = [spread(group.at(arm, "sigma", g)) for g in published.FIGURE_2_GENERATIONS]
                rows.append(_figure_2_row(group.setting, arm, cells))
        tables.append(
            (f"Fig. 2: sigma over the generations, mean and deviation of {seeds_in_words(truncated[0])}.", rows)
        )
        rows = []
        for group in truncated:
            for arm in group.arms:
                first, last = (np.log(group.at(arm, "sigma", g)) for g in (0, -1))
                measured = np.exp(2 * (last - first) / (group.generations - 1))
                gamma, bias = gaussian.GAMMAS[arm], group.config["bias"]
                predicted = gaussian.variance_factor(gamma, bias, group.setting)
                rows.append(
                    {
                        "dropped below": group.setting,
                        "arm": arm,
                        "measured": spread(list(measured), ".4f"),
                        "lambda^2 eta": f"{predicted:.4f}",
                        "lambda eta (the paper's)": f"{predicted / bias:.4f}",
                    }
                )
        tables.append(("Factor of the variance in one generation.", rows))
        for group in truncated:
            caption = f"Generations until sigma leaves {list(gaussian.BAND)}, dropped below the {group.setting}."
            tables.append((caption, intervals(group, "all samples", gaussian.distance_to_band, 0)))
    for group in found:
        if group.setting == gaussian.FIGURE_11:
            x = group.positions()
            chosen = [int(i) for i in np.linspace(0, len(x) - 1, 6)]
            rows = [
                {"arm": arm} | {f"generation {x[i]:.0f}": _median(group.at(arm, "sigma", i)) for i in chosen}
                for arm in group.arms
            ]
            caption = f"Fig. 11, nothing dropped: sigma, median and range of {seeds_in_words(group)}."
            tables.append((caption, rows))
    figures.gaussian(found, heading(found), folder / "gaussian.png")
    return [Section("Gaussians", tables, ["gaussian.png"])]


def _figure_2_row(setting: str, arm: str, cells: list[str]) -> dict:
    names = [f"generation {g}" for g in published.FIGURE_2_GENERATIONS]
    return {"dropped below": setting, "arm": arm} | dict(zip(names, cells, strict=True))


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


# --- Bigrams


def of_categorical(found: list[Group], folder: Path) -> list[Section]:
    tables = []
    for group in found:
        table = intervals(group, "cross-entropy", categorical.entropy_kept, categorical.FAILURE)
        for row in table:
            for name, index in (("first", 0), ("last", -1)):
                share = np.divide(*(group.at(row["arm"], each, index) for each in ("entropy", "real_entropy")))
                row[f"entropy / real, {name}"] = spread(list(share), ".2f")
            row["KL(real || model), last"] = spread(group.at(row["arm"], "real_over_model", -1), ".2f")
        caption = (
            f"{group.setting}: failure is less than half of the real entropy, over {group.generations} generations."
        )
        tables.append((caption, table))
    figures.categorical(found, heading(found), folder / "categorical.png")
    return [Section("Bigrams of characters", tables, ["categorical.png"])]


# --- Mixtures


def of_gmm(found: list[Group], folder: Path) -> list[Section]:
    tables = []
    for group in found:
        for level in (gmm.FAILURE, 1.0):
            table = intervals(group, "no truncation", values_of("real_over_model", -1), -level)
            for row in table:
                row["KL(real || model), last"] = _median(group.at(row["arm"], "real_over_model", -1))
                row["scale, last"] = _median(group.at(row["arm"], "scale", -1))
                row["energy distance, last"] = _median(group.at(row["arm"], "energy_distance", -1))
            caption = (
                f"Failure is KL(real || model) above {level:g} nats, over {group.generations} generations; "
                f"the real scale is 1."
            )
            tables.append((caption, table))
    figures.gmm(found, heading(found), folder / "gmm.png")
    return [Section("Gaussian mixtures", tables, ["gmm.png"])]


# --- Images


def of_vae(found: list[Group], folder: Path) -> list[Section]:
    tables = []
    for group in found:
        baseline = next(iter(vae.ARMS))
        level = np.mean([np.median(group.at(baseline, "frechet", index)) for index in (0, -1)])
        table = intervals(group, baseline, values_of("frechet", -1), -level)
        for row in table:
            for name, index in (("first", 0), ("last", -1)):
                for figure, form in (("frechet", ".2f"), ("class_entropy", ".2f"), ("first_encoder_spread", ".2f")):
                    row[f"{figure.replace('_', ' ')}, {name}"] = spread(group.at(row["arm"], figure, index), form)
            row["masked, first"] = f"{np.mean(group.at(row['arm'], 'masked', 0)):.0%}"
        caption = (
            f"{group.setting}: failure is a Frechet distance above {level:.2f}, midway between the ELBO's first and "
            f"last generation, over {group.generations} generations."
        )
        tables.append((caption, table))
    figures.vae(found, heading(found), folder / "vae.png")
    return [Section("Images", tables, ["vae.png"])]


# --- Language models


def of_lm(found: list[Group], folder: Path) -> list[Section]:
    order = [f"{decoder}, {data}" for data in lm.DATA for decoder in lm.DECODERS]
    found = sorted(found, key=lambda group: order.index(group.setting))
    tables = [
        (
            f"Stages until retention of split 0 falls below {published.LEVEL:.0f}%, and until KL(real || generated) "
            f"exceeds {lm.FAILURE} nats; ratios to cross-entropy of the same seeds. Median over seeds [95% interval].",
            [row for group in found for row in _lm_intervals(group)],
        ),
        (
            "The same ratios, counted otherwise. Knowledge: in synthetic splits trained on; at the midpoint of blind "
            "floor and cross-entropy's M0; 10 points below an arm's own M0. Text: at the midpoint of cross-entropy's "
            "first and last stage.",
            [row for group in found for row in _lm_other_ratios(group)],
        ),
        ("From the first stage to the last, means over seeds.", [row for group in found for row in _lm_stages(group)]),
        ("The paper's own numbers, one seed each, with the same interpolation.", _published()),
    ]
    rest = _of_arms(found, lm.LOSSES)
    ruled = [group for group in figures.main_groups(found) if set(group.arms) & set(lm.RULES)]
    if ruled:
        caption = "Rules that choose the threshold: the same ratios to fixed thresholds of the same seeds."
        tables.append((caption, [row for group in ruled for row in _lm_rules(group)]))
    pictures = {
        "lm.png": (figures.lm, rest),
        "lm-ratios.png": (figures.lm_ratios, rest),
        "lm-levels.png": (figures.lm_levels, rest),
        "lm-text.png": (figures.lm_text, rest),
        "lm-rules.png": (figures.lm_rules, ruled),
    }
    pictures = {name: picture for name, picture in pictures.items() if picture[1]}
    for name, (draw, shown) in pictures.items():
        draw(shown, heading(shown), folder / name)
    return [Section("Language models", tables, list(pictures))]


def _of_arms(found: list[Group], arms: Container[str]) -> list[Group]:
    """What the groups have of these arms."""
    chosen = [group._replace(arms={arm: runs for arm, runs in group.arms.items() if arm in arms}) for group in found]
    return [group for group in chosen if group.arms]


def _lm_intervals(group: Group) -> list[dict]:
    table = []
    baseline, level = lm.CROSS_ENTROPY, published.LEVEL / 100
    retention = measures.retention(group.config)
    for arm in group.arms:
        compared = arm != baseline and baseline in group.arms
        ours = group.sample(arm, retention)
        row = {
            "setting": group.setting,
            "arm": arm,
            "seeds": len(group.arms[arm]),
            "retention, %": " → ".join(f"{100 * ours.means[0, :, i].mean():.1f}" for i in (0, -1)),
            "knowledge, stages": fidelity.interval(group.positions(), ours, level),
            "knowledge, ratio": group.ratio(arm, baseline, retention, level) if compared else "1",
            "text, stages": "n/a",
            "text, ratio": "n/a" if compared else "1",
        }
        if group.positions("synthetic_splits")[-1]:
            text = group.sample(arm, measures.text_fidelity)
            row["text, stages"] = fidelity.interval(group.positions(), text, -lm.FAILURE)
            if compared:
                row["text, ratio"] = group.ratio(arm, baseline, measures.text_fidelity, -lm.FAILURE)
        table.append(row)
    return table


def _lm_other_ratios(group: Group) -> list[dict]:
    table = []
    baseline, level, stages = lm.CROSS_ENTROPY, published.LEVEL / 100, group.positions()
    retention = measures.retention(group.config)
    for arm in group.arms:
        if arm == baseline or baseline not in group.arms:
            continue
        ours, theirs = group.sample(arm, retention, baseline), group.sample(baseline, retention, arm)
        midpoint = (group.at(baseline, "floor", 0).mean() + theirs.means[0, :, 0].mean()) / 2
        own = [each.means[..., 0] - 0.1 for each in (ours, theirs)]
        row = {
            "setting": group.setting,
            "arm": arm,
            "knowledge, splits": "n/a",
            "knowledge, midpoint": fidelity.ratio(stages, ours, theirs, midpoint),
            "knowledge, own M0": fidelity.ratio(stages, ours, theirs, *own),
            "text, midpoint": "n/a",
        }
        splits = group.positions("synthetic_splits")
        if splits[-1]:
            row["knowledge, splits"] = fidelity.ratio(splits, ours, theirs, level)
            texts = group.sample(baseline, measures.text_fidelity).means[0].mean(0)
            row["text, midpoint"] = group.ratio(arm, baseline, measures.text_fidelity, (texts[0] + texts[-1]) / 2)
        table.append(row)
    return table


def _lm_rules(group: Group) -> list[dict]:
    measured = {
        "knowledge": (measures.retention(group.config), published.LEVEL / 100),
        "text": (measures.text_fidelity, -lm.FAILURE),
    }
    return [
        {"setting": group.setting, "arm": arm, "seeds": len(group.arms[arm])}
        | {
            f"{name}, to {fixed}": group.ratio(arm, fixed, *measure) if fixed in group.arms else "n/a"
            for name, measure in measured.items() for fixed in ("TCE 0.7", "TCE 0.9")
        }
        for arm in group.arms if arm in lm.RULES
    ]  # fmt: skip


def _lm_stages(group: Group) -> list[dict]:
    columns = {
        "masked": ("masked", ".0%"),
        "mean p": ("confidence", ".2f"),
        "threshold": ("threshold", ".2f"),
        "p > 0.9": ("above_threshold", ".0%"),
        "held-out CE": ("held_out_cross_entropy", ".2f"),
        "other splits": ("other_retention", ".0%"),
        "KL(gen || real)": ("unigram_kl_generated_real", ".2f"),
        "KL(real || gen)": ("unigram_kl_real_generated", ".2f"),
        "pairs, KL(real || gen)": ("bigram_kl_real_generated", ".2f"),
        "tokens used": ("vocabulary_used", ".0f"),
        "distinct pairs": ("distinct_pairs", ".1%"),
        "copied": ("copied", ".1%"),
    }
    table = []
    for arm in group.arms:
        row = {"setting": group.setting, "arm": arm}
        for title, (name, form) in columns.items():
            known = name in next(iter(group.arms[arm].values()))[0]
            ends = [f"{np.mean(group.at(arm, name, index)):{form}}" for index in (0, -1)] if known else ["n/a"]
            row[title] = " → ".join(ends)
        table.append(row)
    return table


def _published() -> list[dict]:
    table = []
    for cell, arms in published.RETENTION.items():
        for arm, retention in arms.items():
            row = {"model and text": cell, "arm": arm, "M0": f"{retention[0]:.1f}%", "M5": f"{retention[-1]:.1f}%"}
            for title, x in (("million tokens", published.MILLION_TOKENS), ("stages", range(6))):
                ours, theirs = (
                    fidelity.crossing(x, values, published.LEVEL).position.item()
                    for values in (retention, arms[lm.CROSS_ENTROPY])
                )
                row |= {title: f"{ours:.2f}", f"ratio, {title}": f"{ours / theirs:.2f}"}
            table.append(row)
    return table


# Of each experiment, what describes it and the order of its arms, the baseline first.
SECTIONS = {
    "gaussian": (of_gaussian, gaussian.ARMS),
    "categorical": (of_categorical, lm.LOSSES),
    "gmm": (of_gmm, gmm.ARMS),
    "vae": (of_vae, vae.ARMS),
    "lm": (of_lm, lm.LOSSES | lm.RULES),
}
