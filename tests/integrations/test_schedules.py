"""The rules that choose thresholds, against values by hand and against the confidences themselves."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tce_kernels.integrations.observed import N_BINS, Statistics
from tce_kernels.integrations.schedules import linear, mean_plus_std, quantile


def statistics(confidences):
    """As an Observed gives them of these tokens."""
    p = np.asarray(confidences, float)
    counts = np.histogram(p, N_BINS, (0, 1))[0]
    return Statistics(len(p), 0.0, 0.0, p.mean(), p.std(), 0.0, tuple(counts.tolist()))


NOTHING = Statistics(0, 0.0, 0.0, 0.0, 0.0, 0.0, (0,) * N_BINS)
ADAPTIVE = [quantile(0.8), mean_plus_std(1.0)]


def drawn(seed, n=10000):
    return np.random.default_rng(seed).beta(0.6 + seed, 1.5, n)


def test_linear_by_hand():
    rule = linear(1, 0.6, 0.4)
    assert (rule.start, rule.end) == (1, 0.6)
    assert [rule(progress, None) for progress in (0, 0.4, 0.7, 1)] == [1, 0.6, 0.6, 0.6]
    assert rule(0.1, statistics([0.3])) == pytest.approx(0.9)
    assert rule(0.2, None) == pytest.approx(0.8)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_linear_stays_between_its_ends_and_meets_them(start, end, warmup, progress):
    rule = linear(start, end, warmup)
    assert min(start, end) * (1 - 1e-15) <= rule(progress, None) <= max(start, end) * (1 + 1e-15)
    assert rule(0, None) == start
    assert rule(max(progress, warmup), None) == end


def test_quantile_by_hand():
    """Four tokens in the third bin and one in the last: 0.8 of them is where the third bin ends."""
    p = [0.12] * 4 + [0.97]
    assert quantile(0.8)(0.0, statistics(p)) == pytest.approx(0.15)
    assert quantile(0.4)(0.0, statistics(p)) == pytest.approx(0.125)
    assert quantile(0.9)(0.0, statistics(p)) == pytest.approx(0.975)
    assert quantile(0.5)(0.0, statistics([1.0])) == pytest.approx(0.975)


def test_quantile_forgets_by_its_decay():
    """Ten tokens below, then ten above, which are 10 of 10 + 10 decay."""
    for decay, expected in ((0.0, 0.975), (0.5, 0.95 + 0.05 * (7.5 - 5) / 10), (1.0, 0.05)):
        rule = quantile(0.5, decay)
        assert rule(0.0, statistics([0.01] * 10)) == pytest.approx(0.025)
        assert rule(0.5, statistics([0.99] * 10)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.001, 0.3, 0.8, 0.999])
def test_quantile_is_that_of_the_tokens_to_a_bin(seed, keep):
    """Also when they come in parts, of any size, that count alike."""
    p = drawn(seed)
    assert abs(quantile(keep)(0.0, statistics(p)) - np.quantile(p, keep)) < 1 / N_BINS
    rule = quantile(keep, decay=1.0)
    for part in np.split(p, [1, 100, 5000]):
        found = rule(0.0, statistics(part))
    assert found == pytest.approx(quantile(keep)(0.0, statistics(p)), rel=1e-12)


def test_mean_plus_std_by_hand():
    rule = mean_plus_std(2.0, decay=0.5)
    assert rule(0.0, statistics([0.2, 0.6])) == pytest.approx(0.4 + 2 * 0.2)
    # The two count half: weights 0.5, 0.5 and 1 of 0.2, 0.6 and 0.9.
    mean = (0.1 + 0.3 + 0.9) / 2
    deviation = math.sqrt((0.5 * 0.04 + 0.5 * 0.36 + 0.81) / 2 - mean**2)
    assert rule(1.0, statistics([0.9])) == pytest.approx(mean + 2 * deviation)
    assert mean_plus_std(-1)(0.0, statistics([0.2, 0.6])) == pytest.approx(0.2)
    assert mean_plus_std(3)(0.0, statistics([0.3] * 3)) == pytest.approx(0.3)  # no deviation, not one of rounding


@pytest.mark.parametrize("seed", range(4))
def test_mean_plus_std_weighs_tokens(seed):
    """Whatever the parts that they come in, and the last ones of a decay as often as it says."""
    p, decay = drawn(seed), 0.7
    parts = np.split(p, [1, 100, 5000])
    alike, rule = mean_plus_std(1.5, decay=1.0), mean_plus_std(1.5, decay)
    for part in parts:
        found, decayed = alike(0.0, statistics(part)), rule(0.0, statistics(part))
    assert found == pytest.approx(p.mean() + 1.5 * p.std(), rel=1e-12)
    weights = np.concatenate([np.full(len(part), decay ** (3 - i)) for i, part in enumerate(parts)])
    mean = np.average(p, weights=weights)
    assert decayed == pytest.approx(mean + 1.5 * np.average((p - mean) ** 2, weights=weights) ** 0.5, rel=1e-12)


def test_it_is_the_deviation_of_tokens_not_of_batches():
    """Batches of the same mean have none between them."""
    rule = mean_plus_std(1.0, decay=1.0)
    for batch in ([0.1, 0.9], [0.4, 0.6], [0.5, 0.5]):
        found = rule(0.0, statistics(batch))
    assert found == pytest.approx(0.5 + np.std([0.1, 0.9, 0.4, 0.6, 0.5, 0.5]))


confidences = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(st.lists(confidences, min_size=1, max_size=5), st.floats(0.001, 0.999), st.floats(0, 1))
def test_a_quantile_is_a_confidence_and_grows_with_its_share(parts, keep, decay):
    lower, higher = quantile(keep, decay), quantile((1 + keep) / 2, decay)
    for part in parts:
        found = lower(0.0, statistics(part)), higher(0.0, statistics(part))
        assert 0 <= found[0] <= found[1] <= 1


@given(st.lists(confidences, min_size=1, max_size=5), st.floats(0, 3), st.floats(0, 1))
def test_mean_plus_std_lies_as_far_above_the_mean_as_below(parts, k, decay):
    above, mean, below = (mean_plus_std(sign * k, decay) for sign in (1, 0, -1))
    for part in parts:
        high, middle, low = (rule(0.0, statistics(part)) for rule in (above, mean, below))
        assert 0 <= middle <= 1 + 1e-12 and low <= middle <= high
        assert high - middle == pytest.approx(middle - low, abs=1e-9)


@pytest.mark.parametrize("rule", ADAPTIVE, ids=repr)
def test_without_tokens_the_threshold_stays(rule):
    """And what was seen is not forgotten: time without tokens is no time."""
    rule = copy.deepcopy(rule)
    assert rule(0.0, None) is None and rule(0.0, NOTHING) is None
    first = rule(0.1, statistics(drawn(0)))
    assert rule(0.2, None) is None and rule(0.3, NOTHING) is None
    undisturbed = copy.deepcopy(ADAPTIVE[[type(each) for each in ADAPTIVE].index(type(rule))])
    assert undisturbed(0.0, statistics(drawn(0))) == first
    assert rule(0.4, statistics(drawn(1))) == undisturbed(0.4, statistics(drawn(1)))


@pytest.mark.parametrize("rule", [linear(1.0, 0.7, 0.5), *ADAPTIVE], ids=repr)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_a_copy_goes_on_from_there_and_leaves_the_original_alone(rule, copied):
    rule = copy.deepcopy(rule)
    rule(0.1, statistics(drawn(0)))
    other = copied(rule)
    other(0.2, statistics(drawn(1)))
    again = copied(rule)
    assert rule(0.3, statistics(drawn(2))) == again(0.3, statistics(drawn(2)))


NAN = float("nan")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: linear(0, 1, 1), "start must be in (0, 1], got 0"),
        (lambda: linear(1, 1.1, 1), "end must be in (0, 1], got 1.1"),
        (lambda: linear(NAN, 1, 1), "start must be in (0, 1], got nan"),
        (lambda: linear(1, 1, 0), "warmup must be in (0, 1], got 0"),
        (lambda: linear(1, 1, NAN), "warmup must be in (0, 1], got nan"),
        (lambda: quantile(0), "keep must be in (0, 1), got 0"),
        (lambda: quantile(1), "keep must be in (0, 1), got 1"),
        (lambda: quantile(NAN), "keep must be in (0, 1), got nan"),
        (lambda: quantile(0.8, -0.1), "decay must be in [0, 1], got -0.1"),
        (lambda: quantile(0.8, NAN), "decay must be in [0, 1], got nan"),
        (lambda: mean_plus_std(float("inf")), "k must be finite, got inf"),
        (lambda: mean_plus_std(NAN), "k must be finite, got nan"),
        (lambda: mean_plus_std(1, 1.5), "decay must be in [0, 1], got 1.5"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda value: linear(value, 1, 1), "start"),
        (lambda value: linear(1, value, 1), "end"),
        (lambda value: linear(1, 1, value), "warmup"),
        (lambda value: quantile(value), "keep"),
        (lambda value: quantile(0.8, value), "decay"),
        (lambda value: mean_plus_std(value), "k"),
        (lambda value: mean_plus_std(1, value), "decay"),
    ],
)
@pytest.mark.parametrize("value, kind", [(True, "bool"), ("0.5", "str"), (None, "NoneType"), (0.5j, "complex")])
def test_what_is_no_number(make, name, value, kind):
    with pytest.raises(TypeError, match=f"^{name} must be a number, got {kind}$"):
        make(value)
