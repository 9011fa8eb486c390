"""What has been observed: sums against values by hand, readers that do not disturb each other."""

import math

import pytest
import torch

from tce_kernels import LossStats, truncated_cross_entropy
from tce_kernels.integrations.observed import N_BINS, Observed, Statistics


def stats(p, kept=None, valid=None, correct=None, entropy=None, dtype=torch.float32):
    """As a loss would say of tokens with these confidences."""
    p = torch.tensor(p, dtype=torch.float64)
    valid = torch.ones_like(p, dtype=torch.bool) if valid is None else torch.tensor(valid)
    kept = valid if kept is None else torch.tensor(kept)
    correct = kept if correct is None else torch.tensor(correct)
    log_prob = p.log().where(valid, 0.0).to(dtype)
    entropy = None if entropy is None else torch.tensor(entropy, dtype=dtype)
    counts = valid.sum(), kept.sum(), torch.ones(())
    return LossStats(log_prob, torch.zeros_like(log_prob), kept, correct, valid, *counts, entropy)


def test_by_hand():
    observed = Observed()
    observed.add(stats([[0.5, 0.25], [0.99, 1.0]], kept=[[True, True], [False, False]],
                       correct=[[True, False], [True, True]]))  # fmt: skip
    observed.add(stats([0.01, 0.7], valid=[True, False], kept=[True, False]))
    got = observed.since("test")
    p = 0.5, 0.25, 0.99, 1.0, 0.01
    mean = sum(p) / 5
    assert (got.n_tokens, got.n_calls, got.entropy) == (5, 2, None)
    assert got.truncated == 2 / 5 and got.accuracy == 4 / 5
    assert got.confidence == pytest.approx(mean, rel=1e-6)
    assert got.confidence_std == pytest.approx(math.sqrt(sum((q - mean) ** 2 for q in p) / 5), rel=1e-6)
    assert got.cross_entropy == pytest.approx(-sum(map(math.log, p)) / 5, rel=1e-6)
    assert [(i, n) for i, n in enumerate(got.histogram) if n] == [(0, 1), (5, 1), (10, 1), (19, 2)]
    assert len(got.histogram) == N_BINS


def test_each_reader_has_a_mark_of_its_own():
    observed = Observed()
    observed.add(stats([0.5, 0.5]))
    assert observed.since("a").n_tokens == 2
    observed.add(stats([0.25]))
    assert observed.since("a").confidence == pytest.approx(0.25)
    assert observed.since("b").confidence == pytest.approx(1.25 / 3)
    assert observed.since("a") == observed.since("b") == Statistics(0, 0.0, 0.0, 0.0, 0.0, 0.0, (0,) * N_BINS)


def test_nothing_observed():
    assert Observed().since("test") == Statistics(0, 0.0, 0.0, 0.0, 0.0, 0.0, (0,) * N_BINS)
    assert Observed().since("test", reduce=True).n_tokens == 0  # without other ranks
    observed = Observed()
    observed.add(stats([0.5], valid=[False], kept=[False]))
    assert observed.since("test") == Statistics(0, 0.0, 0.0, 0.0, 0.0, 0.0, (0,) * N_BINS, n_calls=1)


def test_tokens_that_are_no_numbers_are_left_out():
    observed = Observed()
    observed.add(stats([float("nan"), 0.0, 0.5], entropy=[float("nan"), float("nan"), 1.5]))  # log 0 is not finite
    got = observed.since("test")
    assert got.n_tokens == 1 and got.confidence == 0.5 and got.cross_entropy == pytest.approx(math.log(2))
    assert got.entropy == 1.5 and sum(got.histogram) == 1


def test_entropy_is_the_mean_over_the_calls_that_know_it():
    observed = Observed()
    observed.add(stats([0.5, 0.5, 0.1], entropy=[1.0, 2.0, 7.0], valid=[True, True, False], kept=[True, True, False]))
    observed.add(stats([0.5]))
    assert observed.since("test").entropy == 1.5
    observed.add(stats([0.5]))
    assert observed.since("test").entropy is None


def test_sums_do_not_lose_tokens_to_rounding():
    """float32 would stop counting at 2^24."""
    observed = Observed()
    observed.add(stats([0.5]))
    observed.sums += 2.0**25
    observed.since("test")
    observed.add(stats([0.5, 0.5, 0.5]))
    assert observed.since("test").n_tokens == 3


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_whatever_mode_comes_first(first):
    observed = Observed()
    with first():
        observed.add(stats([0.5]))
        observed.since("before")
    observed.add(stats([0.25]))
    with torch.inference_mode():
        observed.add(stats([1.0]))
    assert observed.since("test").n_tokens == 3 and observed.since("before").n_tokens == 2
    assert not observed.sums.requires_grad


def test_rows_of_any_shape_and_dtype():
    observed = Observed()
    observed.add(stats(1.0))
    observed.add(stats([0.5], dtype=torch.float64))
    got = observed.since("test")
    assert got.n_tokens == 2 and got.confidence == 0.75 and got.confidence_std == 0.25


def test_of_a_loss():
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0)) * 3
    target = torch.arange(64) % 11
    target[::5] = -100
    _, found = truncated_cross_entropy(logits, target, 0.3, return_stats=True)
    observed = Observed()
    observed.add(found)
    got = observed.since("test")
    assert got.n_tokens == found.n_valid and got.truncated == pytest.approx(found.truncated_fraction.item())
    assert got.accuracy == pytest.approx(found.accuracy.item())
    assert got.confidence == pytest.approx(found.mean_confidence.item(), rel=1e-6)
    p = found.log_prob[found.valid].exp()
    assert got.confidence_std == pytest.approx(p.std(correction=0).item(), rel=1e-5)
    assert list(got.histogram) == p.histc(N_BINS, 0, 1).tolist()
