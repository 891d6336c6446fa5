"""Small configurations out of the classes of the installed mlx-lm."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from mlx_slim.bench import small_configs
from mlx_slim.bench.small_configs import small_config
from mlx_slim.bench.small_special import LAYERS, SPECIAL, WIDTH
from mlx_slim.models.normalize import architectures


def test_sizes_follow_the_names_of_the_fields() -> None:
    config = small_config("llama")
    assert config["num_hidden_layers"] == LAYERS
    assert config["hidden_size"] == WIDTH
    assert config["model_type"] == "llama"
    assert "attention_bias" not in config  # the class has a default


def test_a_nested_configuration_is_that_of_the_class_that_reads_it() -> None:
    assert small_config("qwen3_vl")["text_config"]["num_hidden_layers"] == LAYERS
    assert small_config("kimi_k3")["text_config"]["linear_attn_config"]["num_heads"] == 4


def test_every_type_gets_its_required_fields() -> None:
    for name in architectures():
        if name == "olmo":  # wants another library
            continue
        args = importlib.import_module(f"mlx_lm.models.{name}").ModelArgs
        needed = {
            each.name
            for each in dataclasses.fields(args)
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        }
        assert needed <= small_config(name).keys(), name


def test_the_table_of_special_cases_names_types_of_the_installed_mlx_lm() -> None:
    special = {*SPECIAL, *small_configs._TEXT, *small_configs._TEXT.values()}
    assert special <= set(architectures())


def test_a_configuration_is_the_callers_own() -> None:
    first = small_config("mellum")
    first["rope_parameters"].clear()
    assert small_config("mellum")["rope_parameters"]


def test_a_module_that_ends_the_process_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="olmo"):
        small_config("olmo")
