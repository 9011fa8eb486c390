"""What is computed: options by name, and calls drawn at random."""

import random

import torch

from .calls import LOGITS, REPLICATED, SHARDED, Call, V

OPTIONS = {
    "cross-entropy": {"threshold": 1.0},
    "truncated": {"threshold": 0.5},
    "nothing kept": {"threshold": 1e-30},
    "threshold in a tensor": {"threshold": torch.tensor(0.5)},
    "focal": {"gamma": 2.0, "alpha": 0.7},
    "smoothing": {"threshold": 0.5, "label_smoothing": 0.1},
    "z-loss": {"threshold": 0.5, "z_loss": 1e-2},
    "softcap and scale": {"threshold": 0.3, "softcap": 30.0, "logit_scale": 1.3},
    "class weights": {"threshold": 0.5, "weight": True},
    "token weights": {"threshold": 0.5, "token_weight": True},
    "both weights, focal": {"gamma": 1.5, "weight": True, "token_weight": True},
    "by what is kept": {"threshold": 0.5, "denominator": "kept"},
    "by what is kept, weighted": {"threshold": 0.5, "denominator": "kept", "weight": True, "token_weight": True},
    "nothing kept, by what is kept": {"threshold": 1e-30, "denominator": "kept"},
    "a number": {"threshold": 0.5, "denominator": 41},
    "a tensor": {"threshold": 0.5, "denominator": torch.tensor(41.0)},
    "zero": {"threshold": 0.5, "denominator": 0},
    "sum": {"threshold": 0.5, "reduction": "sum"},
    "none": {"threshold": 0.5, "reduction": "none"},
    "none, focal": {"gamma": 2.0, "reduction": "none", "z_loss": 1e-2},
    "two backwards": {"threshold": 0.5, "allow_retain_graph": True},
    "no statistics": {"threshold": 0.5, "return_stats": False},
    "entropy": {"threshold": 0.5, "return_stats": "entropy"},
    "entropy, everything": {
        "threshold": 0.3, "z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 1.3,
        "token_weight": True, "return_stats": "entropy",
    },
    "entropy, none": {"gamma": 2.0, "reduction": "none", "return_stats": "entropy"},
    "another ignore_index": {"threshold": 0.5, "ignore_index": V - 1},
    "ignored beyond int32": {"threshold": 0.5, "ignore_index": 2**40},
    "everything": {
        "threshold": 0.3, "z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 1.3,
        "token_weight": True, "denominator": torch.tensor(23.0),
    },
    "everything, none": {
        "threshold": 0.3, "z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 1.3,
        "token_weight": True, "reduction": "none",
    },
}  # fmt: skip
OPTIONS = {name: {"return_stats": True} | options for name, options in OPTIONS.items()}


def drawn(number: int) -> tuple[int, Call]:
    """(p, call) number so-and-so of the random ones."""
    random_ = random.Random(number)
    p = random_.choice((2, 3, 4))
    way = random_.choice((LOGITS, REPLICATED, SHARDED))
    linear = way != LOGITS
    sizes = [random_.choice((0, 1, random_.randrange(1, 90))) for _ in range(p)]
    sizes[random_.randrange(p)] += 40
    counts = [random_.choice((0, 1, random_.randrange(1, 20))) for _ in range(p)] if way == SHARDED else []
    n_rows = sum(counts) if way == SHARDED else random_.choice((0, 1, random_.randrange(2, 50)))

    threshold, gamma = random_.uniform(0.1, 1), random_.uniform(0, 4)
    rule = random_.choice(({"threshold": threshold}, {"threshold": 1.0}, {"gamma": gamma}))
    options = dict(rule, return_stats=random_.random() < 0.8)

    def maybe(probability, name, value):
        if random_.random() < probability:
            options[name] = value

    maybe(0.3, "weight", True)
    maybe(0.3, "token_weight", True)
    maybe(0.3, "z_loss", random_.uniform(0, 0.1))
    maybe(0.3, "softcap", random_.uniform(4, 30))
    maybe(0.3, "logit_scale", random_.uniform(0.5, 1.5))
    maybe(0.2, "allow_retain_graph", True)
    maybe(0.2, "ignore_index", random_.choice((-1, 5, -(2**62))))
    if "gamma" not in options and "weight" not in options:
        maybe(0.4, "label_smoothing", random_.uniform(0, 1))
    options["reduction"] = random_.choice(("mean", "mean", "sum", "none"))
    if options["reduction"] == "mean":
        options["denominator"] = random_.choice(("valid", "kept", 7.5, torch.tensor(11)))
    if linear:
        maybe(0.7, "chunk_size", random_.choice((1, 3, 16, 1000)))
        maybe(0.1, "accumulate_dtype", torch.float64)
    elif not options.get("allow_retain_graph"):
        maybe(0.3, "inplace", True)
    fits = abs(options.get("ignore_index", 0)) < 2**31
    needs = [random_.random() < 0.8 for _ in range(3)] if linear else (True,) * 3
    return p, Call(
        way, tuple(sizes), options, tuple(counts), n_rows=n_rows, needs=tuple(needs),
        trailing=random_.choice(((), (), (3,), (2, 2))), dtype=random_.choice((torch.float32, torch.float64)),
        target_dtype=random_.choice((torch.int32, torch.int64)) if fits else torch.int64,
        has_bias=random_.random() < 0.7 or not linear, is_strided=not linear and random_.random() < 0.3,
        ignored=tuple(random_.sample(range(max(n_rows, 1)), random_.randrange(min(n_rows, 9) + 1))), seed=number,
    )  # fmt: skip
