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
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_slim.artifacts import hash_files, public_name
from mlx_slim.errors import SlimError
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.build import construct
from mlx_slim.models.config_checks import CONFIG, check_config, check_tokenizer, read_configs
from mlx_slim.models.finite import check_finite
from mlx_slim.models.gated_delta import use_fast_gated_delta
from mlx_slim.models.gemma import correct_gemma
from mlx_slim.models.hub import resolve, resolve_config
from mlx_slim.models.normalize import Normalized, normalize_config
from mlx_slim.models.quantized import use_fast_matmul
from mlx_slim.models.tensors import (
    FLOATS,
    INDEX,
    WEIGHTS,
    Tensor,
    common_dtype,
    few,
    folder_tensors,
    read_index,
    same_bytes,
)
from mlx_slim.models.tokenizer import fit_tokenizer
from mlx_slim.progress import stage, tracked
from mlx_slim.reading import ModelConfig, library_errors, short

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = [
    "Loaded",
    "cast",
    "load",
    "load_tokenizer",
    "model_files",
    "model_hash",
    "open_weights",
    "read_config",
    "read_tokenizer",
    "read_weights",
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

    Raises:
        SlimError: If the source is absent, incomplete or corrupt, its type unknown, or its tensors
            are not exactly those of the model.
    """
    folder = resolve(source, revision, trust_remote_code=trust_remote_code)
    with stage(f"loading {public_name(source)}"):
        model, config, notes = open_weights(
            folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
        with library_errors(f"{short(folder)}: its weights cannot be read"):
            correct_gemma(model, config)
            use_fast_gated_delta(model)
            if transform is not None:
                config = transform(model, config)
            if not lazy:
                read_weights(model, short(folder))
            mx.eval(constants(model))
    with library_errors(f"{short(folder)} cannot be run", "use the original model's config"):
        model(mx.zeros((1, 2), mx.int32))  # type: ignore[operator]  # shapes only: not evaluated
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
        revision=folder.name if folder.parent.name == "snapshots" else revision,
        notes=[*notes, *more],
    )


def open_weights(
    folder: Path, *, dtype: mx.Dtype | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, ModelConfig, list[str]]:
    """Return the model of a folder with weights that MLX has not read yet, its config and notes.

    Evaluating a parameter reads it; a model that drops it then holds one tensor at a time.

    Raises:
        SlimError: As ``load``.
    """
    raw = _raw_config(folder)
    tensors = folder_tensors(folder)
    normalized = _normalized(folder, raw, tensors, _names(raw, tensors))
    model, config = _build(folder, normalized, trust_remote_code)
    if dtype is not None:
        cast(model, dtype)
    return model, config, normalized.notes


def read_weights(model: nn.Module, where: str = "the weights") -> None:
    """Evaluate the parameters of ``model`` one at a time: what each is made of is freed first.

    Args:
        model: Its parameters may be unread.
        where: Begins the message.

    Raises:
        SlimError: If one holds NaN or infinity.
    """
    tensors: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    check_finite(tracked(tensors, f"reading {where}", "tensors"), where)


def constants(model: nn.Module) -> list[mx.array]:
    """Return the arrays of ``model`` that are no parameters, such as a scale of its code.

    They are evaluated where the model is loaded: another thread could not.
    """
    private = [v for m in model.modules() for name, v in m.items() if name.startswith("_")]
    return [value for _, value in tree_flatten(private) if isinstance(value, mx.array)]


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> TokenizerWrapper:
    """Return the tokenizer of a folder or hub id, weights unread.

    Raises:
        SlimError: As ``load`` does for the same reasons.
    """
    folder = resolve(source, revision, trust_remote_code=trust_remote_code)
    config = _normalized(folder, _raw_config(folder), None, None).config
    return read_tokenizer(folder, config, trust_remote_code)[0]


def read_config(source: str | Path, revision: str | None = None) -> ModelConfig:
    """Return the normalised config of a folder or hub id, without fetching or reading weights.

    Where the weights are here, ``dtype`` is what most of their floating bytes are stored in.

    Raises:
        SlimError: As ``load`` does for the same reasons.
    """
    folder = resolve_config(source, revision)
    raw = _raw_config(folder)
    names: set[str] | None = None
    tensors: dict[str, Tensor] | None = None
    if any(folder.glob(WEIGHTS)):
        tensors = folder_tensors(folder)
        names = _names(raw, tensors)
        raw = {**raw, "dtype": FLOATS[common_dtype(tensors)]}
    elif (folder / INDEX).exists():
        names = set(read_index(folder))
    return _normalized(folder, raw, tensors, names).config


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that its answers depend on, sorted."""
    files = {path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(files)


def model_hash(folder: Path) -> str:
    """Return the SHA-256 of a model's weights, configuration and tokenizer: their names and bytes.

    Records beside them (``prune.json``, ``fuse.json``, …) hold times; they do not count.
    """
    return hash_files(model_files(folder))


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating parameters of ``model`` in place, but those its class keeps in float32.

    Nothing is evaluated (``read_weights`` does it). Integer codes stay; the float32 tensor scale of
    nvfp4 layers stays.
    """
    predicate = getattr(model, "cast_predicate", None) or (lambda path: True)

    def one(path: str, value: Any) -> Any:
        if not mx.issubdtype(value.dtype, mx.floating) or path.endswith("global_scale"):
            return value
        return value.astype(dtype) if predicate(path) else value

    model.update(tree_map_with_path(one, model.parameters()))


def _raw_config(folder: Path) -> ModelConfig:
    from mlx_lm.utils import load_config

    read_configs(folder)  # both of its files, before mlx-lm reads them
    return load_config(folder)


def _normalized(
    folder: Path, raw: ModelConfig, tensors: dict[str, Tensor] | None, names: set[str] | None
) -> Normalized:
    """Return the normalised config, held against the tensors of the folder before."""
    check_config(raw, folder, tensors)
    with library_errors(
        f"{short(folder / CONFIG)} cannot be used", "use the original model's file"
    ):
        return normalize_config(raw, names)


def _names(config: ModelConfig, tensors: dict[str, Tensor]) -> set[str]:
    """Names of the tensors, less an ``lm_head`` that repeats the embedding of a tied model."""
    names = set(tensors)
    if config.get("tie_word_embeddings") is not True:
        return names
    heads = [name for name in names if name.endswith("lm_head.weight")]
    embeddings = [name for name in names if name.endswith("embed_tokens.weight")]
    if len(heads) == len(embeddings) == 1 and _equal(tensors, heads[0], embeddings[0]):
        names.remove(heads[0])
    return names


def _equal(tensors: dict[str, Tensor], one: str, other: str) -> bool:
    a, b = tensors[one], tensors[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.dtype.startswith(("F", "BF")):
        return False
    return same_bytes(a, b)


def _build(folder: Path, normalized: Normalized, trust: bool) -> tuple[nn.Module, ModelConfig]:
    from mlx_lm.utils import load_model

    def classes(config: ModelConfig) -> tuple[Any, Any]:
        def build(config: ModelConfig) -> nn.Module:
            model = construct(config)
            # All that does not fit in one error: the stock check stops at the first kind.
            object.__setattr__(
                model,
                "load_weights",
                lambda weights, strict=True: fill(model, folder, dict(weights)),
            )
            return model

        return build, _Config

    if normalized.config.get("model_file") and not trust:
        raise SlimError(
            f"{folder} has its own model code, which is not run by default",
            "review it, then pass --trust-remote-code",
        )
    kind = normalized.config["model_type"]
    with library_errors(
        f"{short(folder)} does not fit mlx-lm's model class {kind!r}",
        "its config.json or its weights do not match that model type",
    ):
        model, config = load_model(
            folder,
            lazy=True,
            model_config=normalized.config,
            get_model_classes=classes,
            trust_remote_code=trust,
        )
    model.__dict__.pop("load_weights", None)
    return model, config


class _Config:
    """Stands for the class of arguments: ``construct`` reads the config itself."""

    @staticmethod
    def from_dict(config: ModelConfig) -> ModelConfig:
        """Return ``config``."""
        return config


def fill(model: nn.Module, folder: Path, tensors: dict[str, mx.array]) -> nn.Module:
    """Put ``tensors`` into ``model``; raise with all differences if they are not its parameters."""
    expected = dict(tree_flatten(model.parameters()))
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"{len(missing)} missing tensors ({few(missing)})")
    if extra := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{len(extra)} unexpected tensors ({few(extra)})")
    shapes = [
        f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} wrong shapes ({few(shapes)})")
    if problems:
        raise SlimError(
            f"{folder}: weights and config.json disagree: {'; '.join(problems)}",
            "config.json and the weights must come from the same model",
        )
    return nn.Module.load_weights(model, list(tensors.items()), strict=False)


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
