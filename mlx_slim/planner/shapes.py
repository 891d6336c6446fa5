"""Memory of a recipe before the first step, counted from shapes alone.

Invariant: nothing is evaluated and no weights are read. The model is built, cast, quantized and
searched for adapter targets by the code that trains it, over arrays that MLX never computes; so
counts and bytes are exact. Try it: ``mlx-slim plan tinyllama-qlora --json``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_slim.adapters.inject import Site, choose, sites
from mlx_slim.adapters.lora import dimensions, factor_shapes, is_experts
from mlx_slim.adapters.pooled import check_pooled
from mlx_slim.adapters.saved import candidates, choose_saved, saved_shapes
from mlx_slim.config.schema import Recipe
from mlx_slim.errors import SlimError
from mlx_slim.models.attention import Attention
from mlx_slim.models.build import WIDTHS, build
from mlx_slim.models.quantized import LayerFormat, is_quantized, layer_dtype
from mlx_slim.models.structure import (
    EMBEDDINGS,
    GATED_MLP,
    HEAD_NAMES,
    has_candidates,
    is_capped,
)
from mlx_slim.planner.skeleton import modules_of
from mlx_slim.quantization.policy import make_policy
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import DTYPES
from mlx_slim.training.optim import Optimizer

FULL_PRECISION_BYTES = 4


@dataclass(frozen=True)
class Block:
    """One transformer block: numbers per token of the quantities that activations consist of.

    Attributes:
        width: d, the residual stream.
        norms: Normalisation layers.
        queries: The sum over query heads.
        keys: The sum over key heads (values are as many).
        heads: Query heads.
        inner: The widest layer, f; in a mixture of experts, of all experts of one token.
        inputs: Σ inputs of the adapted layers; of experts, of all of one token.
        outputs: Σ outputs of the adapted layers, likewise.
        routed: The copies of a token that adapted experts read, sorted by expert; 0 without.
        largest: Numbers of the largest weight matrix.
        linear: Numbers of all weight matrices.
        gated: Whether the MLP is gated by SiLU (SwiGLU).
        fused_length: Positions of the longest row whose attention Metal's fused backward pass
            takes; 0 for none.
        in_pieces: Whether a CPU trains it in pieces (``training/blockwise.py``).
    """

    width: int
    norms: int
    queries: int
    keys: int
    heads: int
    inner: int
    inputs: int
    outputs: int
    routed: int
    largest: int
    linear: int
    gated: bool
    fused_length: int = 0
    in_pieces: bool = False

    def scores(self, length: int, fused: bool) -> int:
        """Return the attention scores that are stored for each position of a row.

        Args:
            length: Positions of the row.
            fused: Whether the device has a fused backward pass and the rows need no array mask.
        """
        return 0 if fused and length <= self.fused_length else self.heads * length


@dataclass(frozen=True)
class TrainingShapes:
    """Sizes of a model and of what a recipe adds to it.

    Attributes:
        parameters: Numbers of the dense base model.
        quantized: Whether the base is quantized when training starts.
        base_bytes: The base in memory.
        loading_bytes: Peak while it is loaded, a tensor at a time.
        quantized_here: Whether the run quantizes it.
        rounded_bytes: The layers that ``quantize.qat`` rounds, a second time.
        adapter_bytes: Adapter parameters and their frozen arrays.
        trainable: Path -> shape.
        trainable_bytes: One copy of the trainable parameters, in their dtype.
        gradient_bytes: One float32 gradient of them.
        optimizer_bytes: Moments, counters and float32 masters.
        blocks: First to last.
        vocabulary: V.
        width: d.
        head_trains: Whether the head's own weight is trained.
        capped: Whether the logits have a soft cap.
        splits: Whether the model may split into body and head; else it has all logits at once.
        largest: Numbers of the largest trainable parameter.
    """

    parameters: int
    quantized: bool
    base_bytes: int
    loading_bytes: int
    quantized_here: bool
    rounded_bytes: int
    adapter_bytes: int
    trainable: dict[str, tuple[int, ...]] = field(repr=False)
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    blocks: list[Block] = field(repr=False)
    vocabulary: int
    width: int
    head_trains: bool
    capped: bool
    splits: bool
    largest: int

    @property
    def trainable_parameters(self) -> int:
        """Trainable numbers."""
        return self.gradient_bytes // FULL_PRECISION_BYTES


# Model types whose blocks a CPU computes in pieces; others are planned as one graph, which is more.
IN_PIECES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def leaves(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Return (path, array) of every parameter."""
    return tree_flatten(model.parameters())  # pyright: ignore[reportReturnType]


