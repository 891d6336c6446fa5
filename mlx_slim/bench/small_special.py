"""What names of fields do not tell about small configurations: a table by model type.

Invariant: an entry is laid over what ``small_configs.py`` derives; it names a type of the installed
mlx-lm. Try it: ``python -m pytest tests/bench/test_small_configs.py``.
"""

from __future__ import annotations

from mlx_slim.reading import ModelConfig

LAYERS = 4
WIDTH = 64
HEAD_DIM = 16
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_ALTERNATING = [1, 0] * (LAYERS // 2)
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HALF_ROPE = {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 256,
}
_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": HEAD_DIM,
    "short_conv_kernel_size": 4,
}
_NAS_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}
# Model type -> what names do not tell; "text_config" is laid over the nested object.
SPECIAL: dict[str, ModelConfig] = {
    "afmoe": {"layer_types": MIXED},
    "apertus": {"rope_scaling": _LLAMA3},
    "baichuan_m1": {"conv_window": 2, "sliding_window": 256, "sliding_window_layers": [0, 2]},
    "deepseek_v41": {"sliding_window": 256},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 2 * WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {**_YARN, "type": "yarn", "mscale_all_dim": 0.707}},
    "exaone4": {
        "sliding_window_pattern": "LG",
        "layer_types": MIXED,
        "rope_scaling": {"rope_type": "default"},
    },
    "exaone_moe": {"is_moe_layer": [False, True] * (LAYERS // 2)},
    "falcon_h1": {"mamba_d_ssm": WIDTH},
    "gemma3n": {
        "text_config": {
            "activation_sparsity_pattern": [0.5, 0.0] * (LAYERS // 2),
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_active_idx": 0,
            "laurel_rank": 8,
            "final_logit_softcapping": 30.0,
        }
    },
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window_pattern": 6},  # all that GGUF stores
    "gemma4_text": {"layer_types": MIXED},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "mamba_n_heads": 8},
    "llama": {"sliding_window": None},
    "muse_glimmer": {"layer_types": MIXED},
    "olmo3": {"layer_types": MIXED, "rope_theta": 500000.0},
    "glm": {"partial_rotary_factor": 1.0},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "rope_parameters": _DEFAULT_ROPE},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_k3": {"text_config": {"linear_attn_config": _KDA}},
    "kimi_linear": {"linear_attn_config": _KDA},
    "lfm2": {
        "block_dim": WIDTH,
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
        "block_multiple_of": 32,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "llama4": {"text_config": {"num_experts_per_tok": 1, "attention_chunk_size": 16}},
    "llama4_text": {"no_rope_layers": [1, 0] * (LAYERS // 2)},
    **{
        name: {
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        }
        for name in ("longcat_flash", "longcat_flash_ngram")
    },
    "mamba2": {"num_heads": 8, "time_step_limit": [0.0, 1e6]},
    "mellum": {"rope_parameters": dict.fromkeys(set(MIXED), _DEFAULT_ROPE)},
    "mimo_v2_flash": {
        "topk_method": "noaux_tc",
        "layer_types": MIXED,
        "rope_parameters": dict.fromkeys(set(MIXED), _HALF_ROPE),
        "moe_layer_freq": _ALTERNATING,
        "hybrid_layer_pattern": _ALTERNATING,
    },
    "minicpm3": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 512,
        }
    },
    "minimax_m3_vl": {"text_config": {"moe_layer_freq": _ALTERNATING}},
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
    },
    "mistral4": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "muse_spark": {
        "text_config": {
            "num_shared_experts": 0,
            "rope_parameters": _DEFAULT_ROPE,
            "layer_rope_theta": [10000.0, 0.0] * (LAYERS // 2),
            "final_logit_softcapping": 20.0,
        }
    },
    "nemotron-nas": {"block_configs": [_NAS_BLOCK] * LAYERS},
    "nemotron_h": {"hybrid_override_pattern": list("M*E-"), "routed_scaling_factor": 1.0},
    "phi3small": {"vocab_size": 100352, "dense_attention_every_n_layers": 2},  # ids in its code
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": dict.fromkeys(set(MIXED), _DEFAULT_ROPE)},
    "openelm": {
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.5] * LAYERS,
        "ffn_dim_divisor": 32,
    },
}
