"""Injection: which layers, what is trainable, and every way a recipe can be wrong."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

from mlx_slim.adapters.inject import Site, inject, sites
from mlx_slim.bench.small_configs import small_config
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.training.optim import trainable
from tests.adapters.support import IDS, stock_model
from tests.support.tiny import TinyModels

# r=8: (config, parameters of q,v, parameters of all linears), counted by hand from the shapes.
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
REAL = {
    "TinyLlama-1.1B": (
        LLAMA
        | {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
        1_126_400,
        6_307_840,
    ),
    "Phi-2": (
        {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32}
        | {"intermediate_size": 10240, "num_attention_heads": 32, "vocab_size": 51200},
        2_621_440,
        11_796_480,
    ),
    "Mistral-7B": (
        LLAMA
        | {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32}
        | {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 32000},
        3_407_872,
        20_971_520,
    ),
    "LLaMA-2-7B": (
        LLAMA
        | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
        4_194_304,
        19_988_480,
    ),
    "SmolLM2-135M": (
        LLAMA
        | {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
        | {"tie_word_embeddings": True},
        460_800,
        2_442_240,
    ),
}


def unallocated(config: dict) -> nn.Module:
    """A model of the real size whose weights are one zero each, shown in their shape."""
    if config["model_type"] == "mistral":
        config = config | {"model_type": "llama"}  # what mlx-lm maps it to
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.update(
        tree_map(lambda value: mx.broadcast_to(mx.array(0.0), value.shape), model.parameters())
    )
    return model


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_parameter_counts_of_the_real_shapes(name: str, targets: str) -> None:
    config, query_value, everything = REAL[name]
    model = unallocated(config)
    injected = inject(model, AdapterConfig(rank=8, targets=targets), dora=False)
    assert injected.parameters == (everything if targets == "all-linear" else query_value)
    assert sum(value.size for value in trainable(model).values()) == injected.parameters


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi", "mistral", "qwen2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_logits_at_the_start_are_the_base_s(
    architecture: str, dora: bool, bits: int | None, tiny: TinyModels
) -> None:
    model = stock_model(tiny(architecture), bits)
    expected = model(IDS)
    injected = inject(model, AdapterConfig(rank=4), dora=dora)
    assert mx.array_equal(model(IDS), expected)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    leaves = ("lora_a", "lora_b", "m") if dora else ("lora_a", "lora_b")
    assert set(names) == {f"{path}.{leaf}" for path in injected.paths for leaf in leaves}
    assert not any("embed" in path or "head" in path for path in injected.paths)
    assert injected.scale == 4.0
    assert injected.alpha == 16.0


def paths(model: nn.Module, **settings: Any) -> list[str]:
    return inject(model, AdapterConfig(rank=4, **settings), dora=False).paths


def test_choosing_targets_and_layers(tiny: TinyModels) -> None:
    def fresh():
        return stock_model(tiny("llama"))

    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert paths(fresh(), targets="q_proj") == q
    assert paths(fresh(), targets=["self_attn.q_proj"], layers=2) == q[1:]
    assert paths(fresh(), targets=r"re:attn\.q_", layers=[2, 0]) == [q[0], q[2]]
    assert paths(fresh(), targets=["q_proj", "lm_head"], layers=[1]) == [q[1], "lm_head"]
    assert paths(fresh(), targets=["embed_tokens"]) == ["model.embed_tokens"]
    first = "model.layers.0."
    assert paths(fresh(), layers=[0]) == [
        first + name
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
        )
    ]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "is not a valid regular expression"),
        (r"(a|aa)+$", "takes more than 1 s"),
        ("a{1000000000}", "repeats groups more than"),
    ],
)
def test_a_pattern_of_targets_is_bounded(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch, pattern: str, words: str
) -> None:
    monkeypatch.setattr("mlx_slim.config.patterns.SECONDS", 0.05)
    words = words.replace("1 s", "0.05 s")
    model = stock_model(tiny("llama"))
    place = next(s for s in sites(model) if s.block is not None)
    long = Site(place.block, "a" * 60 + "b", place.path, place.module)
    monkeypatch.setattr("mlx_slim.adapters.inject.sites", lambda _: [long])
    with pytest.raises(SlimError, match=words):
        paths(model, targets=f"re:{pattern}")


def test_one_seed_gives_one_adapter(tiny: TinyModels) -> None:
    states = []
    for seed in (5, 5, 6):
        model = stock_model(tiny("llama"))
        mx.random.seed(seed)
        inject(model, AdapterConfig(rank=4), dora=False)
        states.append(model.layers[1].mlp.up_proj.lora_a)
    assert mx.array_equal(states[0], states[1])
    assert not mx.array_equal(states[0], states[2])


WRONG = {
    "typo": ({"targets": "q_porj"}, "'q_porj' matches no layer", "did you mean 'q_proj'"),
    "typo-dotted": ({"targets": ["self_attn.k_prj"]}, "matches no layer", "'self_attn.k_proj'"),
    "half-a-name": ({"targets": ["proj"]}, "'proj' matches no layer", ""),
    "regex-nothing": ({"targets": "re:nothing"}, "matches no layer", "all-linear"),
    "regex-broken": ({"targets": "re:("}, "not a valid regular expression", ""),
    "no-targets": ({"targets": []}, "targets is empty", "all-linear"),
    "no-layers": ({"layers": []}, "empty list", "0 to 2"),
    "layer-index": ({"layers": [0, 3, 7]}, "[3, 7]", "0 to 2"),
    "layer-count": ({"layers": 4}, "only 3 blocks", "at most 3"),
    "rank": ({"rank": 40}, "rank=40 is above the smaller side of", "at most 32"),
    "dora-embedding": ({"targets": "embed_tokens"}, "is an embedding", "method: lora"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_change_nothing(case: str, tiny: TinyModels) -> None:
    settings, message, hint = WRONG[case]
    model = stock_model(tiny("llama"))
    before = [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(SlimError) as caught:
        inject(model, AdapterConfig(**settings), dora=case.startswith("dora"))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)
    assert [name for name, _ in tree_flatten(model.parameters())] == before


def test_what_returns_a_list_and_what_is_a_few_numbers_is_no_target() -> None:
    fused = build(small_config("afm7"))
    chosen = inject(fused, AdapterConfig(), dora=False).paths
    assert chosen
    assert not any("qkv" in path for path in chosen)  # a class of afm7's own, which splits
    assert fused(mx.zeros((1, 3), mx.int32)).shape == (1, 3, 272)  # type: ignore[operator]
    gated = build(small_config("gemma3n"))
    assert not any("coefs" in path for path in inject(gated, AdapterConfig(), dora=False).paths)


def test_twice_is_an_error(tiny: TinyModels) -> None:
    model = stock_model(tiny("llama"))
    inject(model, AdapterConfig(), dora=False)
    with pytest.raises(SlimError, match="adapters already"):
        inject(model, AdapterConfig(), dora=False)


def test_a_rank_above_a_router_is_refused_and_experts_are_adapted() -> None:
    config = LLAMA | {"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 1}
    config |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"vocab_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = unallocated(config)
    with pytest.raises(SlimError, match=r"smaller side of .*block_sparse_moe.gate, 2") as caught:
        inject(model, AdapterConfig(targets=["gate"]), dora=False)
    assert "leave it out of adapter.targets" in caught.value.hint
    placed = inject(model, AdapterConfig(), dora=False)
    names = [path.rsplit(".", 1)[-1] for path in placed.paths]
    attention, experts = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj"]
    assert names == [*attention, *experts, "down_proj"]  # all-linear without the router
    sides = 8 * (64 + 64)
    assert placed.parameters == 2 * sides + 2 * 8 * (64 + 32) + 3 * 2 * sides  # two experts each
