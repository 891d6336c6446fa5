"""A Hugging Face tokenizer in GGUF's metadata.

Invariant: what is returned, read back by ``gguf_tokenizer.build_tokenizer``, gives the same token
ids on texts full of traps; a tokenizer of which that cannot be shown is refused, never guessed. The
pre-tokenizer's name, which Hugging Face does not store, is found that way. Try it:
``mlx-slim export MODEL --to gguf -o DIR``.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.models.gguf.tokenizer import TEMPLATE, build_tokenizer
from mlx_slim.models.tokenizer import PROBES
from mlx_slim.reading import GGUFMetadata, JsonObject, ModelConfig

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PRE = ("gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2")


def vocabulary(tokenizer: Any, config: ModelConfig) -> GGUFMetadata:
    """Return ``tokenizer.ggml.*`` and the chat template of ``tokenizer``.

    Args:
        tokenizer: mlx-lm's wrapper or a Hugging Face fast tokenizer.
        config: The model's: its vocabulary may be wider than the tokenizer's.

    Raises:
        SlimError: If the tokenizer is no byte-level or SentencePiece BPE, or does not read back.
    """
    fast = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(fast, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it is not a fast tokenizer (tokenizer.json)")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _refused(f"it is of type {model.get('type')}, expected BPE")
    pieces = bool(model.get("byte_fallback"))
    metadata = _tokens(definition, int(config["vocab_size"]), pieces)
    metadata["tokenizer.ggml.model"] = "llama" if pieces else "gpt2"
    _roles(metadata, fast, config)
    metadata |= _templates(fast.chat_template)
    return _named(metadata, fast, pieces)


def _refused(reason: str) -> SlimError:
    return SlimError(
        f"this tokenizer cannot be stored in GGUF: {reason}",
        "export --to hf and use llama.cpp's converter",
    )


def _tokens(definition: JsonObject, size: int, pieces: bool) -> GGUFMetadata:
    vocab: dict[str, int] = dict(definition["model"]["vocab"])
    added = {entry["id"]: entry for entry in definition.get("added_tokens", [])}
    for index, entry in added.items():
        vocab.setdefault(entry["content"], index)
    if max(vocab.values()) >= size:
        raise _refused(f"it has {max(vocab.values()) + 1} tokens, the model {size}")
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in definition["model"].get("merges", [])
    ]
    merged = {left + right for left, right in merges}
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = np.full(size, _UNUSED, np.int32)
    unknown = definition["model"].get("unk_token")
    for token, index in vocab.items():
        tokens[index] = token
        types[index] = _NORMAL if pieces or len(token) == 1 or token in merged else _UNUSED
        if index in added:
            types[index] = _CONTROL if added[index]["special"] else _USER
        elif pieces and len(token) == 6 and token.startswith("<0x"):
            types[index] = _BYTE
        if pieces and token == unknown:
            types[index] = _UNKNOWN
    metadata: GGUFMetadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if pieces:
        # SentencePiece merges the pair whose result scores best: the rank of a piece's first merge.
        scores = np.zeros(size, np.float32)
        for rank, (left, right) in enumerate(merges, 1):
            index = vocab[left + right]
            if scores[index] == 0:
                scores[index] = -rank
        metadata["tokenizer.ggml.scores"] = scores
    elif merges:
        metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    return metadata


def _templates(template: str | dict[str, str] | None) -> GGUFMetadata:
    """Return the chat template, or of several all: the default's key and one for each other."""
    if not isinstance(template, dict):
        return {} if template is None else {TEMPLATE: template}
    names = {name: re.sub(r"[^A-Za-z0-9]", "_", name) for name in template if name != "default"}
    if len(set(names.values())) < len(names):
        raise _refused(f"two of its chat templates {', '.join(names)} would get the same name")
    templates: GGUFMetadata = {f"{TEMPLATE}.{names[name]}": template[name] for name in names}
    if names:
        templates[f"{TEMPLATE}s"] = list(names.values())
    return templates | ({TEMPLATE: template["default"]} if "default" in template else {})


def _roles(metadata: GGUFMetadata, fast: Any, config: ModelConfig) -> None:
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = getattr(fast, f"{role}_token_id")
        if index is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = int(index)
    ends = config.get("eos_token_id")
    if isinstance(ends, list):
        others = [end for end in ends if end != fast.eos_token_id]
        if others:
            metadata["tokenizer.ggml.eot_token_id"] = int(others[0])
    ids = fast.encode("a")
    bos, eos = fast.bos_token_id, fast.eos_token_id
    metadata["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    metadata["tokenizer.ggml.add_eos_token"] = eos is not None and ids[-1:] == [eos]


def _named(metadata: GGUFMetadata, fast: Any, pieces: bool) -> GGUFMetadata:
    """Return ``metadata`` with the pre-tokenizer under which it reads back as ``fast``."""
    expected = [fast.encode(text) for text in PROBES]
    for pre, space in itertools.product(("default",) if pieces else _PRE, (pieces, not pieces)):
        tried = {
            **metadata,
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.add_space_prefix": space,
        }
        again = build_tokenizer(tried, [])
        if [again.encode(text) for text in PROBES] == expected:
            return tried
    raise _refused("no pre-tokenizer known here cuts text as it does")
