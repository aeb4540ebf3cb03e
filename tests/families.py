"""Small random checkpoints of many architectures, sharded, as transformers saves them.

Sizes are chosen so that what differs between architectures shows: fewer heads for keys than for queries, head
sizes that are not hidden / heads, windows and chunks shorter than a prompt, layers of different kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, HIDDEN, BLOCKS = 96, 32, 4

_PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 16}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
_LATENT = {
    **_PLAIN,
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
}
_SLIDING = {"sliding_window": 4}
_MIXED_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    # dense
    "bloom": {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, **_SLIDING},
    "ministral3": _WIDE,
    "qwen2": _GROUPED,
    "qwen3": _WIDE,
    "gemma": _WIDE,
    "gemma2": {**_WIDE, **_SLIDING, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_WIDE, **_SLIDING, "layer_types": _MIXED_LAYERS},
    "phi": _PLAIN,
    "phi3": _GROUPED,
    "gpt_neox": _PLAIN,
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": BLOCKS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "falcon": {**_PLAIN, "alibi": False},
    "mpt": {"vocab_size": VOCAB, "d_model": HIDDEN, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": 128},
    "stablelm": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, **_SLIDING},
    "cohere": _GROUPED,
    "cohere2": {**_GROUPED, **_SLIDING},
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "starcoder2": _GROUPED,
    "smollm3": _GROUPED,
    "glm4": _WIDE,
    "exaone4": {**_GROUPED, **_SLIDING},
    "ernie4_5": _GROUPED,
    "seed_oss": _WIDE,
    "hunyuan_v1_dense": _WIDE,
    # mixtures of experts
    "mixtral": {**_GROUPED, **_LOCAL_EXPERTS},
    "qwen2_moe": {**_GROUPED, **_EXPERTS, **_SHARED_EXPERT},
    "qwen3_moe": {**_WIDE, **_EXPERTS},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_WIDE, **_LOCAL_EXPERTS, **_SLIDING},
    "phimoe": {**_GROUPED, **_LOCAL_EXPERTS},
    "glm4_moe": {**_WIDE, **_ROUTED, "n_group": 1, "topk_group": 1},
    "llama4_text": {
        **_WIDE,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
    },
    "minimax_m2": {**_WIDE, **_LOCAL_EXPERTS},
    "afmoe": {**_WIDE, **_EXPERTS, **_SLIDING, "num_dense_layers": 1},
    "hunyuan_v1_moe": {**_WIDE, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 24},
    "lfm2_moe": {
        **_GROUPED,
        **_EXPERTS,
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 1,
        "conv_L_cache": 3,
    },
    "nemotron_h": {
        **_WIDE,
        **_ROUTED,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    # a latent in the place of keys and values
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64},
    # which tokens to attend to travels between blocks
    "glm_moe_dsa": {
        **_LATENT,
        "index_n_heads": 16,  # with few, scores are 0 and tie
        "index_head_dim": 8,
        "index_topk": 5,
        "indexer_types": ["full", "shared", "shared", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    # states
    "qwen3_next": {**_WIDE, **_EXPERTS, **_SHARED_EXPERT, **_LINEAR},
    "qwen3_5_text": {**_WIDE, **_LINEAR},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "falcon_h1": {**_GROUPED, **_MAMBA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **_GROUPED,
        **_LOCAL_EXPERTS,
        **_MAMBA,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "mamba": {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "state_size": 4},
    "jamba": {
        **_GROUPED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "gemma4_text": {
        **_WIDE,
        **_SLIDING,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}

# Their blocks need more than a hidden state.
REFUSED: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **_WIDE,
        **_SLIDING,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * BLOCKS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {
        **FAMILIES["gemma4_text"],
        "hidden_size_per_layer_input": 8,
    },
    "t5": {"vocab_size": VOCAB, "d_model": HIDDEN, "num_layers": 2, "num_heads": 4},
    "recurrent_gemma": {
        **_GROUPED,
        "lru_width": HIDDEN,
        "attention_window_size": 8,
        "num_key_value_heads": 1,
    },
}


def random_checkpoint(family: str, directory: Path, **changes: Any) -> Path:
    """Writes a model whose every weight matters: no matrix is small, no bias is zero."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            is_kept = any(part in name for part in ("norm", "ln_", "A_log", "dt_bias", ".D"))
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5 if "embed" in name or "wte" in name else 0.25)
            elif not is_kept:
                parameter.normal_(0, 0.1)
        model.save_pretrained(directory, max_shard_size="40KB")
    return directory
