"""The small causal language model of the benchmarks: what it is trained on, and a cache for generating text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of one block: keys and values of the tokens so far, (B, n_heads, T, D / n_heads) each.
Cache = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, D: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:  # x: (B, T, D)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:  # x is then one token, which sees all others
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (k, v)


class LanguageModel(nn.Module):
    """Pre-norm transformer: tokens (B, T) to what `head` makes logits of, (B, T, D)."""

    def __init__(self, vocabulary: int, context: int, D: int = 128, n_blocks: int = 2, n_heads: int = 4):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, D), nn.Embedding(context, D)
        self.blocks = nn.ModuleList(Block(D, n_heads) for _ in range(n_blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens, [None] * len(self.blocks))[0]

    def extend(self, tokens: Tensor, caches: list[Cache | None]) -> tuple[Tensor, list[Cache]]:
        """Hidden states (B, T, D) and the caches with `tokens`: of a whole text with no caches, else one token."""
        start = 0 if caches[0] is None else caches[0][0].shape[2]
        x = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        extended = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache)
            extended.append(cache)
        return self.norm(x), extended


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (n, context) that cover the tokens once; the last few are left out."""
    n = (len(tokens) - 1) // context
    return tokens[: n * context].view(n, context), tokens[1 : n * context + 1].view(n, context)
