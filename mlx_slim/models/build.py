"""A config becomes a model without weights: what planning counts and pruning fills.

Invariant: nothing is evaluated, and the caller's random state stays; widths that differ per layer
(the key ``mlx_slim_widths`` that ``mlx-slim prune --no-uniform`` writes) are those of the blocks,
and rotary embeddings those of the config (``rope_install.py``).
Stock mlx-lm does not know that key: it refuses such a folder, whose tensors do not fit the widths
of the config's own keys. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2 --dry-run``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models import rope_install, structure
from mlx_slim.models.activations import use_tanh_gelu
from mlx_slim.models.kinds import HEADS, MLP
from mlx_slim.models.normalize import HEAD_BY_FILE
from mlx_slim.models.quantizable import has_quantized_form
from mlx_slim.models.reference import reference_of
from mlx_slim.models.rope_support import support_of
from mlx_slim.reading import JsonObject, ModelConfig, library_errors

WIDTHS = "mlx_slim_widths"
_KEYS = {"heads", "kv_heads", "intermediate_size"}


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the caller's random state back afterwards: layers draw numbers when they are made."""
    state = cast(list[mx.array], mx.random.state)
    high, low = cast(list[int], state[0].tolist())
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a key is its seed in two words


def build(config: ModelConfig) -> nn.Module:
    """Return the model of ``config``, quantized where the config says so, without evaluating it.

    Raises:
        SlimError: If mlx-lm does not know the model type, or the config does not fit it.
    """
    kind = config.get("model_type")
    with (
        preserved_random_state(),
        library_errors(
            f"no model can be built from this config (model_type {kind!r})",
            "the config.json must be that of a model that mlx-lm knows",
        ),
    ):
        model = construct(config)
        _tie_head(model, config)
    if quantization := config.get("quantization"):
        base = {k: quantization[k] for k in ("group_size", "bits", "mode") if k in quantization}

        def decide(path: str, module: nn.Module) -> bool | JsonObject:
            if path in quantization:
                return quantization[path]
            width = getattr(module, "weight", mx.zeros((1, 1))).shape[-1]
            return has_quantized_form(module) and width % base["group_size"] == 0

        nn.quantize(model, **base, class_predicate=decide)
    return model


def _tie_head(model: nn.Module, config: ModelConfig) -> None:
    """Drop the head that a class builds until it sees that the file of a tied model has none."""
    text, owner = config.get("text_config", config), model.get("language_model", model)
    module = type(owner).__module__.rpartition(".")[2]
    if module in HEAD_BY_FILE and text.get("tie_word_embeddings", True):
        owner.sanitize({})


def construct(config: ModelConfig) -> nn.Module:
    """Return the dense model of ``config``: its class, with our widths, RoPE and activation.

    Raises:
        SlimError: If the config asks for a RoPE or widths that the class cannot have.
        ValueError: And others of mlx-lm's, if the config does not fit the class.
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    reads_scaling = support_of(model_class.__module__).reads_scaling
    arguments = config if reads_scaling else rope_install.plain_config(config)
    model = model_class(args_class.from_dict(arguments))
    _initialise(model)
    apply_widths(model, config)
    reference = reference_of(config)
    rope_install.install(model, config, reference)
    use_tanh_gelu(model, reference.activation)
    return model


def _initialise(model: nn.Module) -> None:
    """Give a module whose class forgets to call ``nn.Module.__init__`` what that sets."""
    for module in model.modules():
        if not hasattr(module, "_no_grad"):  # recurrent_gemma
            module._no_grad, module._training = set(), True


def apply_widths(model: nn.Module, config: ModelConfig) -> None:
    """Give the blocks of a model that has no weights yet the widths of ``mlx_slim_widths``.

    Raises:
        SlimError: If the key does not fit the model.
    """
    widths = config.get(WIDTHS)
    if widths is None:
        return
    blocks = structure.blocks(model)
    if not isinstance(widths, list) or len(widths) != len(blocks):
        seen = f"{len(widths)} entries" if isinstance(widths, list) else repr(widths)
        raise SlimError(
            f"config.json: {WIDTHS} has {seen}, the model {len(blocks)} layers",
            "config.json and the weights must come from the same model",
        )
    for index, (block, entry) in enumerate(zip(blocks, widths, strict=True)):
        families = structure.coupled(block)
        fits = isinstance(entry, dict) and entry.keys() == _KEYS
        fits = fits and all(type(value) is int and value > 0 for value in entry.values())
        if not fits or families.keys() != {HEADS, MLP}:
            raise SlimError(
                f"config.json: {WIDTHS}[{index}] is {entry!r}",
                f"expected {', '.join(sorted(_KEYS))}, whole numbers above 0",
            )
        group_size = families[HEADS].queries_per_group
        if entry["heads"] != group_size * entry["kv_heads"]:
            raise SlimError(
                f"config.json: {WIDTHS}[{index}] has {entry['heads']} heads over "
                f"{entry['kv_heads']} key-value heads",
                f"{group_size} query heads share a key-value head in this model",
            )
        counts = {HEADS: entry["kv_heads"], MLP: entry["intermediate_size"]}
        structure.resize(block, counts)


def widths_of(model: nn.Module) -> list[dict[str, int]]:
    """Return ``mlx_slim_widths`` of a dense model."""
    widths = []
    for block in structure.blocks(model):
        families = structure.coupled(block)
        heads = families[HEADS]
        widths.append(
            {
                "heads": heads.count * heads.queries_per_group,
                "kv_heads": heads.count,
                "intermediate_size": families[MLP].count,
            }
        )
    return widths


def refuse_unnamed(
    config: ModelConfig, kinds: Collection[str], format_name: str, way_out: str
) -> None:
    """Refuse a model type for whose tensors ``format_name`` has no names here.

    Args:
        config: Of the model.
        kinds: The model types that can be written.
        format_name: As the message calls it.
        way_out: What to do instead, or why; the nearest of ``kinds`` stands before it.

    Raises:
        SlimError: With what would work.
    """
    kind = config.get("model_type", "")
    if kind not in kinds:
        raise SlimError(
            f"{kind} models cannot be exported to {format_name}",
            f"{did_you_mean(kind, kinds)}; {way_out}",
        )


def refuse_varied(config: ModelConfig, format_name: str) -> None:
    """Refuse a model whose widths differ per layer, where ``format_name`` cannot say them.

    Raises:
        SlimError: With what would work.
    """
    if config.get(WIDTHS) is not None:
        raise SlimError(
            f"this model's widths differ per layer, which {format_name} cannot store",
            "prune with --uniform: then every toolkit reads it",
        )
