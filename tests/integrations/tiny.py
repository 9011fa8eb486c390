"""What the tests of the integrations train: models of two layers, sentences of random tokens, their gradients."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

V, LENGTH = 101, 24


def sizes(**options):
    """Of a model of two layers, under the names that most configurations have."""
    return {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        **options,
    }


def llama(**options):
    """The same weights at each call."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(**options)))


def mixtral(**options):
    """A mixture of experts, with an auxiliary loss that one sees."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5, **options}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes(intermediate_size=32, **experts)))


def data(n):
    """n rows of 5 to 23 tokens, padded, the first third a prompt without labels."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(n):
        length = int(torch.randint(5, LENGTH, (), generator=generator))
        tokens = torch.randint(1, V, (length,), generator=generator).tolist()
        padding = LENGTH - length
        rows.append(
            {
                "input_ids": tokens + [0] * padding,
                "attention_mask": [1] * length + [0] * padding,
                "labels": [-100] * (length // 3) + tokens[length // 3 :] + [-100] * padding,
            }
        )
    return rows


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def gradients(model, batch):
    """The loss of a batch, and the gradients of all parameters by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    """The largest difference of two dicts of gradients, to the largest gradient of b; they have the same names."""
    assert a.keys() == b.keys()
    largest = max(gradient.abs().max() for gradient in b.values())
    return max((a[name] - b[name]).abs().max() for name in b).div(largest).item()
