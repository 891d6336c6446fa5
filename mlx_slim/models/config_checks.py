"""What the files of a model may say, checked before mlx-lm and transformers read them.

Invariant: numbers that decide how much is built are held against the weights that are there: no
more layers than tensors, no width that they could not hold. So a config that asks for 10^9 layers
is refused before one of them is made. Types, nesting and names are checked with it; what else a
class needs of its config, it says itself. Try it: ``mlx-slim generate FOLDER --prompt Hello`` with
another ``num_hidden_layers`` in ``config.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_slim.errors import SlimError
from mlx_slim.models.gemma import EMBEDDING_SIZE
from mlx_slim.models.tensors import Tensor
from mlx_slim.reading import JsonObject, field, open_regular, read_object, read_text, short, shown

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
MOST_LAYERS = 4096  # where there are no weights to count
MOST_WIDE = 1 << 24
_ORIGINAL = "use the original model's config"
_LAYERS = re.compile(r"(num|n)(_hidden|_decoder)?_layers?")
# mscale_all_dim is a factor of yarn (DeepSeek), no width.
_WIDE = re.compile(r"(?!mscale).*_(size|dim|heads?|experts|rank|embd)|d_model|dim|n_head|n_heads")
_TOKENS = re.compile(r".*(window|chunk|position|context|batch|block|length|cache|kernel).*")
_NEEDED = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
_NEEDED += (EMBEDDING_SIZE,)
_SMALL = re.compile(r".*_(eps|epsilon)")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "use_sliding_window")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_QUANTIZED = {"bits": (2, 8), "group_size": (16, 128)}
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_READ = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", f"{TEMPLATES}/*")
_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_OBJECTS += ("added_tokens.json", "vocab.json", "chat_template.json", "hf_quant_config.json")
_MOST_TEMPLATE = 4 << 20  # bytes
_MOST_ID = 1 << 31


def read_configs(folder: Path) -> JsonObject:
    """Return ``config.json`` of a model folder as it stands, its generation config checked too.

    Raises:
        SlimError: If it is absent or no JSON object, or names ids or a code file that cannot be.
    """
    path = folder / CONFIG
    if not (path.exists() or path.is_symlink()):
        raise SlimError(
            f"{short(folder)} has no config.json",
            "give the folder of a model; pass adapters with --adapter",
        )
    config = read_object(path)
    code = field(config, short(path), "model_file", str, None)
    if code is not None and code != Path(code).name:
        raise SlimError(
            f"{short(path)}: model_file is {shown(code)}, expected the name of a file beside it",
            _ORIGINAL,
        )
    _check_ids(config, short(path))
    generation = folder / GENERATION
    if generation.exists() or generation.is_symlink():
        _check_ids(read_object(generation), short(generation))
    return config


def _check_ids(config: Mapping[str, Any], where: str) -> None:
    for key in _IDS:
        value = config.get(key)
        ids = value if type(value) is list else [] if value is None else [value]
        if not all(type(one) is int and 0 <= one < _MOST_ID for one in ids):
            raise SlimError(
                f"{where}: {key} is {shown(value)}, expected a token id or a list of them",
                _ORIGINAL,
            )


def check_config(
    config: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor] | None
) -> None:
    """Refuse a config that no model could be built from, or only a far larger one than is there.

    Args:
        config: The parsed ``config.json``.
        folder: Where it lies.
        tensors: Those on disk; None where there are none yet.

    Raises:
        SlimError: Names the key, its value and what was expected.
    """
    where = short(folder / CONFIG)
    field(config, where, "model_type", str, "", high=200)
    text = field(config, where, "text_config", dict, {})
    values = 8 * sum(one.nbytes for one in tensors.values()) if tensors else MOST_WIDE
    layers = len(tensors) if tensors else MOST_LAYERS
    widest = min(values, MOST_WIDE)
    for path, key, value in _numbers(config):
        if math.isnan(value) or (type(value) is int and abs(value) >= 2**63):
            raise _bad(where, path, value, "a number of at most 64 bits")
        ours = re.fullmatch(rf"(text_config\.)?{re.escape(key)}(\[.*)?", path)  # no vision tower's
        whole = float(value).is_integer()
        if _LAYERS.fullmatch(key) and not (whole and bool(ours) <= value <= layers):
            held = f": the weights hold {layers:,} tensors" if tensors else ""
            raise _bad(where, path, value, f"a whole number from 1 to {layers:,}{held}")
        if _WIDE.fullmatch(key) and not _TOKENS.fullmatch(key):
            least = 1 if ours and key in _NEEDED else -1
            if not (whole and least <= value <= widest):
                raise _bad(where, path, value, f"a whole number from {least} to {widest:,}")
        if _SMALL.fullmatch(key) and not 0 <= value < 1:
            raise _bad(where, path, value, "a number from 0 to below 1")
    for name, part in (("", config), ("text_config.", text)):
        _check_part(part, where, name)
        width, words = part.get("hidden_size"), part.get("vocab_size")
        if tensors and isinstance(width, int) and isinstance(words, int) and width * words > values:
            raise SlimError(
                f"{where}: {name}vocab_size {words:,} and hidden_size {width:,} need more than the "
                f"{values // 8:,} bytes of the weights, at one bit a value",
                "config.json and the weights must come from the same model",
            )


def _check_part(part: Mapping[str, Any], where: str, name: str) -> None:
    for key, value in part.items():
        count = _LAYERS.fullmatch(key) or key in _NEEDED
        if count and value is not None and type(value) not in (int, list):
            raise _bad(where, name + key, value, "a whole number")
        if _SMALL.fullmatch(key) and type(value) not in (int, float, type(None)):
            raise _bad(where, name + key, value, "a number")
        if key in _FLAGS and type(value) not in (bool, type(None)):
            raise _bad(where, name + key, value, "true or false")
    for key in ("quantization", "quantization_config"):
        settings = field(part, where, key, dict, None)
        if settings is not None and (key == "quantization" or "quant_method" not in settings):
            _check_quantization(settings, f"{where}: {name}{key}")


def _check_quantization(settings: Mapping[str, Any], where: str) -> None:
    """Check bits, group size and mode, of the model and of single layers."""
    for key in _QUANTIZED:
        field(settings, where, key, int)
    for path, layer in (("", settings), *settings.items()):
        if not isinstance(layer, dict):  # false: not quantized; or what another tool notes here
            continue
        place = f"{where}, layer {shown(path)}" if path else where
        for key, (low, high) in _QUANTIZED.items():
            field(layer, place, key, int, low, low=low, high=high)
        if field(layer, place, "mode", str, "affine") not in _MODES:
            raise _bad(place, "mode", layer["mode"], f"one of {', '.join(_MODES)}")


def _numbers(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, int | float]]:
    """Yield (path, nearest key, value) of every number; the depth is bounded by the reader."""
    if type(value) is dict:
        for name, child in value.items():
            yield from _numbers(child, f"{path}.{name}" if path else str(name), str(name))
    elif type(value) is list:
        for index, child in enumerate(value):
            yield from _numbers(child, f"{path}[{index}]", key)
    elif type(value) in (int, float):
        yield path, key, value


def _bad(where: str, key: str, value: Any, expected: str) -> SlimError:
    return SlimError(f"{where}: {key} is {shown(value)}, expected {expected}", _ORIGINAL)


# ---------------------------------------------------------------------------------- tokenizer


def check_tokenizer(folder: Path) -> None:
    """Refuse files of a tokenizer that transformers could not read, or would wait for.

    Raises:
        SlimError: Names the file, and the key where one is wrong.
    """
    for pattern in _READ:
        for path in sorted(folder.glob(pattern)):
            if path.exists() and not path.is_dir():
                open_regular(path).close()
    for path in (*folder.glob("*.jinja"), *folder.glob(f"{TEMPLATES}/*.jinja")):
        read_text(path, _MOST_TEMPLATE)
    objects = {name: read_object(folder / name) for name in _OBJECTS if (folder / name).is_file()}
    _check_fast(objects.get("tokenizer.json"), short(folder / "tokenizer.json"))
    _check_settings(objects.get("tokenizer_config.json"), short(folder / "tokenizer_config.json"))
    for name in ("added_tokens.json", "vocab.json"):
        for token, index in objects.get(name, {}).items():
            _check_id(index, f"{short(folder / name)}: {shown(token)}")


def _check_id(index: Any, what: str) -> None:
    if type(index) is not int or not 0 <= index < _MOST_ID:
        raise SlimError(f"{what} is {shown(index)}, expected a token id", _ORIGINAL)


def _check_fast(tokenizer: JsonObject | None, where: str) -> None:
    """Check what ``tokenizer.json`` allocates by; its model is checked by its own library."""
    if tokenizer is None:
        return
    field(tokenizer, where, "model", dict)
    for index, token in enumerate(field(tokenizer, where, "added_tokens", list, [])):
        what = f"{where}: added_tokens[{index}]"
        if type(token) is not dict:
            raise SlimError(f"{what} is {shown(token)}, expected an object", _ORIGINAL)
        _check_id(token.get("id"), f"{what}.id")
        field(token, what, "content", str)
    for section in ("padding", "truncation"):
        for path, _, value in _numbers(field(tokenizer, where, section, dict, {}), section):
            if not 0 <= value <= MOST_WIDE or (path.endswith("multiple_of") and value < 1):
                raise _bad(where, path, value, f"a whole number of at most {MOST_WIDE:,}")


def _check_settings(settings: JsonObject | None, where: str) -> None:
    if settings is None:
        return
    for index, token in field(settings, where, "added_tokens_decoder", dict, {}).items():
        if not (index.isascii() and index.isdigit()) or not int(index[:20]) < _MOST_ID:
            raise SlimError(f"{where}: added_tokens_decoder names the id {shown(index)}", _ORIGINAL)
        if type(token) not in (dict, str):
            raise _bad(where, f"added_tokens_decoder.{index}", token, "an object")
    for key, value in settings.items():
        if key.endswith("_token") and type(value) not in (str, dict, bool, type(None)):
            raise _bad(where, key, value, "a token")
    field(settings, where, "model_max_length", float, None, low=1)
    for name in field(settings, where, "fast_tokenizer_files", list, []):
        if type(name) is not str or name != Path(name).name:
            raise _bad(where, "fast_tokenizer_files", name, "names of files beside it")
    for key in ("chat_template_type", "tool_parser_type"):
        kind = field(settings, where, key, str, "x")
        if not kind.isidentifier():
            raise _bad(where, key, kind, "a name")
    template = settings.get("chat_template")
    if isinstance(template, list):
        for index, one in enumerate(template):
            what = f"{where}: chat_template[{index}]"
            if not isinstance(one, dict):
                raise SlimError(f"{what} is {shown(one)}, expected an object", _ORIGINAL)
            field(one, what, "name", str)
            field(one, what, "template", str, high=_MOST_TEMPLATE)
    else:
        field(settings, where, "chat_template", str, None, high=_MOST_TEMPLATE)
