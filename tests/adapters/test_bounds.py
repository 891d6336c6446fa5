"""What an adapter's files may not say, ours and PEFT's: one line that names file and key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.adapters import peft_rules
from mlx_slim.adapters.store import CONFIG, WEIGHTS, check_adapter, load_adapter
from mlx_slim.models.load import load
from mlx_slim.quantization.base import recorded_base
from tests.support.adapters import write_adapter
from tests.support.tiny import TinyModels
from tests.test_reading import nested, refusal


@pytest.fixture
def adapter(tiny: TinyModels, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", tiny("llama"))


def edit(folder: Path, lora: dict[str, Any] | None = None, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values["lora_parameters"] |= lora or {}
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("lora", "changes", "expected"),
    [
        ({"rank": 2**40}, {}, "rank is 1099511627776"),
        ({"rank": 0}, {}, "rank is 0"),
        ({"scale": float("nan")}, {}, "scale is nan, expected a number"),
        ({"scale": float("inf")}, {}, "scale is inf, expected a number"),
        ({"dropout": 5}, {}, "dropout is 5, expected a number from 0 to below 1"),
        ({"keys": "q_proj"}, {}, "keys is 'q_proj', expected a list"),
        ({"keys": [1]}, {}, "keys[0] is 1, expected a string"),
        ({}, {"num_layers": "all"}, "num_layers is 'all', expected a whole number"),
        ({}, {"base_sample": {}}, "base_sample is {}, expected a list"),
        ({}, {"model": ["a"]}, "model is ['a'], expected a string"),
        ({}, {"lora_parameters": []}, "has no lora_parameters"),
    ],
)
def test_settings(
    adapter: Path, tiny: TinyModels, lora: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    edit(adapter, lora, **changes)
    model = load(tiny("llama")).model
    assert expected in refusal(load_adapter, model, adapter)
    assert expected in refusal(check_adapter, adapter)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    message = refusal(check_adapter, adapter)
    assert name in message
    (adapter / name).unlink()
    (adapter / name).write_text(nested(5000))
    assert name in refusal(check_adapter, adapter)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"folder": "../../other"}, "folder is '../../other', expected one beside"),
        ({"folder": "/tmp/base"}, "folder is '/tmp/base', expected one beside"),
        ({"folder": ".."}, "folder is '..', expected one beside"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"quantize": {"bits": 99, "group_size": 64, "mode": "affine"}}, "cannot be used"),
        ({"quantize": [4]}, "quantize is [4], expected an object"),
        ({"model": None}, "model is None, expected a string"),
        ({"more": 1}, "more"),
    ],
)
def test_a_quantized_base_that_cannot_be(
    adapter: Path, changes: dict[str, Any], expected: str
) -> None:
    record = {
        "model": "org/name",
        "revision": None,
        "quantize": {"bits": 4, "group_size": 64, "mode": "affine"},
        "dtype": "float32",
        "stored": "float32",
        "folder": "../base",
    }
    edit(adapter, quantized_base=record)
    assert recorded_base([adapter])
    edit(adapter, quantized_base={**record, **changes})
    assert expected in refusal(recorded_base, [adapter])


# ------------------------------ PEFT


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": True}, "r is True, expected a whole number"),
        ({"r": 0}, "r is 0, expected a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"use_dora": "yes"}, "use_dora is 'yes', expected true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
        ({"rank_pattern": []}, "rank_pattern is [], expected an object"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern['q_proj'] is '8', expected a whole"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern: '(' is not a valid regular expression"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern['q_proj'] is nan"),
        ({"init_lora_weights": ["x" * 5000]}, "init_lora_weights is"),
        ({"bias": {"a": [1]}}, "bias is {'a': [1]}"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}, expected names"),
        ({"exclude_modules": ["q_proj", 3]}, "exclude_modules is ['q_proj', 3]"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [True], expected numbers"),
    ],
)
def test_settings_of_peft(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert peft_rules.read_settings(tmp_path)["r"] == 8
    (tmp_path / CONFIG).write_text(json.dumps({**settings, **changes}))
    message = refusal(peft_rules.read_settings, tmp_path)
    assert CONFIG in message
    assert expected in message


def test_a_pattern_that_does_not_end() -> None:
    settings = {"r": 8, "lora_alpha": 16, "alpha_pattern": {"(a|a)+c?": 4}}
    message = refusal(peft_rules._rank_and_scale, settings, "a" * 60 + "!")
    assert CONFIG in message
    assert "(a|a)+c?" in message and "takes more than 1 s" in message
