"""The model configuration as the mlx-lm model classes read it.

Invariant: a config that comes out of ``normalize_config`` builds the model that its author saved,
or it is refused: no setting that changes logits is silently dropped. Used by loading, conversion
and planning alike. Try it: ``mlx-slim convert FOLDER -o OUT`` prints what it had to change.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from types import ModuleType

from mlx_slim.errors import SlimError
from mlx_slim.models.reference import reference_of
from mlx_slim.models.rope import TYPES, is_positive
from mlx_slim.models.rope_install import differs_in_stock, kind_of
from mlx_slim.models.rope_support import support_of
from mlx_slim.reading import JsonObject, ModelConfig

_BASE_THETA = 10000.0
_ORIGINAL = "use the original model's config"
# The tensor of an output layer, by the names that it has in mlx-lm and on the hub; none of a block.
_HEAD = re.compile(r"(?:[a-z_]+\.)*(?:lm_head|output|embed_out)\.q?weight")
# Modules of mlx-lm whose classes have a head unless the file has none, whatever the config says.
HEAD_BY_FILE = ("gemma3_text", "recurrent_gemma")
_ROTATED = {"partial_rotary_factor", "rotary_pct", "rotary_dim"}


@dataclasses.dataclass(frozen=True)
class Normalized:
    """A configuration ready for mlx-lm.

    Attributes:
        config: A copy of what was given, with the keys that the model class reads.
        notes: What was changed and why, a line each.
    """

    config: ModelConfig
    notes: list[str]


def normalize_config(
    config: ModelConfig, tensor_names: Collection[str] | None = None
) -> Normalized:
    """Return ``config`` with RoPE, tied embeddings and dtype where mlx-lm looks for them.

    * ``rope_parameters`` (transformers >= 5) becomes ``rope_theta``, ``rope_scaling`` and
      ``partial_rotary_factor``, unless the model class reads ``rope_parameters`` itself;
    * ``tie_word_embeddings`` follows from the presence of ``lm_head.weight``;
    * ``torch_dtype`` is set from ``dtype``.

    Args:
        config: The parsed ``config.json``.
        tensor_names: Names of the tensors on disk; None leaves ``tie_word_embeddings`` alone.

    Raises:
        SlimError: If the model type is unknown, or the class cannot do what the config asks.
    """
    config = copy.deepcopy(config)
    notes: list[str] = []
    module = model_module(config)
    _flatten_rope(config, module, notes, strict=True)
    _tie(config, module, tensor_names, notes)
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = _import(str(text.get("model_type", ""))) or module
        _flatten_rope(text, inner, notes, strict=False)
        _tie(text, inner, tensor_names, notes)
    _note_stock(config, module, notes)
    if "torch_dtype" not in config and isinstance(config.get("dtype"), str):
        config["torch_dtype"] = config["dtype"]
    return Normalized(config, notes)


def _note_stock(config: ModelConfig, module: ModuleType, notes: list[str]) -> None:
    """Say where mlx-lm by itself would compute other logits of this config."""
    ropes = [rope for rope in reference_of(config).rope if rope and rope["rope_type"] in TYPES]
    support = support_of(module.__name__)
    if other := {rope["rope_type"] for rope in ropes if differs_in_stock(rope, support)}:
        names = ", ".join(sorted(other))
        notes.append(f"RoPE {names} is computed as transformers does; mlx-lm by itself does not")


def model_module(config: ModelConfig) -> ModuleType:
    """Return the module of ``mlx_lm.models`` that implements ``config["model_type"]``.

    A config that brings its own ``model_file`` is checked by the loader, not here.

    Raises:
        SlimError: If the type is absent or unknown; with the closest known one.
    """
    from mlx_lm.utils import MODEL_REMAPPING, _get_classes

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SlimError(
            "config.json has no model_type", "give a language model in Hugging Face format"
        )
    if config.get("model_file"):
        return importlib.import_module("mlx_lm.models.base")
    try:
        model_class, _ = _get_classes(config)
    except (ValueError, AttributeError, SystemExit) as error:
        types = {*architectures(), *MODEL_REMAPPING}
        close = difflib.get_close_matches(model_type, sorted(types), n=1, cutoff=0.6)
        version = metadata.version("mlx-lm")
        hint = f"did you mean {close[0]!r}?" if close and close[0] != model_type else ""
        raise SlimError(
            f"unknown model type {model_type!r}: not among the {len(types)} of mlx-lm {version}",
            hint or "a newer mlx-lm may support it",
        ) from error
    return importlib.import_module(model_class.__module__)


def architectures() -> list[str]:
    """Return the model types that mlx-lm implements, by name of their module."""
    import mlx_lm.models as package

    names = []
    for root in package.__path__:
        for entry in pkgutil.iter_modules([root]):
            source = Path(root) / f"{entry.name}.py"
            if source.exists() and "class ModelArgs" in source.read_text(encoding="utf-8"):
                names.append(entry.name)
    return sorted(names)


def _import(model_type: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"mlx_lm.models.{model_type}") if model_type else None
    except (ImportError, SystemExit):
        return None


def _fields(module: ModuleType) -> set[str]:
    args = getattr(module, "ModelArgs", None)
    return {f.name for f in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else set()


def _text_fields(module: ModuleType) -> set[str]:
    """Return the fields of the class of ``module`` that reads a nested configuration, if any."""
    kinds = (getattr(module, name, None) for name in ("TextArgs", "TextConfig", "TextModelArgs"))
    return {
        f.name for kind in kinds if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)
    }


def _tie(
    config: ModelConfig,
    module: ModuleType,
    tensor_names: Collection[str] | None,
    notes: list[str],
) -> None:
    heads = [name for name in tensor_names or () if _HEAD.fullmatch(name)]
    if heads and module.__name__.rpartition(".")[2] in HEAD_BY_FILE:
        config["tie_word_embeddings"] = False
    if not tensor_names or "tie_word_embeddings" not in _fields(module):
        return
    tied = not heads
    if config.get("tie_word_embeddings") is not tied:
        was = config.get("tie_word_embeddings", "absent")
        state = "absent: tied" if tied else "present: not tied"
        name = heads[0] if heads else "lm_head.weight"
        notes.append(f"{name} is {state} (tie_word_embeddings was {was})")
    config["tie_word_embeddings"] = tied


def _flatten_rope(
    config: ModelConfig, module: ModuleType, notes: list[str], *, strict: bool
) -> None:
    fields = _fields(module) if strict else _fields(module) | _text_fields(module)
    scaling = config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise SlimError(f"config.json: rope_scaling is {scaling!r}, expected an object", _ORIGINAL)
    inside = (scaling or {}).keys() & {"rope_theta", "partial_rotary_factor"}
    if scaling and "rope_parameters" not in fields and (inside or config.get("rope_parameters")):
        # transformers >= 5 reads these and forgets rope_parameters.
        config["rope_parameters"], config["rope_scaling"] = scaling, None
    parameters = config.get("rope_parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise SlimError(
            f"config.json: rope_parameters is {parameters!r}, expected an object", _ORIGINAL
        )
    if isinstance(parameters, dict) and "rope_parameters" not in fields:
        if not (parameters and all(isinstance(value, dict) for value in parameters.values())):
            _lift_rope(config, parameters, fields, notes)
            del config["rope_parameters"]
        elif (main := _one_rope(config, parameters, fields, notes)) is not None:
            _lift_rope(config, main, fields, notes)
            del config["rope_parameters"]
    if "rope_theta" in fields and config.get("rope_theta") is None:
        _default_theta(config, notes)
    # Of a class without the field only GLM's is known to rotate another part than transformers.
    if "partial_rotary_factor" in fields or config.get("model_type") == "glm":
        _default_part(config, notes)
    theta = config.get("rope_theta")
    if theta is not None and not is_positive(theta):
        text = f"config.json: rope_theta is {theta!r}, expected a number above 0"
        raise SlimError(text, _ORIGINAL)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_parameters" not in fields:
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind:  # older classes read "type", newer ones "rope_type"
            scaling.setdefault("type", kind)
            scaling.setdefault("rope_type", kind)
        if strict and fields:
            _check_rope_type(config, str(kind or "default"), module, fields)
    if strict and fields and "rope_parameters" not in fields:
        _check_rope_values(config, fields)
    if "sliding_window_pattern" in fields and "layer_types" not in fields:
        _lift_pattern(config, notes)


def _lift_pattern(config: ModelConfig, notes: list[str]) -> None:
    """Turn ``layer_types`` into the pattern that a class reads: each p-th layer sees all tokens."""
    types = config.get("layer_types")
    if not isinstance(types, list) or "sliding_window_pattern" in config:
        return
    full = [kind == "full_attention" for kind in types]
    pattern = full.index(True) + 1 if True in full else len(full) + 1
    if full != [(layer + 1) % pattern == 0 for layer in range(len(full))]:
        raise SlimError(
            f"layer_types of {config['model_type']!r} are no regular pattern of sliding and full "
            "attention, which the mlx-lm class requires",
            "loading it would give wrong logits; a newer mlx-lm may support it",
        )
    config["sliding_window_pattern"] = pattern
    notes.append(f"sliding_window_pattern {pattern} taken from layer_types")


def _one_rope(
    config: ModelConfig, parameters: JsonObject, fields: set[str], notes: list[str]
) -> JsonObject | None:
    """Return the main entry of per-layer-type parameters; the sliding one goes to its own key.

    None where the class cannot express them: ``rope_install.py`` puts them in, layer by layer.
    """
    main = parameters.get("full_attention") or next(iter(parameters.values()))
    for local in ("rope_local_base_freq", "swa_rope_theta"):
        if local in fields and "sliding_attention" in parameters:
            sliding = parameters["sliding_attention"]
            if sliding.get("rope_type", "default") == "default" and "rope_theta" in sliding:
                config[local] = sliding["rope_theta"]
                notes.append(f"{local} {config[local]:g} taken from rope_parameters")
                return main
    if any(value != main for value in parameters.values()):
        if reference_of(config).by_layer:
            config["rope_theta"] = main.get("rope_theta", config.get("rope_theta"))
            notes.append(f"rotary embeddings by layer type ({', '.join(sorted(parameters))})")
            return None
        raise SlimError(
            f"rope_parameters differ by layer type ({', '.join(sorted(parameters))}), which the "
            f"mlx-lm class of {config.get('model_type')!r} does not support",
            "loading it would give wrong logits; a newer mlx-lm may support it",
        )
    return main


def _default_theta(config: ModelConfig, notes: list[str]) -> None:
    """Write down the theta that a config leaves to transformers: mlx-lm's defaults are others."""
    reference = reference_of(config)
    pairs = zip(reference.windows, reference.rope, strict=True)
    # The key is that of full attention; sliding layers may have one of their own.
    ropes = [rope for _, rope in sorted(pairs, key=lambda pair: pair[0] is not None) if rope]
    rope = ropes[0] if ropes else {}
    if (theta := rope.get("rope_theta")) is not None:
        config["rope_theta"] = theta
        notes.append(f"rope_theta {theta:g} is transformers' default for this model type")


