"""Tiny random models of several architectures for the tests, made on the spot. No network, no files."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from textrl_swarm.models import tiny

VOCAB, EOS, PAD = 48, 0, 1
_LLAMA_LIKE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
CONFIGS = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "llama": ("llama", _LLAMA_LIKE),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 32}),
    # As in opt-350m: the head is narrower.
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
    ),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 6}),  # short enough to matter in the tests
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
}
ARCHITECTURES = sorted(CONFIGS)
UNUSUAL = {  # made by tiny_model too; for tests of what is peculiar to them
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.0625}),
    "granite": ("granite", {**_LLAMA_LIKE, "logits_scaling": 8.0}),
    "bert": (
        "bert",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "is_decoder": True,
        },
    ),
    "modernbert-decoder": ("modernbert-decoder", {**_LLAMA_LIKE, "cls_token_id": 0, "sep_token_id": 0}),
    "roformer": (
        "roformer",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "embedding_size": 32,
        },
    ),
    "openai-gpt": ("openai-gpt", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}),
    "bamba": (
        "bamba",
        {
            **_LLAMA_LIKE,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "lfm2": ("lfm2", {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention", "conv"]}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "phimoe": ("phimoe", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "llama4_text": (
        "llama4_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "ctrl": ("ctrl", {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 64}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
        },
    ),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "falcon_40b": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "new_decoder_architecture": True,
        },
    ),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "jamba": (
        "jamba",
        {
            **_LLAMA_LIKE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "minimax": ("minimax", {**_LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "block_size": 8}),
}
LINEARS = {  # of one block, by hand
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
LINEARS.update(opt_projected=LINEARS["opt"], mistral=LINEARS["llama"], qwen2=LINEARS["llama"])
BLOCKS_NAME = {name: "h" if name in ("gpt2", "bloom") else "layers" for name in ARCHITECTURES}


def tiny_model(architecture: str, seed: int = 0, **overrides):
    """An untrained model of 3 blocks whose every weight matters.

    Its logits are peaked, so that the most likely token is no tie.
    """
    model_type, settings = {**CONFIGS, **UNUSUAL}[architecture]
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(model_type, **{**settings, **ids, **overrides})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(0.2 * noise + (1.0 if is_norm_scale else 0.0))
    return model


def character_tokenizer():
    """VOCAB entries: the end token 0, padding 1, unknown 2, then the lower-case letters from 3 on."""
    return tiny._character_tokenizer(VOCAB)


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) int64, no special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def perturb(policy, seed: int = 0) -> None:
    """Random numbers in every tensor of the adapter and the value head, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
