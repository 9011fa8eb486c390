"""The reference against the definition: finite differences, torch.nn.functional, and formulas written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import make_inputs
from torch.autograd import gradcheck, gradgradcheck

from tce_kernels import reference

OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 0.1},
    {"reduction": "none", "softcap": 3.0, "logit_scale": 1.7},
    {"denominator": "kept", "token_weight": torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5], dtype=torch.float64)},
    {"weight": torch.linspace(0.1, 2, 7, dtype=torch.float64)},
]
RULES = {
    "cross-entropy": lambda x, t, **o: reference.truncated_cross_entropy(x, t, 1.0, **o),
    "truncated": lambda x, t, **o: reference.truncated_cross_entropy(x, t, 0.6, **o),
    "smoothed": lambda x, t, **o: reference.truncated_cross_entropy(x, t, 0.6, label_smoothing=0.2, **o),
    "focal": lambda x, t, **o: reference.focal_cross_entropy(x, t, 2.0, alpha=0.7, **o),
    "focal below 1": lambda x, t, **o: reference.focal_cross_entropy(x, t, 0.5, **o),
}


def inputs():
    logits, target = make_inputs(5, 7, torch.float64, "cpu")
    return (logits / 4).requires_grad_(), target  # not so confident that finite differences see nothing


@pytest.mark.parametrize(
    "rule, options",
    [(rule, options) for rule in RULES for options in OPTIONS if not (rule == "smoothed" and "weight" in options)],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_first_and_second_derivatives_by_finite_differences(rule, options):
    logits, target = inputs()
    assert gradcheck(lambda x: RULES[rule](x, target, **options), logits)
    assert gradgradcheck(lambda x: RULES[rule](x, target, **options), logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.3}])
def test_equals_torch_where_the_two_overlap(reduction, options):
    logits, target = make_inputs(40, 300, torch.float64, "cpu")
    if "weight" in options:
        options = {"weight": torch.rand(300, dtype=torch.float64)}
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    value = reference.truncated_cross_entropy(ours, target, 1.0, reduction=reduction, **options)
    want = F.cross_entropy(theirs, target, reduction=reduction, **options)
    torch.testing.assert_close(value, want, rtol=4e-15, atol=4e-15)
    upstream = torch.rand_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(value, ours, upstream), torch.autograd.grad(want, theirs, upstream), rtol=1e-14, atol=1e-16
    )


def test_truncated_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.05, 0.9, 0.05]], dtype=torch.float64)
    target = torch.tensor([0, 2, 1])
    loss = reference.truncated_cross_entropy(p.log(), target, 0.6, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0, -math.log(0.4), 0], dtype=torch.float64))
    mean = reference.truncated_cross_entropy(p.log(), target, 0.6)
    torch.testing.assert_close(mean, torch.tensor(-math.log(0.4) / 3, dtype=torch.float64))
    kept = reference.truncated_cross_entropy(p.log(), target, 0.6, denominator="kept")
    torch.testing.assert_close(kept, torch.tensor(-math.log(0.4), dtype=torch.float64))


def test_p_equal_to_the_threshold_is_kept():
    logits = torch.zeros(1, 4, dtype=torch.float64)  # p = 1/4, exactly
    for threshold, kept in [(0.25, True), (math.nextafter(0.25, 0), False)]:
        _, stats = reference.truncated_cross_entropy(logits, torch.tensor([1]), threshold, return_stats=True)
        assert stats.kept.item() is kept


def test_focal_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    loss = reference.focal_cross_entropy(p.log(), torch.tensor([0, 2]), 3.0, alpha=0.5, reduction="none")
    want = [-0.5 * 0.3**3 * math.log(0.7), -0.5 * 0.6**3 * math.log(0.4)]
    torch.testing.assert_close(loss, torch.tensor(want, dtype=torch.float64))


def test_options_by_hand():
    """z-loss, scale, softcap and weights, each against the formula."""
    logits, target = make_inputs(6, 9, torch.float64, "cpu")
    live = target != -100
    z = 4.0 * torch.tanh(1.5 * logits / 4.0)
    lse = z.logsumexp(-1)
    nll = lse - z.gather(1, target.clamp(0)[:, None]).squeeze(1)
    token_weight = torch.rand(6, dtype=torch.float64)
    want = (token_weight * (nll + 0.1 * lse**2))[live].sum() / token_weight[live].sum()
    value = reference.truncated_cross_entropy(
        logits, target, 1.0, z_loss=0.1, softcap=4.0, logit_scale=1.5, token_weight=token_weight
    )
    torch.testing.assert_close(value, want)
    value = reference.truncated_cross_entropy(logits, target, 1.0, denominator=12.5)
    torch.testing.assert_close(value, F.cross_entropy(logits, target, reduction="sum") / 12.5)