def _default_part(config: ModelConfig, notes: list[str]) -> None:
    """Write down the rotated part of a head that a config leaves to transformers."""
    if config.get("partial_rotary_factor") is None:
        ropes = [rope for rope in reference_of(config).rope if rope]
        part = ropes[0].get("partial_rotary_factor") if ropes else None
        if part is not None:
            config["partial_rotary_factor"] = part
            notes.append(f"partial_rotary_factor {part:g} is transformers' default")


def _lift_rope(
    config: ModelConfig, parameters: JsonObject, fields: set[str], notes: list[str]
) -> None:
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    part = parameters.pop("partial_rotary_factor", None)
    if theta is not None:
        config["rope_theta"] = theta
        if "rotary_emb_base" in fields:
            config["rotary_emb_base"] = theta
        notes.append(f"rope_theta {theta:g} taken from rope_parameters")
    if part is not None:
        config["partial_rotary_factor"] = part
        if "rotary_pct" in fields:
            config["rotary_pct"] = part
        notes.append(f"partial_rotary_factor {part:g} taken from rope_parameters")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        config["rope_scaling"] = None
        return
    config["rope_scaling"] = parameters
    original = parameters.get("original_max_position_embeddings")
    if original is not None and "original_max_position_embeddings" in fields:
        config.setdefault("original_max_position_embeddings", original)
    notes.append(f"rope_scaling {kind} taken from rope_parameters")


