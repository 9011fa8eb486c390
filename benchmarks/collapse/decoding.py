"""Rewriting a text block by block with a language model: sampling, greedy decoding and beam search."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..training.transformer import LanguageModel

AT_ONCE = 1024  # sequences, those of all beams counted


class Decoder(NamedTuple):
    temperature: float = 1.0  # 0 takes the most probable token
    beams: int = 1  # more than 1: beam search, for the most probable block
    repetition_penalty: float = 1.0  # divides positive logits of tokens that have occurred, multiplies negative ones


DECODERS = {
    "T=1": Decoder(),
    "T=0.7": Decoder(temperature=0.7),
    "greedy": Decoder(temperature=0.0),
    "beam 5": Decoder(temperature=0.0, beams=5),
    "beam 5, penalty 3": Decoder(temperature=0.0, beams=5, repetition_penalty=3.0),  # the paper's
}


@torch.no_grad()
def rewrite(model: LanguageModel, split: Tensor, decoder: Decoder, prompt: int, block: int, noise: Tensor) -> Tensor:
    """A split (T,) whose blocks of `block` tokens are generated, each after the `prompt` tokens before it.

    Prompts are of the old text, as in the paper: a block never sees what has become of its neighbours. The text is
    a ring, so that no token lacks a prompt. `noise`, uniform in [0, 1), is (T / block, block): the same for two
    models, it gives the same tokens where they agree.
    """
    n_blocks = len(split) // block
    at = torch.arange(n_blocks)[:, None] * block + torch.arange(-prompt, 0)
    prompts = split[at.to(split.device) % len(split)]
    generate = _sample if decoder.beams == 1 else _search
    written = [
        generate(model, some, decoder, block, uniform)
        for some, uniform in zip(
            prompts.split(AT_ONCE // decoder.beams), noise.split(AT_ONCE // decoder.beams), strict=True
        )
    ]
    return torch.cat(written).flatten()


def _sample(model: LanguageModel, tokens: Tensor, decoder: Decoder, block: int, noise: Tensor) -> Tensor:
    caches, new = [None] * len(model.blocks), tokens
    for uniform in noise.T:
        hidden, caches = model.extend(new, caches)
        logits = _penalised(model.head(hidden[:, -1]), tokens, decoder.repetition_penalty)
        if decoder.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            below = (logits / decoder.temperature).softmax(-1).cumsum(-1)
            new = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)
            new = new.clamp(max=logits.shape[-1] - 1)
        tokens = torch.cat([tokens, new], 1)
    return tokens[:, -block:]


def _search(model: LanguageModel, prompts: Tensor, decoder: Decoder, block: int, noise: Tensor) -> Tensor:
    """The best of `decoder.beams` hypotheses by the sum of their (penalised) log-probabilities."""
    n, k = len(prompts), decoder.beams
    tokens, caches, new = prompts.repeat_interleave(k, 0), [None] * len(model.blocks), prompts
    # All beams of a prompt are alike at first: only one of them may be continued.
    scores = torch.full((n, k), -torch.inf, device=prompts.device)
    scores[:, 0] = 0
    for step in range(block):
        hidden, caches = model.extend(new, caches)
        logits = model.head(hidden[:, -1])
        if step == 0:
            logits = logits.repeat_interleave(k, 0)
            caches = [tuple(x.repeat_interleave(k, 0) for x in cache) for cache in caches]
        log_probs = _penalised(logits.log_softmax(-1), tokens, decoder.repetition_penalty)
        V = log_probs.shape[-1]
        scores, best = (scores[..., None] + log_probs.view(n, k, V)).flatten(1).topk(k)
        beam = (torch.arange(n, device=best.device)[:, None] * k + best // V).flatten()
        new = (best % V).view(-1, 1)
        tokens = torch.cat([tokens[beam], new], 1)
        caches = [tuple(x[beam] for x in cache) for cache in caches]
    return tokens.view(n, k, -1)[:, 0, -block:]


def _penalised(scores: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Tokens that have occurred, in the prompt or since, are made less likely."""
    if penalty == 1:
        return scores
    seen = scores.gather(1, tokens)
    return scores.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))
