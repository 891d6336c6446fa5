"""Logits of every family against transformers, below and above windows and original contexts.

Random weights are three times as large as usual, so that attention is far from uniform and an
activation of another formula shows. Above a sliding window that mlx-lm's class ignores, the refusal
is what is tested. Needs PyTorch: ``make parity``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models.load import load
from mlx_slim.models.row_limits import row_limit
from tests.parity.torch_side import TINY, torch, transformers
from tests.support.tiny import byte_tokenizer

WINDOW, ORIGINAL = 16, 32
TOLERANCE = 1e-4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN["rope_theta"] = 10000.0
FULL_YARN = {**YARN, "attention_factor": 1.5, "truncate": False, "beta_fast": 16, "beta_slow": 2}
MSCALE = {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
HALF = {**LONGROPE, "short_factor": [1.0, 1.5, 1.1, 2.0], "long_factor": [3.0, 2.0, 5.0, 9.0]}
BY_TYPE = {
    "full_attention": {**FULL_YARN, "rope_theta": 1e6},
    "sliding_attention": {**LINEAR, "rope_theta": 5e3},
}
SLIDING = {"sliding_window": WINDOW}
QWEN = {**SLIDING, "use_sliding_window": True, "max_window_layers": 2}

# Name: model type, config, whether rows longer than the window are computed right.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}, True),
    "llama-yarn": ("llama", {"rope_parameters": YARN}, True),
    "llama-yarn-full": ("llama", {"rope_parameters": FULL_YARN}, True),
    "llama-yarn-mscale": ("llama", {"rope_parameters": MSCALE}, True),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "mistral-window": ("mistral", SLIDING, False),
    "mistral-yarn": ("mistral", {"sliding_window": None, "rope_parameters": FULL_YARN}, True),
    "mixtral-window": ("mixtral", {**SLIDING, "num_local_experts": 4}, False),
    "phi-yarn": ("phi", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, True),
    "phi3": ("phi3", {}, True),
    "phi3-window": ("phi3", SLIDING, False),
    "starcoder2": ("starcoder2", {}, True),
    "starcoder2-window": ("starcoder2", SLIDING, False),
    "starcoder2-yarn": ("starcoder2", {"rope_parameters": FULL_YARN}, True),
    "gemma": ("gemma", {}, True),
    "gemma2-window": ("gemma2", SLIDING, False),
    "gemma2-yarn": ("gemma2", {**SLIDING, "rope_parameters": FULL_YARN}, False),
    "gemma3-window": ("gemma3_text", {**SLIDING, "sliding_window_pattern": 2}, True),
    # √D is no bfloat16 there, which mlx-lm rounds it to.
    "gemma3-scale": (
        "gemma3_text",
        {**SLIDING, "sliding_window_pattern": 2, "hidden_size": 40},
        True,
    ),
    "gemma3-by-type": (
        "gemma3_text",
        {**SLIDING, "sliding_window_pattern": 2, "rope_parameters": BY_TYPE},
        True,
    ),
    "gemma3-other-layers": (
        "gemma3_text",
        {
            **SLIDING,
            "sliding_window_pattern": 2,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
        },
        False,
    ),
    "qwen2": ("qwen2", {}, True),
    "qwen2-window": ("qwen2", QWEN, False),
    "qwen2-window-unused": ("qwen2", {**QWEN, "use_sliding_window": False}, True),
    "qwen2-window-no-layer": ("qwen2", {**QWEN, "max_window_layers": 4}, True),
    "qwen2-yarn": ("qwen2", {"rope_parameters": FULL_YARN}, True),
    "qwen3": ("qwen3", {}, True),
    "qwen3-window": ("qwen3", QWEN, False),
    "qwen3-yarn": ("qwen3", {"rope_parameters": FULL_YARN}, True),
    "olmo2": ("olmo2", {}, True),
    "olmo2-yarn": ("olmo2", {"rope_parameters": FULL_YARN}, True),
    "olmo3-window": (
        "olmo3",
        {**SLIDING, "rope_parameters": {**BY_TYPE, "sliding_attention": {"rope_type": "default"}}},
        True,
    ),
    "smollm3": ("smollm3", {}, True),
    "stablelm": ("stablelm", {}, True),
}
# Those whose angles depend on the length: right for a row by itself, a limit for packed ones.
BY_LENGTH: dict[str, tuple[str, dict[str, Any], int]] = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE}, ORIGINAL),
    "phi3-longrope-half": (
        "phi3",
        {"rope_parameters": {**HALF, "partial_rotary_factor": 0.5}},
        ORIGINAL,
    ),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}, ORIGINAL),
    "llama-dynamic": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, 256),
}
LENGTHS = (WINDOW, ORIGINAL, ORIGINAL + 1, 100, 300)


def torch_model(kind: str, changes: dict[str, Any], folder: Path) -> Any:
    """Return transformers' model with random weights, saved into ``folder``."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TINY, "num_hidden_layers": 4, **changes})
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    if kind == "phi3":
        config.original_max_position_embeddings = ORIGINAL
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(3.0)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return model


def gap(theirs: Any, ours: Any, length: int) -> float:
    """Return the largest difference of logits in units of the largest logit."""
    ids = [(7 * i * i + 3 * i + 5) % 250 for i in range(length)]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    actual = np.array(ours(mx.array([ids]))[0])
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    kind, changes, right = CASES[name]
    theirs = torch_model(kind, changes, tmp_path / "m")
    loaded = load(tmp_path / "m", dtype=mx.float32)
    limit = row_limit(loaded.config)
    assert (limit is None) == right
    for length in LENGTHS:
        if limit is None or length <= limit.tokens:
            assert gap(theirs, loaded.model, length) < TOLERANCE, length
    if limit is not None:
        assert limit.tokens == WINDOW
        assert gap(theirs, loaded.model, WINDOW + 8) > 1e-3, "the limit is not needed"


@pytest.mark.parametrize("name", BY_LENGTH)
def test_rotations_that_depend_on_the_length_are_those_of_transformers(
    tmp_path: Path, name: str
) -> None:
    kind, changes, boundary = BY_LENGTH[name]
    theirs = torch_model(kind, changes, tmp_path / "m")
    loaded = load(tmp_path / "m", dtype=mx.float32)
    limit = row_limit(loaded.config)
    assert limit is not None and limit.tokens == boundary
    for length in LENGTHS:
        assert gap(theirs, loaded.model, length) < TOLERANCE, length


def test_generation_past_the_original_context_is_that_of_transformers(tmp_path: Path) -> None:
    from mlx_slim.evaluation.chat import open_session

    theirs = torch_model("phi3", {"rope_parameters": LONGROPE}, tmp_path / "m")
    ids = list(range(40, 40 + ORIGINAL - 6))
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )[0].tolist()
    notes: list[str] = []
    speaker = open_session(tmp_path / "m", tell=notes.append)
    for _ in speaker.stream(ids, max_tokens=20, temperature=0.0):
        pass
    actual = speaker._cached_ids
    assert actual == expected[: len(actual)]
    assert speaker.last is not None and speaker.last.stop_reason in ("length", "stop")
    assert len(actual) > ORIGINAL + 4 and not notes
