"""Small models of many kinds: what stands between head and loss, encoders, images, experts."""

import copy

import pytest
import torch
import transformers

from .tiny import V, llama, mixtral, sizes

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 50)


def of_transformers(name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def built(kind, config, **options):
    torch.manual_seed(0)
    return of_transformers(kind)(of_transformers(config)(**sizes(**options)))


def gpt2():
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropout)
    )


def qwen_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return built("Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=8, **experts)


def llava():
    if OLD:
        pytest.skip(f"Llava of transformers {transformers.__version__} has no loss_function")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**sizes())
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=V - 1, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def t5gemma():
    """An encoder and a decoder: its loss does not shift."""
    torch.manual_seed(0)
    module = of_transformers("T5GemmaModuleConfig")(**sizes(head_dim=8, num_key_value_heads=4))
    dropout = {"dropout_rate": 0.0, "classifier_dropout_rate": 0.0}
    return transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=module, decoder=copy.deepcopy(module), vocab_size=V, **dropout)
    )


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "softcap": lambda: built("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, final_logit_softcapping=0.5),
    "factor": lambda: built("CohereForCausalLM", "CohereConfig", logit_scale=0.3, eos_token_id=2, bos_token_id=1),
    "divisor": lambda: built("GraniteForCausalLM", "GraniteConfig", logits_scaling=8.0),
    "experts": mixtral,
    "more experts": qwen_moe,
    "odd vocabulary": gpt2,
    "images": llava,
    "encoder": t5gemma,
}
SCALES = {
    "factor": (0.3, None),
    "divisor": (1 / 8, None),
    "softcap": (1.0, 0.5),
    "encoder": (1.0, 30.0),
}  # of the logits


def spread(model):
    """Larger weights in the head: confidences from 0 to 1, instead of all about 1/V."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    return model


def batch(model, n=2, length=12):
    """Tokens with labels, the first four of the first sentence without."""
    tokens = torch.randint(4, V - 2, (n, length), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[0, :4] = -100
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return inputs | ({} if model.config.is_encoder_decoder else {"use_cache": False})
