"""A folder becomes a model whose weights are not read yet: the first half of loading.

Invariant: the config traps are mended (``normalize_config``), every tensor of the files is in the
model and the other way round, and nothing is evaluated but by ``read_weights``: a parameter's
tensor is read and cast where it is evaluated, and can be dropped before the next. Used by
``models/load.py``, ``models/streamed.py`` and whoever makes one model out of another. Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_slim.errors import SlimError
from mlx_slim.models.build import construct
from mlx_slim.models.config_checks import CONFIG, check_config, read_configs
from mlx_slim.models.finite import check_finite
from mlx_slim.models.gated_delta import use_fast_gated_delta
from mlx_slim.models.gemma import correct_gemma
from mlx_slim.models.half_weights import HalfLinear, keep_half
from mlx_slim.models.normalize import Normalized, normalize_config
from mlx_slim.models.tensors import Tensor, few, folder_tensors, same_bytes
from mlx_slim.progress import tracked
from mlx_slim.reading import ModelConfig, library_errors, short


def open_corrected(
    folder: Path,
    *,
    dtype: mx.Dtype | None = None,
    half_blocks: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, ModelConfig, list[str]]:
    """Return what ``open_weights`` does, its classes computing what the author meant.

    With ``half_blocks`` the matrices of the blocks stay in 16 bits where they are stored so.
    """
    model, config, notes = open_weights(folder, trust_remote_code=trust_remote_code)
    if half_blocks:
        keep_half(model)
    if dtype is not None:
        cast(model, dtype)
    with library_errors(f"{short(folder)}: its weights cannot be read"):
        correct_gemma(model, config)
        use_fast_gated_delta(model)
    return model, config, notes


def open_weights(
    folder: Path, *, dtype: mx.Dtype | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, ModelConfig, list[str]]:
    """Return the model of a folder with weights that MLX has not read yet, its config and notes.

    Evaluating a parameter reads it; a model that drops it then holds one tensor at a time.

    Raises:
        SlimError: As ``load``.
    """
    raw = raw_config(folder)
    tensors = folder_tensors(folder)
    normalized = normalized_config(folder, raw, tensors, tensor_names(raw, tensors))
    model, config = _build(folder, normalized, trust_remote_code)
    if dtype is not None:
        cast(model, dtype)
    return model, config, normalized.notes


def check_runs(model: nn.Module, folder: Path) -> None:
    """Check that the forward pass fits its weights: shapes only, nothing is evaluated.

    Raises:
        SlimError: If it does not.
    """
    with library_errors(f"{short(folder)} cannot be run", "use the original model's config"):
        model(mx.zeros((1, 2), mx.int32))  # type: ignore[operator]


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


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating parameters of ``model`` in place, but those its class keeps in float32.

    Nothing is evaluated (``read_weights`` does it). Integer codes stay; the float32 tensor scale of
    nvfp4 layers stays, and so do the weights that ``keep_half`` named.
    """
    predicate = getattr(model, "cast_predicate", None) or (lambda path: True)
    half = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, HalfLinear)}

    def one(path: str, value: Any) -> Any:
        if not mx.issubdtype(value.dtype, mx.floating) or path.endswith("global_scale"):
            return value
        if path in half:
            return value
        return value.astype(dtype) if predicate(path) else value

    model.update(tree_map_with_path(one, model.parameters()))


def raw_config(folder: Path) -> ModelConfig:
    """Return the config of a folder as its files say it."""
    from mlx_lm.utils import load_config

    read_configs(folder)  # both of its files, before mlx-lm reads them
    return load_config(folder)


def normalized_config(
    folder: Path, raw: ModelConfig, tensors: dict[str, Tensor] | None, names: set[str] | None
) -> Normalized:
    """Return the normalised config, held against the tensors of the folder before."""
    check_config(raw, folder, tensors)
    with library_errors(
        f"{short(folder / CONFIG)} cannot be used", "use the original model's file"
    ):
        return normalize_config(raw, names)


def tensor_names(config: ModelConfig, tensors: dict[str, Tensor]) -> set[str]:
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
