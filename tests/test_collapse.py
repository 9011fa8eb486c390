"""The collapse laboratory: crossings and ratios, resumed runs, what the small models compute."""

import importlib.util
import re

import numpy as np
import pytest
import torch

NEEDED = ("matplotlib", "scipy", "sklearn", "tabulate", "tokenizers", "tqdm")
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if ABSENT:
    pytest.skip(f"{', '.join(ABSENT)} not installed, which the collapse laboratory needs", allow_module_level=True)

from benchmarks import report
from benchmarks.collapse import (
    categorical,
    command,
    corpus,
    decoding,
    engine,
    fidelity,
    gaussian,
    gmm,
    lm,
    measures,
    published,
    summary,
    vae,
)
from benchmarks.training.transformer import LanguageModel


@pytest.fixture(autouse=True)
def one_thread_of_the_cpu(monkeypatch):
    """As in the engine's processes where there is no GPU, whatever else has the cores."""
    monkeypatch.setattr(report, "default_device", lambda: torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_papers_table_gives_the_papers_intervals():
    """38.1 and 90.7 million tokens are in its text, 91.4 is in its figure; 68.1 follows from its table."""
    table = published.RETENTION["LLaMA-3.2-1B, Wikitext"]
    found = {
        arm: fidelity.crossing(published.MILLION_TOKENS, retention, published.LEVEL).position.item()
        for arm, retention in table.items()
    }
    expected = {"cross-entropy": 38.1, "TCE 0.9": 90.7, "TCE 0.99": 68.1, "focal 2": 91.4}
    assert {arm: round(position, 1) for arm, position in found.items()} == expected


def test_crossings():
    curves = [[1, 0.5, 0], [1, 1, 1], [0.2, 1, 1], [1, 0.5, 0.9], [1, 0.75, 0.5], [1, 0.75, 1]]
    position, censored = fidelity.crossing([0, 1, 3], curves, 0.75)
    assert position.tolist() == [0.5, 3, 0, 0.5, 1, 3]
    assert censored.tolist() == [False, True, False, False, False, True]


def falling(slope):
    """(4 seeds, 11 generations, 200 items) of truth values, a share 1 - slope * generation of them true."""
    difficulty = (np.arange(200) + 0.5) / 200
    right = difficulty < 1 - slope * np.arange(11)[:, None]
    return np.stack([right] * 4)


def test_a_ratio_of_known_curves():
    """One arm falls half as fast."""
    positions = np.arange(11)
    slow, fast = (fidelity.resample(falling(slope)) for slope in (0.05, 0.1))
    found = fidelity.ratio(positions, slow, fast, 0.75)
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(2)  # 5 / 2.5
    assert 1.6 < found.low and found.high < 2.5  # both arms have the same 200 items
    assert not found.at_least
    same = fidelity.ratio(positions, fast, fast, 0.75)
    assert tuple(same) == (1, 1, 1, False)


def test_censored_runs():
    positions = np.arange(11)
    slow, fast = (fidelity.resample(falling(slope)) for slope in (0.001, 0.1))
    bound = fidelity.ratio(positions, slow, fast, 0.75)
    assert bound.at_least
    assert bound.median == pytest.approx(4)  # 10 / 2.5
    assert np.isnan(fidelity.ratio(positions, fast, slow, 0.75).median)


def test_seeds_that_start_below_the_level_have_no_ratio():
    """One of two: the other one is the median, and draws of the first alone do not count."""
    curves = np.array([[0.9, 0.7, 0.5], [0.7, 0.6, 0.5]])
    found = fidelity.ratio([0, 1, 2], fidelity.resample(curves + 0.1), fidelity.resample(curves), 0.75)
    assert tuple(found) == (pytest.approx(1.25 / 0.75),) * 3 + (False,)


def test_the_band_has_two_sides():
    assert (fidelity.within(np.array([0.4, 0.6, 1, 1.9, 2.1]), 0.5, 2) >= 0).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


def random_walk():
    def begin(run, shared):
        return torch.zeros(3)

    def advance(run, state, generation):
        state = state + torch.randn(3, generator=torch.Generator().manual_seed(run.seed + generation))
        return state, dict(position=generation, total=state.sum().item())

    return engine.Experiment(begin, advance)


class Killed(Exception):
    pass


@pytest.mark.parametrize("last", [4, 5])
@pytest.mark.parametrize("moment", ["in a generation", "before the state is saved", "before the figures are saved"])
def test_a_killed_run_goes_on_and_ends_the_same(moment, last, tmp_path, monkeypatch):
    run = engine.Run("walk", "a setting", "an arm", 3, 6, {})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    engine.perform(random_walk(), run, whole)
    begin, advance = random_walk()
    begun = []

    def recorded(run, state, generation):
        begun.append(generation)
        if moment == "in a generation" and begun == list(range(last + 1)):
            raise Killed
        return advance(run, state, generation)

    def killed_replace(path, write):
        if begun[-1] == last and (path.suffix == ".pt") == (moment == "before the state is saved"):
            raise Killed
        original(path, write)

    original = engine.replace
    with monkeypatch.context() as patched:
        if moment != "in a generation":
            patched.setattr(engine, "replace", killed_replace)
        with pytest.raises(Killed):
            engine.perform(engine.Experiment(begin, recorded), run, resumed)
    begun.clear()
    engine.perform(engine.Experiment(begin, recorded), run, resumed)
    assert run.path(resumed).read_text() == run.path(whole).read_text()
    saved = moment == "before the figures are saved"  # the state, and with it the figures
    assert begun == list(range(last + saved, 6))
    assert not list(engine.scratch(resumed).rglob("*.pt*"))
    engine.perform(engine.Experiment(None, None), run, resumed)  # nothing is left to do


def test_lost_data_is_an_error(tmp_path):
    run = engine.Run("walk", "a setting", "an arm", 3, 6, {})
    engine.perform(random_walk(), run, tmp_path)
    path = run.path(tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(engine.Missing, match="has 4 of 6 generations.*delete"):
        engine.perform(random_walk(), run, tmp_path)


def test_other_configurations_have_other_files(tmp_path):
    run = engine.Run("walk", "a setting", "an arm", 3, 6, {"n": 1}, {"gamma": 0.9})
    others = [
        run._replace(generations=7), run._replace(config={"n": 2}), run._replace(options={"gamma": 0.8}),
        run._replace(seed=4), run._replace(arm="b"), run._replace(setting="c"),
    ]  # fmt: skip
    assert len({each.path(tmp_path) for each in [run, *others]}) == 7


def test_figure_2_is_reproduced_with_the_models_quantile():
    """The curve labelled 0.85 is that of 0.83, and the samples' own quantile gives neither."""
    n_seeds = 8

    def curves(setting, arm):
        found = []
        for run in gaussian.runs(True, n_seeds):
            if (run.setting, run.arm) == (setting, arm):
                state, sigmas = gaussian.begin(run, None), []
                for generation in range(run.generations):
                    state, figures = gaussian.advance(run, state, generation)
                    sigmas.append(figures["sigma"])
                found.append(sigmas)
        return np.array(found)[:, published.FIGURE_2_GENERATIONS]

    def agrees(setting, arm, label):
        """Within three standard deviations of a single run, which is what the figure shows, and its line's width."""
        found = curves(setting, arm)
        return bool((abs(found.mean(0) - published.FIGURE_2[label]) < 3 * found.std(0) + 0.005).all())

    assert agrees(gaussian.MODEL, "all samples", "all samples")
    assert agrees(gaussian.MODEL, "gamma 0.83", "TCE 0.85")
    assert agrees(gaussian.MODEL, "gamma 0.80", "TCE 0.80")
    assert not agrees(gaussian.MODEL, "gamma 0.85", "TCE 0.85")
    assert not agrees(gaussian.SAMPLES, "gamma 0.85", "TCE 0.85")
    assert not agrees(gaussian.SAMPLES, "gamma 0.80", "TCE 0.80")


@pytest.mark.parametrize("definition", [gaussian.MODEL, gaussian.SAMPLES])
def test_the_variance_follows_lambda_squared(definition):
    """Over 49 generations: the standard error is about 0.02 (of a log-variance) * 7 (of their sum) / 49 / sqrt(8).

    That is 0.001; lambda instead of lambda^2 is off by 0.1.
    """
    logs = []
    for run in gaussian.runs(True, 8):
        if (run.setting, run.arm) == (definition, "gamma 0.80"):
            first = state = gaussian.advance(run, 1.0, 0)[0]
            for generation in range(1, 50):
                state, _ = gaussian.advance(run, state, generation)
            logs.append(2 * np.log(state / first) / 49)
    predicted = np.log(gaussian.variance_factor(0.8, gaussian.BIAS, definition))
    assert np.mean(logs) == pytest.approx(predicted, abs=0.005)
    assert abs(predicted - np.log(gaussian.variance_factor(0.8, gaussian.BIAS, definition) / gaussian.BIAS)) > 0.1


def test_stochastic_gradients_find_the_cap():
    """For contexts above, near and below the threshold; drawn targets, so only in the mean over steps.

    Over seeds, the largest error is 4e-4 to 9e-4; what is nearest to the threshold is moved by 5e-3.
    """
    q = torch.tensor([[0.97, 0.02, 0.01], [0.905, 0.09, 0.005], [0.5, 0.3, 0.2]], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def draw():
        targets = torch.multinomial(q, 1024, replacement=True, generator=random)
        return torch.arange(len(q)).repeat_interleave(1024), targets.flatten()

    found = categorical.descend(torch.zeros(3, 3), draw, ("truncated", 0.9), 2000)
    expected = categorical.cap(q, 0.9)
    torch.testing.assert_close(expected[0], torch.tensor([0.9, 0.2 / 3, 0.1 / 3], dtype=torch.float64))
    torch.testing.assert_close(expected[2], q[2])
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(categorical.cap(expected, 0.9), expected)


def test_dropping_the_densest_points_widens_a_gaussian():
    """1 - ln gamma, on a million points: the standard error of the ratio is about 0.001."""
    squared_radius = np.square(np.random.default_rng(0).standard_normal((1_000_000, 2))).sum(1)
    kept = squared_radius[squared_radius >= np.quantile(squared_radius, 0.2)]
    assert kept.mean() / squared_radius.mean() == pytest.approx(1 - np.log(0.8), abs=0.005)


def test_scale_and_energy_distance():
    x = np.random.default_rng(0).standard_normal((4000, 2)) * [3, 1]
    assert gmm.scale(gmm.fit(x, 0)) == pytest.approx(np.sqrt(np.square(x - x.mean(0)).sum(1).mean() / 2), rel=1e-3)
    assert gmm.energy_distance(x[:500], x[:500]) == 0
    assert gmm.energy_distance(np.zeros((3, 2)), np.ones((3, 2))) == pytest.approx(2 * np.sqrt(2))


V, CONTEXT = 60, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LanguageModel(V, CONTEXT, D=32, n_blocks=2, n_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from equal probabilities
    return model


def log_probs(model, tokens):
    return model.head(model(tokens))[:, -1].log_softmax(-1)


def test_the_cache_changes_nothing(model):
    tokens = torch.randint(V, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    hidden, caches = model.extend(tokens[:, :5], [None, None])
    parts = [hidden]
    for i in range(5, CONTEXT):
        hidden, caches = model.extend(tokens[:, i : i + 1], caches)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-4)


def rewritten(model, split, decoder):
    noise = torch.rand(len(split) // 8, 8, generator=torch.Generator().manual_seed(1))
    return decoding.rewrite(model, split, decoder, 8, 8, noise).view(-1, 8), noise


@pytest.fixture
def split():
    return torch.randint(V, (80,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_greedy_decoding_and_prompts(model, split, monkeypatch):
    monkeypatch.setattr(decoding, "AT_ONCE", 4)  # several batches, the last one smaller
    found, _ = rewritten(model, split, decoding.DECODERS["greedy"])
    for i, block in enumerate(found):
        tokens = split.roll(8 - 8 * i)[None, :8]  # the old text before the block, whose beginning follows its end
        for token in block:
            assert log_probs(model, tokens)[0].argmax() == token
            tokens = torch.cat([tokens, token.view(1, 1)], 1)


@torch.no_grad()
def test_sampling_follows_the_tempered_distribution(model, split):
    found, noise = rewritten(model, split, decoding.Decoder(temperature=0.7))
    tokens = split.roll(8).view(-1, 8)
    for i in range(8):
        below = (log_probs(model, tokens) / 0.7).softmax(-1).cumsum(-1)
        inside = (below.gather(1, found[:, i : i + 1]) >= noise[:, i : i + 1] - 1e-5).all()
        lower = torch.cat([torch.zeros(len(below), 1), below], 1).gather(1, found[:, i : i + 1])
        assert inside and (lower <= noise[:, i : i + 1] + 1e-5).all()
        tokens = torch.cat([tokens, found[:, i : i + 1]], 1)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_beam_search_against_a_search_without_cache(model, split, penalty):
    beams = 3
    found, _ = rewritten(model, split, decoding.Decoder(0.0, beams, penalty))
    for i, block in enumerate(found):
        hypotheses = [(0.0, split.roll(8 - 8 * i)[:8])]
        for _ in range(8):
            extended = []
            for score, tokens in hypotheses:
                step = log_probs(model, tokens[None])[0]
                step[tokens.unique()] *= penalty  # log-probabilities are negative
                extended += [(score + step[v].item(), torch.cat([tokens, torch.tensor([v])])) for v in range(V)]
            hypotheses = sorted(extended, key=lambda pair: -pair[0])[:beams]
        assert torch.equal(hypotheses[0][1][8:], block)


def test_items_differ_in_one_word():
    text = corpus.read((), corpus.identity(())["sha256"])
    found = corpus.split(text, 512, 3, 4096, 80, 10, 24, 44)
    tokens, ends = found.items.tokens, found.items.ends
    assert tokens.shape[:2] == (80, 2) and found.other_items.tokens.shape[:2] == (30, 2)
    assert tokens.shape[2] <= 44
    assert torch.equal(tokens[:, 0, :24], tokens[:, 1, :24])
    assert not (tokens[:, 0] == tokens[:, 1]).all(-1).any()
    first = " ".join(map(str, found.splits[0].tolist()))
    for (real, false), (end, false_end) in zip(tokens, ends, strict=True):
        assert f" {' '.join(map(str, real[:end].tolist()))} " in f" {first} "  # of split 0, word for word
        after = min(end, false_end) - 25  # the rest is the same, and at least one token of the word differs
        same = (real[:end].flip(0)[:after] == false[:false_end].flip(0)[:after]).int().cumprod(0).sum()
        assert same >= 3  # three more words follow
    with pytest.raises(ValueError, match="must have at least"):
        corpus.split(text, 512, 3, 4096, 5000, 10, 24, 44)
    with pytest.raises(ValueError, match="corpus must have at least"):
        corpus.split(text, 512, 3, 10**6, 100, 10, 24, 44)


def test_a_changed_corpus_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one")
    identity = corpus.identity((str(path),))
    path.write_text("two")
    with pytest.raises(ValueError, match="has changed"):
        corpus.read((str(path),), identity["sha256"])


# Few items: how many a split has depends on the documentation that this Python carries.
TINY = lm.Config(
    vocabulary=300, D=16, n_blocks=1, n_heads=2, context=48, epochs=2, n_splits=2, split_tokens=1024,
    prompt=16, block=16, n_items=6, n_other_items=3, item_context=20,
)  # fmt: skip


def tiny_run(arm, data, **changes):
    config = TINY._replace(**corpus.identity(()), **changes)
    return lm.runs(config, [arm], ["T=1"], [data], 1)[0]


def performed(run, folder):
    engine.perform(lm.EXPERIMENT, run, folder)
    return report.load(run.path(folder))[1]


def test_data_arms_train_on_what_they_say(tmp_path, monkeypatch):
    trained_on = []
    fit = lm._fit

    def recorded(model, tokens, *arguments):
        trained_on.append(tokens.clone())
        return fit(model, tokens, *arguments)

    monkeypatch.setattr(lm, "_fit", recorded)
    for data in lm.DATA:
        performed(tiny_run("cross-entropy", data), tmp_path)
    real = lm._corpus(TINY._replace(**corpus.identity(()))).splits
    assert len(trained_on[0]) > 4 * real.numel() / 5  # the pretraining, once for all arms
    stages = [tokens.view(-1, 1024) for tokens in trained_on[1:]]
    replaced, accumulated, synthetic, kept = stages[:2], stages[2:4], stages[4:12], stages[12:]
    for first in (replaced[0], accumulated[0], synthetic[0], kept[0]):
        assert torch.equal(first, real[:1])
    assert torch.equal(replaced[1][1], real[1])
    rewriting = replaced[1][0]
    assert (rewriting == real[0]).double().mean() < 0.5
    assert torch.equal(accumulated[1], torch.stack([rewriting, real[0], real[1]]))
    assert torch.equal(synthetic[1], rewriting[None])
    assert len(synthetic[2]) == 1 and not torch.equal(synthetic[2], synthetic[1])
    assert torch.equal(kept[1], real)


def test_arms_share_everything_but_the_loss(tmp_path):
    """Truncation at 1 is cross-entropy; the other losses give other models from the same start."""
    lm.LOSSES["TCE 1"] = lm.truncated(1.0)
    try:
        rows = {arm: performed(tiny_run(arm, lm.PAPER), tmp_path) for arm in lm.LOSSES}
    finally:
        del lm.LOSSES["TCE 1"]
    assert rows["TCE 1"] == rows["cross-entropy"]
    last = {arm: row[-1]["held_out_cross_entropy"] for arm, row in rows.items() if arm != "TCE 1"}
    truncating = [arm for arm, row in rows.items() if row[-1]["masked"]]
    assert set(truncating) <= {f"TCE {t}" for t in (0.7, 0.8, 0.9, 0.95, 0.99)} | {
        "TCE 0.9 / kept", "random mask 0.9", "random mask 0.7",
    }  # fmt: skip
    assert last["focal 2"] != last["cross-entropy"] != last["label smoothing 0.1"]
    assert all(row[0]["floor"] == rows["cross-entropy"][0]["floor"] for row in rows.values())


def test_a_random_mask_drops_as_many_tokens_as_truncation():
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 8), 2 * torch.randn(20, 8)
    hidden.requires_grad_()
    target = (hidden @ weight.T).argmax(-1)
    _, truncated = lm.truncated(0.9)(hidden, weight, target)
    loss, masked = lm.LOSSES["random mask 0.9"](hidden, weight, target)
    assert 50 < masked.n_kept < 450
    assert masked.n_kept == truncated.n_kept
    assert not torch.equal(masked.kept, truncated.kept)
    expected = torch.where(masked.kept, -masked.log_prob, 0).sum() / 500
    torch.testing.assert_close(loss, expected)


def test_a_rule_sets_the_threshold_from_the_batches_before():
    torch.manual_seed(0)
    hidden, weight = torch.randn(500, 8), 2 * torch.randn(20, 8)
    target = (hidden @ weight.T).argmax(-1)
    values, seen = iter([None, 0.8, 0.1, 7.0]), []

    def rule(progress, statistics):
        seen.append(statistics)
        return next(values)

    scheduled = lm.Scheduled(rule)
    for threshold in (0.9, 0.8, 0.5, 1.0):  # the start, what the rule says, the floor, the ceiling
        _, got = scheduled(hidden, weight, target)
        _, want = lm.truncated(threshold)(hidden, weight, target)
        assert scheduled.threshold == torch.tensor(threshold) and torch.equal(got.kept, want.kept)
    assert [statistics.n_tokens for statistics in seen] == [0, 500, 500, 500]
    assert seen[1].confidence == pytest.approx(got.mean_confidence.item(), rel=1e-6)
    assert seen[2].truncated != seen[3].truncated


def test_rules_begin_anew_at_each_stage(tmp_path, monkeypatch):
    """So a run that was stopped in between is the same as one that was not."""
    monkeypatch.setattr(lm.Scheduled, "AT_LEAST", 0.01)  # a tiny model is never confident

    def stopped(run, state, stage):
        if stage == 2:
            raise KeyboardInterrupt
        return lm.advance(run, state, stage)

    for arm in lm.RULES:
        run = tiny_run(arm, lm.SYNTHETIC)._replace(generations=4)
        with pytest.raises(KeyboardInterrupt):
            engine.perform(engine.Experiment(lm.begin, stopped), run, tmp_path)
        rows = performed(run, tmp_path)
        run.path(tmp_path).unlink()
        assert performed(run, tmp_path) == rows
        thresholds = [row["threshold"] for row in rows]
        assert len(set(thresholds)) == len(thresholds) and all(0.01 <= t < 0.9 for t in thresholds)
        assert lm.RULES[arm].threshold == torch.tensor(lm.Scheduled.START)  # the arm itself has seen nothing
        assert all(row["masked"] > 0 for row in rows)


def test_saved_items_come_back(tmp_path):
    rows = performed(tiny_run("cross-entropy", lm.REAL, n_items=9), tmp_path)
    bits = measures.retention({"n_items": 9})(rows)
    assert bits.shape == (2, 9)
    assert bits.mean(1).tolist() == pytest.approx([row["retention"] for row in rows])


def test_a_model_that_knows_the_text_has_the_items_right():
    """And one that knows the false words has none, whatever the lengths; scores are of the words asked for alone."""
    text = corpus.read((), corpus.identity(())["sha256"])
    items = corpus.split(text, 300, 2, 1024, 6, 3, 20, 48).items
    torch.manual_seed(0)
    model = LanguageModel(300, 48, D=64, n_blocks=1, n_heads=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    known = items.tokens[:, 0]
    for _ in range(80):
        logits = model.head(model(known[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), known[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measures.correct(model, items).all()
    swapped = items._replace(tokens=items.tokens.flip(1), ends=items.ends.flip(1))
    assert not measures.correct(model, swapped).any()


def test_text_figures():
    """Against counts by hand: two kinds of tokens, one of them gone."""
    real, generated = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), torch.zeros(8, dtype=torch.long)
    found = measures.text_figures(generated, real, 5)
    p, q = np.array([8.5, 0.5]) / 9, np.array([4.5, 4.5]) / 9
    assert found["unigram_kl_generated_real"] == pytest.approx((p * np.log(p / q)).sum())
    assert found["unigram_kl_real_generated"] == pytest.approx((q * np.log(q / p)).sum())
    assert found["vocabulary_used"] == 1
    assert found["distinct_pairs"] == pytest.approx(1 / 7)
    assert found["copied"] == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gmm", "--arms", "TCE 0.9"], "--arms, --decoders and --data are for lm"),
        (["lm", "--arms", "TCE 2"], "invalid choice"),
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["lm", "--corpus", "no-such-file.txt"], "--corpus must name text files, got no-such-file.txt"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_refused_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path / "benchmarks")
    return tmp_path / "benchmarks" / "results" / "cpu" / "quick" / "collapse"


def test_a_short_corpus_is_refused(results, tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("A few words only. " * 200)
    assert command.main(["lm", "--corpus", str(path), "--jobs", "1"]) == 1
    assert "lm: the corpus must have at least" in capsys.readouterr().out


def test_nothing_to_report(results, capsys):
    assert command.main(["report"]) == 1
    assert "No finished runs" in capsys.readouterr().out


def test_the_command_runs_resumes_and_reports(results, capsys):
    """Two processes; the second call finds everything done, and says the same."""
    assert command.main(["gaussian", "--seeds", "2", "--jobs", "2"]) == 0
    first = capsys.readouterr().out
    files = {path: path.read_bytes() for path in results.rglob("*.csv")}
    assert len(files) == 24
    assert "lambda^2 eta" in first
    assert (results / "gaussian.png").exists() and (results / "report.md").exists()
    assert command.main(["gaussian", "--seeds", "2", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == first
    assert files == {path: path.read_bytes() for path in results.rglob("*.csv")}


def test_both_readings_of_truncated_images():
    logits, x = torch.tensor([[4.0, 0.0], [-4.0, 3.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    per_pixel = torch.nn.functional.softplus(-logits)
    whole, kept = vae._reconstruction(logits, x, None, 1.0)
    torch.testing.assert_close(whole, per_pixel.sum(1))
    assert kept.all()
    pixels, kept = vae._reconstruction(logits, x, "pixel", 0.9)  # p is 0.98, 0.5, 0.02, 0.95
    assert kept.tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(pixels, torch.stack([per_pixel[0, 1], per_pixel[1, 0]]))
    images, kept = vae._reconstruction(logits, x, "image", 0.5)
    assert kept.tolist() == [False, True]
    torch.testing.assert_close(images, torch.stack([torch.tensor(0.0), whole[1]]))
    grey, kept = vae._reconstruction(torch.tensor([[4.0]]), torch.tensor([[0.5]]), "pixel", 0.9)
    assert kept.all()  # p = 0.5 for a grey pixel, whatever the model says


COMMITTED = report.ROOT / "results" / "cpu" / "collapse"


def without_intervals(text):
    """Nor the widths of columns. Bootstrap intervals follow numpy's random numbers, which may change with it."""
    return re.sub(r" |-+\||\[[\d., -]*\]", "", text)


def test_the_committed_report_follows_from_the_committed_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for path in COMMITTED.rglob("*.csv"):
        copy = tmp_path / path.relative_to(COMMITTED)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for name in ("gaussian", "categorical", "gmm", "vae", "lm", "lm_ratios", "lm_levels", "lm_text", "lm_rules"):
        monkeypatch.setattr(summary.figures, name, lambda *arguments: None)  # takes longer than the tables
    monkeypatch.setattr(fidelity, "DRAWS", 10)  # of the intervals, which are not compared
    assert summary.make(tmp_path) == 0
    assert without_intervals((tmp_path / "report.md").read_text()) == without_intervals(
        (COMMITTED / "report.md").read_text()
    )


def sections(path, *headings):
    found = [part for part in re.split(r"\n#+ ", path.read_text()) if part.splitlines()[0] in headings]
    assert len(found) == len(headings)
    return "\n".join(found)


# Thresholds, temperatures, levels, numbers of the paper's text and of the model: no results.
SETTINGS = set("0.1 0.4 0.5 0.7 0.8 0.80 0.83 0.85 0.9 0.95 0.99 1.5 2.3".split())


def test_the_readmes_say_what_the_report_says():
    """Rows of tables as they stand there, and every figure with decimals outside them."""
    known = (COMMITTED / "report.md").read_text()
    rows = {line.replace(" ", "") for line in known.splitlines()}
    figures = set(re.findall(r"\d+\.\d+", known))
    results = (
        "Result", "Rules that choose the threshold", "What it supports, and what not", "What to do with it",
        "The other experiments",
    )  # fmt: skip
    for text in (
        sections(report.ROOT / "collapse" / "README.md", *results),
        sections(report.ROOT / "README.md", "Collapse"),
    ):
        lines = text.splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert {line.replace(" ", "") for line in table if not line.startswith("|--")} <= rows
        prose = "\n".join(line for line in lines if not line.startswith("|"))
        claims = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose)) - SETTINGS
        assert len(claims) > 3
        assert claims <= figures, claims - figures
