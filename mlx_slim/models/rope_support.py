"""What mlx-lm's model classes compute of a RoPE configuration, as a table.

Invariant: the table is that of the installed mlx-lm (``tests/models/test_rope_support.py`` reads
its source and fails where a row differs), so that no source is searched while a model is loaded. A
module without a row ignores scaling, as far as the table knows: ``rope_install.py`` replaces its
rotary embedding, or refuses. Try it: ``python -m pytest tests/models/test_rope_support.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

# Types of mlx_lm.models.rope_utils.initialize_rope, which most classes call.
SHARED_TYPES = frozenset(
    {"default", "linear", "dynamic", "llama3", "longrope", "mrope", "proportional"}
    | {"yarn", "deepseek_yarn", "telechat3-yarn"}
)


@dataclass(frozen=True)
class RopeSupport:
    """What one module of ``mlx_lm.models`` computes.

    Attributes:
        types: RoPE types that the class computes; None where it applies its scaling whatever the
            type is called.
        scales_softmax: Whether attention is scaled by yarn's ``mscale`` too, outside the rotary
            embedding.
        embedding_types: Types of a rotary embedding class that only this module has; empty where
            it uses a shared one. None of these reads ``attention_factor`` or ``truncate``.
    """

    types: frozenset[str] | None = frozenset()
    scales_softmax: bool = False
    embedding_types: frozenset[str] = frozenset()

    @property
    def reads_scaling(self) -> bool:
        """Whether scaling changes more than a shared rotary embedding, or is needed to build."""
        return self.types is None or self.scales_softmax or bool(self.embedding_types)

    def computes(self, kind: str) -> bool:
        """Return whether the class does something for RoPE type ``kind``."""
        return self.types is None or kind in self.types


_SHARED = RopeSupport(SHARED_TYPES)
_SHARED_SOFTMAX = RopeSupport(SHARED_TYPES, scales_softmax=True)
_LINEAR = RopeSupport(frozenset({"linear"}))
_DYNAMIC = RopeSupport(None, embedding_types=frozenset({"dynamic"}))

SUPPORT: dict[str, RopeSupport] = {
    **dict.fromkeys(
        [
            "afm7",
            "afmoe",
            "apertus",
            "bailing_moe",
            "bailing_moe_linear",
            "bitnet",
            "dots1",
            "ernie4_5",
            "ernie4_5_moe",
            "exaone",
            "exaone4",
            "exaone_moe",
            "falcon_h1",
            "gear",
            "gemma3",
            "gemma3_text",
            "gemma4",
            "gemma4_text",
            "gpt_oss",
            "gptj",
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "internlm2",
            "iquestloopcoder",
            "laguna",
            "llama",
            "llama4",
            "mellum",
            "mimo",
            "minicpm",
            "minimax_m3_vl",
            "ministral3",
            "nanbeige",
            "nemotron-nas",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "olmoe",
            "pixtral",
            "prism_hadamard_qwen35",
            "qwen2",
            "qwen2_vl",
            "qwen3",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_next",
            "qwen3_vl",
            "seed_oss",
            "smollm3",
            "step3p5",
            "telechat3",
            "youtu_llm",
        ],
        _SHARED,
    ),
    **dict.fromkeys(
        [
            "bailing_hybrid",
            "bailing_moe_v3",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_k25",
            "kimi_vl",
            "longcat_flash",
            "longcat_flash_ngram",
            "mistral3",
            "mistral4",
        ],
        _SHARED_SOFTMAX,
    ),
    **dict.fromkeys(("deepseek", "nemotron", "qwen2_moe"), _LINEAR),
    **dict.fromkeys(("hunyuan", "hunyuan_v1_dense"), _DYNAMIC),
    **dict.fromkeys(("deepseek_v41", "phimoe"), RopeSupport(None, scales_softmax=True)),
    "deepseek_v2": RopeSupport(None, True, frozenset({"yarn"})),
    "minicpm3": RopeSupport(None),
    "internlm3": RopeSupport(SHARED_TYPES, False, frozenset({"linear", "dynamic"})),
    "phi3": RopeSupport(frozenset({"linear", "longrope", "su"})),
}


def support_of(module: str) -> RopeSupport:
    """Return the row of a module, such as ``mlx_lm.models.llama``.

    A module outside ``mlx_lm.models`` is the model's own code: it is trusted with its config.
    """
    package, _, name = module.rpartition(".")
    if package != "mlx_lm.models":
        return RopeSupport(None, scales_softmax=True)
    return SUPPORT.get(name, RopeSupport())
