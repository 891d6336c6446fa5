"""What transformers computes for a config: rotary embeddings, attention windows, the activation.

Invariant: the answer is that of transformers' own configuration class (its defaults, its renamed
keys, its layer types), which needs no PyTorch; only where transformers does not know the model
type, or refuses the config, are the raw keys read. Used by ``rope.py`` and ``limits.py``: what
mlx-lm's class does is compared with what was trained. Try it: ``make parity``.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

from mlx_slim.reading import JsonObject, ModelConfig

# Keys of config.json that are about storage or tokens: transformers would only warn of them.
_UNRELATED = (
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_file",
    "pad_token_id",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
_RENAMED = {"su": "longrope"}  # Phi-3's name for it before transformers had one
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the layers of a model compute, as transformers reads its config.

    Attributes:
        rope: For each layer the ``rope_parameters`` of transformers (``rope_type``, ``rope_theta``,
            what the type needs); None where it is not known or there is none.
        windows: For each layer how many tokens a token sees, itself included; None for all.
        positions: ``max_position_embeddings``, tokens; None if the config does not say.
        by_layer: The parameters of ``rope`` differ between layers.
        activation: Of the feed-forward part, such as ``silu``; None if the config does not say.
        from_transformers: transformers knows the model type; else the raw keys were read.
    """

    rope: list[JsonObject | None]
    windows: list[int | None]
    positions: int | None
    by_layer: bool
    activation: str | None
    from_transformers: bool


def reference_of(config: ModelConfig) -> Reference:
    """Return what transformers computes for ``config``, raw or normalised."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    reference = _reference_config(config)
    layers = inner.get("num_hidden_layers")
    if reference is not None and layers not in (None, reference.num_hidden_layers):
        reference = None  # of another part: transformers nests the language model, this config not
    layers = layers if reference is None else reference.num_hidden_layers
    layers = layers if isinstance(layers, int) else 0
    if reference is None:
        return _raw(inner, layers)
    rope = getattr(reference, "rope_parameters", None) or None
    types = _layer_types(reference, layers)
    if isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values()):
        # By layer type, transformers reads "truncate" beside the types, never in one.
        read = {
            kind: {**one, "truncate": rope.get("truncate", True)}
            for kind, one in rope.items()
            if isinstance(one, dict)
        }
        ropes = [read.get(kind) for kind in types or [_FULL] * layers]
    else:
        ropes = [rope] * layers
    return Reference(
        ropes,
        _windows(reference, types, layers),
        getattr(reference, "max_position_embeddings", None),
        any(one != ropes[0] for one in ropes),
        getattr(reference, "hidden_act", None) or getattr(reference, "hidden_activation", None),
        True,
    )


def _reference_config(config: ModelConfig) -> Any | None:
    """Return transformers' text configuration object; None where it has none for ``config``."""
    from transformers import AutoConfig, PreTrainedConfig

    values = {key: value for key, value in copy.deepcopy(config).items() if key not in _UNRELATED}
    kind = values.pop("model_type", None)
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key in ("rope_scaling", "rope_parameters"):
            _rename(part.get(key), part)
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)  # its remarks on a config are not about this command
    try:
        reference = AutoConfig.for_model(str(kind), **values).get_text_config()
        if hasattr(reference, "standardize_rope_params"):  # again, with what is an extra key of its
            reference.standardize_rope_params()  # class, as transformers does where it rotates
        return reference if isinstance(reference, PreTrainedConfig) else None  # no part's raw keys
    except Exception:  # each class validates in its own way; the raw keys are read then
        return None
    finally:
        log.setLevel(level)


def _rename(rope: Any, config: ModelConfig) -> None:
    """Give old names of a RoPE type their new ones, in place."""
    if not isinstance(rope, dict):
        return
    kind = rope.get("rope_type") or rope.get("type")
    if kind in _RENAMED:
        rope["type"] = rope["rope_type"] = _RENAMED[kind]
        original = config.get("original_max_position_embeddings")
        if original is not None:
            rope.setdefault("original_max_position_embeddings", original)


def _layer_types(reference: Any, layers: int) -> list[str] | None:
    """Return the layer types that the modelling code reads; a mere extra key is not read."""
    types = (
        getattr(reference, "layer_types", None) if hasattr(type(reference), "layer_types") else None
    )
    if not isinstance(types, (list, tuple)):
        return None
    return list(types) if len(types) == layers else [str(_FULL)] * layers


def _windows(reference: Any, types: list[str] | None, layers: int) -> list[int | None]:
    declared = hasattr(type(reference), "sliding_window")  # not read where it is a mere extra key
    window = reference.sliding_window if declared else None
    if (
        not isinstance(window, int)
        or window < 1
        or getattr(reference, "use_sliding_window", 1) is False
    ):
        return [None] * layers
    if types is None:
        return [window] * layers
    return [window if kind == _SLIDING else None for kind in types]


def _raw(config: ModelConfig, layers: int) -> Reference:
    """Read the keys themselves."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    rope = copy.deepcopy(rope) if isinstance(rope, dict) else None
    if rope is not None:
        _rename(rope, config)
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if (theta := config.get("rope_theta")) is not None:
            rope.setdefault("rope_theta", theta)
        original = config.get("original_max_position_embeddings")
        original = original or config.get("max_position_embeddings")
        if original and rope["rope_type"] in ("llama3", "longrope", "yarn"):
            rope.setdefault("original_max_position_embeddings", original)
    types = config.get("layer_types")
    types = list(types) if isinstance(types, list) and len(types) == layers else None

    class _Keys:
        sliding_window = config.get("sliding_window")
        use_sliding_window = config.get("use_sliding_window", True)

    return Reference(
        [rope] * layers,
        _windows(_Keys(), types, layers),
        config.get("max_position_embeddings"),
        False,
        config.get("hidden_act"),
        False,
    )
