"""Small configurations of any model of transformers, by the names that most of them have for the same thing."""

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 97
SIZES = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (
        32,
        "hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim lru_width attention_hidden_size "
        "embedding_dim projection_dim out_hidden_size output_dim mm_hidden_size adapter_in_dim adapter_out_dim "
        "text_hidden_size codebook_dim base_channels",
    ),
    (48, "intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_hidden_size"),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
        "kv_lora_rank attention_window_size sliding_window",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim rotary_dim",
    ),
    (
        2,
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers depth num_blocks "
        "num_key_value_heads kv_n_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k top_k_experts",
    ),
    (
        8,
        "head_dim d_kv v_head_dim qk_head_dim hidden_size_per_layer_input mamba_n_heads mamba_d_head mamba_d_state "
        "state_size mamba_num_heads mamba_head_dim ssm_state_size",
    ),
    (64, "max_position_embeddings n_positions n_ctx seq_length max_seq_len"),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace"),
    (True, "output_router_logits is_decoder"),
    (False, "add_cross_attention"),
]
SMALL = {name: size for size, names in SIZES for name in names.split()}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What some models want otherwise; None: their own default. They are tried one after the other.
OTHERWISE: list[dict[str, Any]] = [
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"is_decoder": None},
    {"head_dim": None, "num_key_value_heads": None},
    {"intermediate_size": None},
    {"layer_types": None},
    {"layer_types": None, "num_hidden_layers": None},
    {"vocab_size_per_layer_input": None, "hidden_size_per_layer_input": None},
    {"v_head_dim": None},
    {"num_layers": None},
    {"num_key_value_heads": 4, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    {"num_key_value_heads": 4, "rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
    {"rope_parameters": ROPE},
    {"head_dim": 8, "num_key_value_heads": 4, "rope_parameters": ROPE},
    {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
    {"layer_types": ["conv", "full_attention"], "mlp_layer_types": ["sparse", "sparse"]},
    {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64},
    {"mlp_layer_types": ["sparse", "sparse"], "num_kv_shared_layers": 0, "vision_feature_layer": [-1, -1]},
    {  # of one model each
        "num_heads": 8, "num_experts_per_tok": 1, "mamba_d_ssm": 64, "default_language": "en_XX",
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 16), "video_temporal_patch_size": 2,
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6},
        "attention_types": [[["global", "local"], 1]],
    },
]  # fmt: skip


def small_ones(kind: type[PretrainedConfig]) -> Iterator[PretrainedConfig]:
    """Configurations that the class accepts, one after the other; raises what it says if it accepts none."""
    refusal = None
    accepted = False
    for changes in OTHERWISE:
        try:
            config = small(kind, changes)
        except Exception as error:  # each class checks its sizes in its own way
            refusal = refusal or error
            continue
        accepted = True
        yield config
    if not accepted:
        raise refusal


def small(kind: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    default = vars(kind())
    sizes = {"pad_token_id": 0}
    sizes |= {name: 0.0 for name, value in default.items() if "drop" in name and isinstance(value, float)}
    for name, size in (SMALL | changes).items():
        name = kind.attribute_map.get(name, name)
        usual = default.get(name)
        is_asked_for = name in changes and name in default
        if size is None or usual is None and not is_asked_for:
            continue
        if name == "rope_parameters" and (usual or ROPE).get("rope_type") != "default":  # of images
            continue
        sizes[name] = type(usual)([size] * len(usual)) if _is_list(usual) and not _is_list(size) else size
    if "qk_rope_head_dim" in sizes:  # multi-head latent attention derives sizes from each other
        sizes |= {"head_dim": 4, "num_key_value_heads": 4}
    kinds = list(dict.fromkeys(default.get("layer_types") or ()))
    if kinds and "layer_types" not in changes:
        n_layers = max(2, len(kinds))
        sizes |= {name: n_layers for name in LAYERS if name in sizes}
        sizes["layer_types"] = (kinds * n_layers)[:n_layers]
        if default.get("mlp_layer_types"):
            sizes["mlp_layer_types"] = ["sparse"] * n_layers
    parts = {name: part for name, part in default.items() if isinstance(part, PretrainedConfig)}
    return kind(**sizes, **{name: small(type(part), changes) for name, part in parts.items()})


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))
