"""What is measured of a language model: the knowledge that it has kept, cross-entropy, and the text that it writes."""

import numpy as np
import torch
from torch import Tensor

from tce_kernels import linear_truncated_cross_entropy

from ..training.transformer import LanguageModel, windows
from .corpus import Corpus, Items
from .groups import Values, values_of

SMOOTHING = 0.5  # added to counts, so that no frequency is zero


def model_figures(model: LanguageModel, text: Corpus, context: int) -> dict:
    """Knowledge retention, each item as a bit, and cross-entropy in nats per token."""
    right = correct(model, text.items)
    return dict(
        retention=right.mean().item(),
        correct="0x" + np.packbits(right).tobytes().hex(),
        other_retention=correct(model, text.other_items).mean().item(),
        held_out_cross_entropy=cross_entropy(model, text.held_out, context),
        split_0_cross_entropy=cross_entropy(model, text.splits[0], context),
    )


def retention(config: dict) -> Values:
    """Fidelity: of saved figures, which items were right (G, n_items)."""

    def bits(rows: list[dict]) -> np.ndarray:
        packed = [np.frombuffer(bytes.fromhex(row["correct"].removeprefix("0x")), np.uint8) for row in rows]
        return np.unpackbits(np.stack(packed), axis=1, count=config["n_items"])

    return bits


# Fidelity of the text.
text_fidelity = values_of("unigram_kl_real_generated", -1)


@torch.no_grad()
def correct(model: LanguageModel, items: Items) -> np.ndarray:
    """Of each item, whether the mean log-probability of the real continuation is the higher one."""
    device = model.head.weight.device
    tokens, ends = items.tokens.flatten(0, 1).to(device), items.ends.flatten().to(device)
    scores = []
    for some, end in zip(tokens.split(128), ends.split(128), strict=True):
        some = some[:, : end.max()]
        position = torch.arange(1, some.shape[1], device=device)
        mask = (position >= items.context) & (position < end[:, None])
        target = some[:, 1:].where(mask, -100)
        hidden = model(some[:, :-1])
        _, stats = linear_truncated_cross_entropy(hidden, model.head.weight, target, 1.0, return_stats=True)
        scores.append(stats.log_prob.double().sum(1) / mask.sum(1))
    real, false = torch.cat(scores).view(-1, 2).T
    return (real > false).cpu().numpy()


@torch.no_grad()
def cross_entropy(model: LanguageModel, tokens: Tensor, context: int) -> float:
    inputs, targets = windows(tokens.to(model.head.weight.device), context)
    hidden = torch.cat([model(some) for some in inputs.split(64)])
    return linear_truncated_cross_entropy(hidden, model.head.weight, targets, 1.0).item()


def text_figures(generated: Tensor, real: Tensor, V: int) -> dict:
    """Split 0 as it is now against what it was: token and pair frequencies, vocabulary."""
    figures = {}
    for name, n in (("unigram", 1), ("bigram", 2)):
        counts = []
        for tokens in (generated, real):
            code = sum(tokens[i : len(tokens) - n + 1 + i] * V**i for i in range(n))
            counts.append(code)
        support, index = torch.cat(counts).unique(return_inverse=True)
        p, q = (
            torch.bincount(part, minlength=len(support)).double().add(SMOOTHING)
            for part in index.split([len(code) for code in counts])
        )
        # What neither text has is as frequent in both, and adds nothing.
        p, q = p / p.sum(), q / q.sum()
        figures[f"{name}_kl_generated_real"] = (p * (p / q).log()).sum().item()
        figures[f"{name}_kl_real_generated"] = (q * (q / p).log()).sum().item()
    pairs = torch.stack([generated[:-1], generated[1:]]).unique(dim=1).shape[1]
    return figures | dict(
        vocabulary_used=len(generated.unique()),
        distinct_pairs=pairs / (len(generated) - 1),
        copied=(generated == real).double().mean().item(),
    )