def to_dtype(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make the floating parameters of ``model`` arrays of ``dtype``, unevaluated."""

    def one(value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map(one, model.parameters()))


def _first(config: ModelConfig, *keys: str, default: int) -> int:
    return next((int(config[key]) for key in keys if config.get(key)), default)


def _blocks(
    model: Any,
    config: ModelConfig,
    everything: list[Site],
    chosen: list[Site],
    width: int,
    attention: list[Attention],
) -> list[Block]:
    config = {**config, **(config.get("text_config") or {})}
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", default=max(1, width // 64))
    kv_heads = _first(config, "num_key_value_heads", "n_kv_heads", default=heads)
    head_dim = _first(config, "head_dim", default=max(1, width // heads))
    experts = _first(config, "num_experts_per_tok", default=1)
    silu = config.get("hidden_act", "silu") in ("silu", "swish")
    varied = config.get(WIDTHS) or [{}] * len(model.layers)
    result = []
    for index, block in enumerate(model.layers):
        inside = [s for s in everything if s.block == index]
        sides = [_sides(s.module) for s in inside]
        ours = [_sides(s.module) for s in chosen if s.block == index]
        mixed = any(len(side) == 3 for side in sides)
        result.append(
            Block(
                width=width,
                norms=sum("norm" in type(m).__name__.lower() for m in block.modules()),
                queries=varied[index].get("heads", heads) * head_dim,
                keys=varied[index].get("kv_heads", kv_heads) * head_dim,
                heads=varied[index].get("heads", heads),
                inner=max((max(s[-2:]) for s in sides), default=width) * (experts if mixed else 1),
                inputs=sum(s[-2] * (experts if len(s) == 3 else 1) for s in ours),
                outputs=sum(s[-1] * (experts if len(s) == 3 else 1) for s in ours),
                routed=experts * width * any(len(s) == 3 and s[-2] == width for s in ours),
                largest=max((s[-1] * s[-2] for s in sides), default=0),
                linear=sum(s[-1] * s[-2] * (experts if len(s) == 3 else 1) for s in sides),
                gated=silu and any(s.inside.endswith(GATED_MLP[0]) for s in inside),
                fused_length=attention[index].fused_length,
                in_pieces=silu and config.get("model_type") in IN_PIECES,
            )
        )
    return result


def _sides(module: Any) -> tuple[int, ...]:
    """(inputs, outputs) of a linear layer; (experts, inputs, outputs) of an expert layer."""
    inside = dimensions(module)
    return (module.num_experts, *inside) if is_experts(module) else inside


def refuse_quantized(recipe: Recipe) -> None:
    """Check that the model is not quantized where ``recipe`` needs float weights.

    Raises:
        SlimError: With what would work.
    """
    if recipe.method == "full" or recipe.quantize.qat:
        full = recipe.method == "full"
        why = "method=full trains every" if full else "quantize.qat rounds each"
        raise SlimError(
            f"{recipe.model} is quantized, and {why} weight",
            "use method=qlora, or dequantize it first: mlx-slim convert MODEL -o DIR --dequantize",
        )


def training_shapes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype) -> TrainingShapes:
    """Return the sizes of the model of ``config`` under ``recipe``.

    Args:
        config: ``config.json``, normalised.
        recipe: Method, adapter, quantization and optimizer.
        dtype: Of the base's floating weights.

    Raises:
        SlimError: If the model cannot be built, a target matches nothing, or the recipe
            trains a quantized model in full.
    """
    model, attention = modules_of(config)
    quantized = is_quantized(model)
    dense = build({**config, "quantization": None}) if quantized else model
    parameters = sum(value.size for _, value in leaves(dense))
    to_dtype(model, DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), mx.bfloat16))
    stored = {path: value.nbytes for path, value in leaves(model)}
    to_dtype(model, dtype)
    cast = {path: value.nbytes for path, value in leaves(model)}
    if quantized:
        refuse_quantized(recipe)
    quantized_here = recipe.method == "qlora" and not quantized
    chosen_formats: dict[str, LayerFormat] = {}
    if quantized_here:
        chosen_formats = make_policy(model, recipe.quantize).chosen
        settings = recipe.quantize
        nn.quantize(
            model,
            group_size=settings.group_size,
            bits=settings.bits,
            mode=settings.mode,
            class_predicate=lambda path, module: (
                asdict(chosen_formats[path]) if path in chosen_formats else False
            ),
        )
        quantized = is_quantized(model)
    retained = {path: value.nbytes for path, value in leaves(model)}
    modules = dict(model.named_modules())
    rounds = make_policy(model, recipe.quantize).chosen if recipe.quantize.qat else {}
    rounded_bytes = sum(modules[path]["weight"].nbytes for path in rounds)
    everything = sites(model)
    chosen: list[Site] = []
    frozen = 0
    if recipe.method == "full":
        trainable = {path: (value.shape, value.dtype) for path, value in leaves(model)}
    else:
        chosen = choose(model, recipe.adapter, everything)
        trainable, rank = {}, recipe.adapter.rank
        for site in chosen:
            inputs, outputs = dimensions(site.module)
            shape_a, shape_b = factor_shapes(site.module, rank)
            if recipe.adapter.pooled:
                check_pooled(site.path, site.module)
                shape_a = (site.module["scales"].shape[-1], rank)
            trainable[f"{site.path}.lora_a"] = (shape_a, mx.float32)
            trainable[f"{site.path}.lora_b"] = (shape_b, mx.float32)
            if recipe.adapter.adaptive is not None:
                trainable[f"{site.path}.lora_e"] = ((rank,), mx.float32)
                frozen += 2 * (inputs + outputs + 1) * rank * FULL_PRECISION_BYTES
            if recipe.adapter.init == "pissa":
                frozen += (inputs + outputs) * rank * FULL_PRECISION_BYTES
            if recipe.method == "dora":
                trainable[f"{site.path}.m"] = ((outputs,), mx.float32)
                frozen += outputs * FULL_PRECISION_BYTES  # the cached row norms of W
        saved = choose_saved(model, recipe.adapter.modules_to_save, [s.path for s in chosen])
        for name, shape in saved_shapes(model, saved).items():
            trainable[name] = (shape, layer_dtype(modules[name.rpartition(".")[0]]))
        # What is made dense stays beside it only where the base is saved with the run.
        frozen -= 0 if quantized_here else sum(_bytes(modules[path]) for path in saved)
    bag = nn.Module()
    for path, (shape, kind) in trainable.items():
        bag[path] = mx.zeros(shape, dtype=kind)
    one_copy = sum(value.nbytes for _, value in leaves(bag))
    numbers = sum(value.size for _, value in leaves(bag))
    state = Optimizer(bag, recipe.train).state()
    embeddings = [s for s in everything if s.block is None]
    vocabulary, width = max((_table(s) for s in embeddings), default=(1, 1))
    return TrainingShapes(
        parameters=parameters,
        quantized=quantized,
        base_bytes=sum(retained.values()),
        loading_bytes=_loading_bytes(stored, cast, retained, list(chosen_formats)),
        quantized_here=quantized_here,
        rounded_bytes=rounded_bytes,
        adapter_bytes=0 if recipe.method == "full" else one_copy + frozen,
        trainable={path: shape for path, (shape, _) in trainable.items()},
        trainable_bytes=one_copy,
        gradient_bytes=numbers * FULL_PRECISION_BYTES,
        optimizer_bytes=sum(value.nbytes for value in state.values()),
        blocks=_blocks(model, config, everything, chosen, width, attention),
        vocabulary=vocabulary,
        width=width,
        head_trains=recipe.method == "full" or _trains_head(model, trainable),
        capped=is_capped(model),
        splits=has_candidates(model),
        largest=max((value.size for _, value in leaves(bag)), default=0),
    )


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for _, value in leaves(module))


def _trains_head(model: nn.Module, trainable: Collection[str]) -> bool:
    """Return whether the weight of the head is trained, be it the embedding."""
    names = {path.rsplit(".", 1)[-1] for path in candidates(model)}
    heads = HEAD_NAMES if names & set(HEAD_NAMES) else EMBEDDINGS
    return any(path.rsplit(".", 2)[-2:] == [head, "weight"] for path in trainable for head in heads)


def _loading_bytes(
    stored: dict[str, int], cast: dict[str, int], retained: dict[str, int], quantized: list[str]
) -> int:
    """Return the peak of loading: layers are quantized one by one, then the rest is read.

    Args:
        stored: Bytes of each parameter on disk.
        cast: In the dtype of computation.
        retained: Of each parameter that stays.
        quantized: Layers that are quantized, in their order.
    """
    loaded = peak = 0

    def read(name: str, more: int) -> None:
        nonlocal peak
        needed = cast[name] + (stored[name] if stored[name] != cast[name] else 0)
        peak = max(peak, loaded + needed + more)

    rest = dict(retained)
    for path in quantized:
        sizes = [rest.pop(f"{path}.{part}", 0) for part in ("weight", "scales", "biases")]
        read(f"{path}.weight", sum(sizes))
        loaded += sum(sizes)
    for name, size in rest.items():
        read(name, 0)
        loaded += size
    return max(peak, loaded)


def _table(site: Site) -> tuple[int, int]:
    """(vocabulary, width) of an embedding or of a head outside the blocks."""
    one, other = _sides(site.module)[-2:]
    return max(one, other), min(one, other)
