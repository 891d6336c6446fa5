"""What the files of a model may not say: refused in one line, before a library reads them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_slim.errors import SlimError
from mlx_slim.models.config_checks import check_config
from mlx_slim.models.gguf.file import read_gguf
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.load import load, load_tokenizer, read_config
from tests.models.gguf.test_load import write_gguf
from tests.test_reading import nested, refusal


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def refused(model: Path) -> str:
    """Return why a folder does not load; it takes no time and no memory."""
    began, before = time.process_time(), mx.get_active_memory()
    actual = refusal(load, model)
    assert time.process_time() - began < 3
    assert mx.get_active_memory() - before < 1 << 20
    return actual


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to 30"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"hidden_size": []}, "config.json"),
        ({"vocab_size": 2**20, "hidden_size": 2**20}, "vocab_size 1,048,576 and hidden_size"),
        ({"intermediate_size": 1.5}, "intermediate_size is 1.5"),
        ({"head_dim": 2**30}, "head_dim is 1073741824"),
        ({"max_position_embeddings": 2**70}, "max_position_embeddings is 1180591620717411303424"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": [1]}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"text_config": []}, "text_config is [], expected an object"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
        ({"eos_token_id": -5}, "eos_token_id is -5"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], expected a string"),
        ({"model_file": "../other/model.py"}, "model_file is '../other/model.py'"),
        ({"quantization": []}, "quantization is [], expected an object"),
        ({"quantization": {"bits": 99, "group_size": 64}}, "bits is 99"),
        ({"quantization": {"group_size": 64}}, "quantization has no 'bits'"),
        (
            {"quantization": {"bits": 4, "group_size": 64, "lm_head": {"bits": "x"}}},
            "layer 'lm_head': bits is 'x'",
        ),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "odd"}}, "mode is 'odd'"),
        ({"quantization_config": 5}, "quantization_config is 5"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be(model: Path, changes: dict[str, Any], expected: str) -> None:
    edit(model / "config.json", **changes)
    assert expected in refused(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "not a JSON object"),
        (nested(5000), "nested deeper"),
        ('{"a": ' + "9" * 6000 + "}", "6,000 digits"),
        ('{"a": "\\ud800"}', "half of a character"),
    ],
    ids=["list", "deep", "digits", "half"],
)
def test_files_that_are_no_objects(model: Path, name: str, text: str, expected: str) -> None:
    (model / name).write_text(text)
    actual = refused(model)
    assert name in actual
    assert expected in actual


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "vocab.json", "model-00001-of-00002.safetensors"]
)
@pytest.mark.parametrize("kind", ["FIFO", "loop", "folder"])
def test_files_that_are_no_files(model: Path, name: str, kind: str) -> None:
    (model / name).unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(model / name)
    elif kind == "loop":
        (model / name).symlink_to(name)
    else:
        (model / name).mkdir()
    if name == "vocab.json" and kind != "FIFO":
        load(model)  # nothing reads it
        return
    actual = refused(model)
    assert "tokenizer" in actual if name == "tokenizer.json" else name in actual


@pytest.mark.parametrize("file", [None, "../model.safetensors", "/etc/passwd", "a/b", "x" * 5000])
def test_an_index_that_names_no_file_beside_it(model: Path, file: str | None) -> None:
    """Nothing outside of the folder is looked at."""
    index = model / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    (model.parent / "model.safetensors").write_bytes(b"outside")
    values["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(values))
    actual = refused(model)
    assert "weight_map" in actual
    assert "expected" in actual
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(SlimError, match="weight_map"):
        read_config(model)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("tokenizer.json", {"model": []}, "model is [], expected an object"),
        ("tokenizer.json", {"added_tokens": [{"id": 2**40}]}, "added_tokens[0].id"),
        ("tokenizer.json", {"added_tokens": ["a"]}, "added_tokens[0] is 'a'"),
        (
            "tokenizer.json",
            {"padding": {"strategy": {"Fixed": 10**12}}},
            "padding.strategy.Fixed is 1000000000000",
        ),
        (
            "tokenizer.json",
            {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 0}},
            "pad_to_multiple_of is 0",
        ),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {}}}, "names the id '-1'"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../a.json"]}, "fast_tokenizer_files"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1}]}, "chat_template[0]: name is 1"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template is 7, expected a string"),
        ("tokenizer_config.json", {"model_max_length": "null"}, "model_max_length is 'null'"),
        ("tokenizer_config.json", {"tool_parser_type": "../x"}, "tool_parser_type is '../x'"),
    ],
)
def test_a_tokenizer_that_cannot_be(model: Path, file: str, changes: dict, expected: str) -> None:
    edit(model / file, **changes)
    actual = refusal(load_tokenizer, model)
    assert file in actual
    assert expected in actual


def test_what_is_usual_is_read(model: Path) -> None:
    """Odd values that are everywhere: a length of 10^30, infinite limits, named templates."""
    edit(
        model / "config.json",
        time_step_limit=[0.0, float("inf")],
        head_dim=None,
        num_experts=0,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mscale_all_dim": 0.707},
        vision_config={"num_hidden_layers": 0, "image_size": [224, 224]},
    )
    edit(
        model / "tokenizer_config.json",
        model_max_length=1000000000000000019884624838656,
        add_prefix_space=False,
        add_bos_token=True,
        tokenizer_file="/somewhere/else/tokenizer.json",
        chat_template=[{"name": "default", "template": "{{ 1 }}"}],
    )
    loaded = load(model)
    assert loaded.tokenizer.encode("Hi") != []


def test_defaults_of_transformers_are_no_false_alarm(tmp_path: Path) -> None:
    """The default config of every family that mlx-lm has a class for."""
    classes = {path.stem for path in Path(mlx_lm.models.__file__).parent.glob("*.py")}
    kinds = sorted(classes & set(CONFIG_MAPPING.keys()))
    assert len(kinds) > 40
    for kind in kinds:
        config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        check_config(config, tmp_path / kind, None)


# ------------------------------ GGUF


@pytest.fixture(scope="module")
def gguf(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(file, tiny("llama"), "llama", {"*": "Q8_0"}, general__alignment=32)
    return file.read_bytes()


def _value(data: bytes, key: bytes) -> int:
    """Return where the value of a metadata key lies, behind its type."""
    return data.index(key) + len(key) + 4


def _shape(data: bytes, name: bytes) -> int:
    """Return where the dimensions of a tensor lie, behind their number."""
    return data.rindex(name) + len(name) + 4


@pytest.mark.parametrize(
    ("key", "kind", "value", "expected"),
    [
        (b"general.alignment", 6, b"\0\0\xc0\x7f", "general.alignment is nan, expected a whole"),
        (b"general.alignment", 4, (0).to_bytes(4, "little"), "general.alignment is 0"),
        (b"general.alignment", 4, (48).to_bytes(4, "little"), "48, expected a power of two"),
        (b"general.alignment", 4, (2**31).to_bytes(4, "little"), "general.alignment is 2147483648"),
        (b"llama.block_count", 4, (10**9).to_bytes(4, "little"), "llama.block_count is 1000000000"),
        (b"llama.attention.head_count", 4, bytes(4), "llama.attention.head_count is 0"),
        (b"llama.embedding_length", 6, b"\0\0\xc0\x7f", "llama.embedding_length is nan"),
        (b"llama.attention.layer_norm_rms_epsilon", 6, b"\0\0\xc0\x7f", "epsilon is nan"),
        (b"tokenizer.ggml.eos_token_id", 5, b"\xff" * 4, "eos_token_id is -1"),
    ],
)
def test_gguf_metadata(
    tmp_path: Path, gguf: bytes, key: bytes, kind: int, value: Any, expected: str
) -> None:
    changed, at = bytearray(gguf), _value(gguf, key)
    changed[at - 4 : at + 4] = kind.to_bytes(4, "little") + value
    (tmp_path / "m.gguf").write_bytes(changed)
    actual = refusal(import_gguf, tmp_path / "m.gguf")
    assert "m.gguf" in actual
    assert expected in actual


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, 2**63, "has the shape"),
        (0, 0, "has the shape"),
        (0, 33, "has the shape [264, 33]"),
        (8, 2**30, "share bytes"),
        (-4, 9, "has 9 dimensions"),
    ],
)
def test_gguf_tensors(tmp_path: Path, gguf: bytes, offset: int, value: int, expected: str) -> None:
    changed, at = bytearray(gguf), _shape(gguf, b"token_embd.weight") + offset
    size = 4 if offset < 0 else 8
    changed[at : at + size] = value.to_bytes(size, "little")
    (tmp_path / "m.gguf").write_bytes(changed)
    actual = refusal(read_gguf, tmp_path / "m.gguf")
    assert "token_embd.weight" in actual
    assert expected in actual


def test_gguf_lists_in_lists(tmp_path: Path, gguf: bytes) -> None:
    """A list of one list of one list …: refused before Python's stack ends."""
    key = b"general.deep"
    entry = len(key).to_bytes(8, "little") + key + (9).to_bytes(4, "little")
    entry += ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    count = int.from_bytes(gguf[16:24], "little") + 1
    (tmp_path / "m.gguf").write_bytes(gguf[:16] + count.to_bytes(8, "little") + entry + gguf[24:])
    assert "nests lists deeper" in refusal(read_gguf, tmp_path / "m.gguf")


def test_a_gguf_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert "is a FIFO" in refusal(import_gguf, tmp_path / "m.gguf")
