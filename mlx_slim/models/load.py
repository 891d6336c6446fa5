"""A folder or hub id becomes a model, a tokenizer and a config, or one clear error.

Invariant: what loads computes the logits its author meant: the config traps are mended
(``normalize_config``), and every tensor of the files is in the model and the other way round.
Tensors are read, cast and quantized one at a time: while a model loads, MLX holds no more than
what stays, and one tensor as it is stored and once more in the dtype of computation.
Try it: ``mlx-slim generate HuggingFaceTB/SmolLM2-135M-Instruct --prompt Hello``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.artifacts import hash_files, public_name
from mlx_slim.errors import SlimError
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.config_checks import check_tokenizer
from mlx_slim.models.hub import resolve, resolve_config
from mlx_slim.models.opening import (
    check_runs,
    constants,
    normalized_config,
    open_corrected,
    raw_config,
    read_weights,
    tensor_names,
)
from mlx_slim.models.quantized import use_fast_matmul
from mlx_slim.models.tensors import (
    FLOATS,
    INDEX,
    WEIGHTS,
    Tensor,
    common_dtype,
    folder_tensors,
    read_index,
)
from mlx_slim.models.tokenizer import fit_tokenizer
from mlx_slim.progress import stage
from mlx_slim.reading import ModelConfig, library_errors, short

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = [
    "Loaded",
    "load",
    "load_tokenizer",
    "model_files",
    "model_hash",
    "read_config",
    "read_tokenizer",
    "resolve",
]

# What a model's answers depend on; not the records of how and when it was made.
_FILES = (
    WEIGHTS,
    INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
    "*.py",
)

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# Changes a model whose weights are not read yet (quantizes it), and returns its config.
Transform = Callable[[nn.Module, ModelConfig], ModelConfig]


@dataclass(frozen=True)
class Loaded:
    """A model ready to compute.

    Attributes:
        model: Evaluated weights, in evaluation mode.
        tokenizer: mlx-lm's wrapper around the Hugging Face tokenizer.
        config: The normalised ``config.json``.
        path: The local folder it came from.
        source: What the user gave: a folder or a hub id.
        revision: Commit of a hub snapshot; None for a folder.
        notes: What ``normalize_config`` had to change, and what its tokenizer lacks.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: ModelConfig
    path: Path
    source: str
    revision: str | None
    notes: list[str] = field(default_factory=list)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
    transform: Transform | None = None,
    lazy: bool = False,
    half_blocks: bool = False,
) -> Loaded:
    """Load an MLX or Hugging Face folder, or a hub id.

    Args:
        source: Folder, or ``owner/name`` on the hub.
        revision: Branch, tag or commit of a hub id.
        dtype: Floating weights are cast to it, scales and biases of quantized layers too, so that
            the whole model computes in one dtype; None keeps what is stored.
        trust_remote_code: Run Python files that the repository brings.
        transform: Changes the model before its weights are read, and returns its config.
        lazy: Leave the weights unread; whoever reads them looks for NaN.
        half_blocks: On a CPU, matrices of the blocks that are stored in 16 bits stay so, and are
            cast for each product: half of the memory, the same values. For scoring: what reads
            the weights of a layer itself, as adapters do, wants them cast.

    Raises:
        SlimError: If the source is absent, incomplete or corrupt, its type unknown, or its tensors
            are not exactly those of the model.
    """
    folder = resolve(source, revision, trust_remote_code=trust_remote_code)
    with stage(f"loading {public_name(source)}"):
        model, config, notes = open_corrected(
            folder, dtype=dtype, half_blocks=half_blocks, trust_remote_code=trust_remote_code
        )
        with library_errors(f"{short(folder)}: its weights cannot be read"):
            if transform is not None:
                config = transform(model, config)
            if not lazy:
                read_weights(model, short(folder))
            mx.eval(constants(model))
    check_runs(model, folder)
    use_fast_matmul(model)
    use_fast_swiglu(model)
    with stage(f"loading the tokenizer of {public_name(source)}"):
        tokenizer, more = read_tokenizer(folder, config, trust_remote_code)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        config=config,
        path=folder,
        source=str(source),
        revision=commit_of(folder, revision),
        notes=[*notes, *more],
    )


def commit_of(folder: Path, revision: str | None) -> str | None:
    """Return the commit of a hub snapshot; of another folder ``revision``."""
    return folder.name if folder.parent.name == "snapshots" else revision


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> TokenizerWrapper:
    """Return the tokenizer of a folder or hub id, weights unread.

    Raises:
        SlimError: As ``load`` does for the same reasons.
    """
    folder = resolve(source, revision, trust_remote_code=trust_remote_code)
    config = normalized_config(folder, raw_config(folder), None, None).config
    return read_tokenizer(folder, config, trust_remote_code)[0]


def read_config(source: str | Path, revision: str | None = None) -> ModelConfig:
    """Return the normalised config of a folder or hub id, without fetching or reading weights.

    Where the weights are here, ``dtype`` is what most of their floating bytes are stored in.

    Raises:
        SlimError: As ``load`` does for the same reasons.
    """
    folder = resolve_config(source, revision)
    raw = raw_config(folder)
    names: set[str] | None = None
    tensors: dict[str, Tensor] | None = None
    if any(folder.glob(WEIGHTS)):
        tensors = folder_tensors(folder)
        names = tensor_names(raw, tensors)
        raw = {**raw, "dtype": FLOATS[common_dtype(tensors)]}
    elif (folder / INDEX).exists():
        names = set(read_index(folder))
    return normalized_config(folder, raw, tensors, names).config


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that its answers depend on, sorted."""
    files = {path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(files)


def model_hash(folder: Path) -> str:
    """Return the SHA-256 of a model's weights, configuration and tokenizer: their names and bytes.

    Records beside them (``prune.json``, ``fuse.json``, …) hold times; they do not count.
    """
    return hash_files(model_files(folder))


def read_tokenizer(
    folder: Path, config: ModelConfig, trust: bool
) -> tuple[TokenizerWrapper, list[str]]:
    """Return the tokenizer, fitted to its model, and what to say of it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from mlx_lm.utils import load_tokenizer

    if not any((folder / name).exists() for name in _TOKENIZERS):
        raise SlimError(
            f"{folder} has no tokenizer files", "copy tokenizer.json from the original model"
        )
    check_tokenizer(folder)
    with library_errors(
        f"the tokenizer of {short(folder)} cannot be loaded",
        "download or copy its tokenizer files again",
    ):
        tokenizer = load_tokenizer(
            folder, {"trust_remote_code": trust}, eos_token_ids=config.get("eos_token_id")
        )
        tokenizer.encode("a")  # what it cannot do, it says now
        return tokenizer, fit_tokenizer(tokenizer, config, short(folder))