def _check_rope_type(config: ModelConfig, kind: str, module: ModuleType, fields: set[str]) -> None:
    """Refuse a RoPE type that neither ``models/rope_install.py`` nor the class computes."""
    if kind == "default" or kind_of({"type": kind}) in TYPES:
        return
    if "rope_scaling" not in fields or not support_of(module.__name__).computes(kind):
        raise SlimError(
            f"RoPE type {kind!r} is unknown to the mlx-lm class of {config['model_type']!r}",
            "loading it would give wrong logits; a newer mlx-lm may support it",
        )


def _check_rope_values(config: ModelConfig, fields: set[str]) -> None:
    """Refuse a theta or a rotated part that the class has no field for."""
    name = config["model_type"]
    if "text_config" in fields or isinstance(config.get("text_config"), dict):
        return
    theta = config.get("rope_theta")
    has_theta = fields & {"rope_theta", "rotary_emb_base", "layer_rope_theta"}
    if isinstance(theta, (int, float)) and theta != _BASE_THETA and not has_theta:
        raise SlimError(
            f"rope_theta {theta:g} is not supported by the mlx-lm class of {name!r}",
            "loading it would give wrong logits; a newer mlx-lm may support it",
        )
    part = config.get("partial_rotary_factor")
    if isinstance(part, (int, float)) and part != 1 and not fields & _ROTATED:
        raise SlimError(
            f"partial_rotary_factor {part:g} is not supported by the mlx-lm class of {name!r}",
            "loading it would give wrong logits; a newer mlx-lm may support it",
        )
