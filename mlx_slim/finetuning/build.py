"""What a training run is built from: the model with its trainable parameters, the rows, the loop.

Invariant: one way to build each of them, for every command that trains, probes or measures.
Try it: ``mlx-slim plan smollm2-lora --probe``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_slim import events
from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.stack import adapter_folder, combined, parse_adapters, used_folders
from mlx_slim.adapters.start import read_start, start_from
from mlx_slim.adapters.variants import learning_rate_scale
from mlx_slim.config.schema import DataConfig, Recipe, SourceConfig
from mlx_slim.data.batches import Batcher, Mode, RowStore, choose_mode
from mlx_slim.data.prepare import Prepared, prepare
from mlx_slim.data.shapes import SHAPES, VALIDATION_SHAPES
from mlx_slim.data.shared import shared_fraction
from mlx_slim.data.sources import Source
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.finetuning.prefix_sharing import can_have_prefix_sharing
from mlx_slim.finetuning.rounds import COMPILED_SHAPES
from mlx_slim.finetuning.sharding import shards
from mlx_slim.finetuning.tuned import Tuned
from mlx_slim.models import structure
from mlx_slim.models.attention import attention_balance, fused_here, reads_other_blocks
from mlx_slim.models.load import Loaded, load, read_config
from mlx_slim.models.quantized import is_quantized
from mlx_slim.models.rope import boundary_of
from mlx_slim.models.row_limits import shortest_limit
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.tokenizer import keep_within
from mlx_slim.models.verified_save import stored_dtype
from mlx_slim.planner.shapes import refuse_quantized
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.base import QuantizedBase, load_base, quantized_base, recorded_base
from mlx_slim.quantization.policy import make_policy
from mlx_slim.reading import ModelConfig, short
from mlx_slim.runtime import (
    default_num_threads,
    dtype_name,
    on_gpu,
    resolve_dtype,
    true_on_all_ranks,
    world,
)
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.training.adalora import RankBudget
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.layer_rates import described, layer_multiples
from mlx_slim.training.loop import Loop
from mlx_slim.training.neftune import NoisyEmbeddings
from mlx_slim.training.objective import Objective
from mlx_slim.training.optim import trainable
from mlx_slim.training.qat import FakeQuantizer
from mlx_slim.training.ranks import fewest, scaling_notice

_WORTH_SHARING = 0.1  # of the time, below which rows that begin alike stay side by side

Objectives = Callable[[nn.Module, int | None, int, int], tuple[Objective, Objective | None]]


def started_from(recipe: Recipe) -> list[Path]:
    """Return the adapter folder that ``recipe`` starts from, if it does."""
    init_from = recipe.adapter.init_from
    return [] if init_from is None else [adapter_folder(Path(init_from).expanduser())]


def prepare_base(recipe: Recipe, *, lazy: bool = False) -> tuple[Loaded, QuantizedBase | None]:
    """Load the base of ``recipe``, each layer quantized as it is read where the method wants it.

    Adapters below the new one (``adapter.on``), or that it starts from
    (``adapter.init_from``), bring the base that they were trained over.

    Args:
        recipe: Of the run.
        lazy: Leave weights and codes unread.

    Returns:
        The base, and how it was quantized if the recipe's model is not.

    Raises:
        SlimError: If the model cannot be loaded, or does not fit the method or those adapters.
    """
    below = [*used_folders(parse_adapters(recipe.adapter.on)), *started_from(recipe)]
    recorded, quantized = recorded_base(below), quantized_base(recipe)
    if quantized is not None and recorded is not None and not quantized.same_weights(recorded[1]):
        key = "init_from" if [recorded[0]] == started_from(recipe) else "on"
        raise SlimError(
            f"adapter.{key}: {recorded[0]} was trained on {recorded[1]} in "
            f"{recorded[1].dtype}, this recipe quantizes to {quantized} in {quantized.dtype}",
            "give quantize and train.dtype the values that it was trained with",
        )

    def fit(model: nn.Module, config: ModelConfig) -> ModelConfig:
        quantized = is_quantized(model)
        if quantized:
            refuse_quantized(recipe)
        if recipe.method == "qlora" and not quantized:
            return quantize_model(model, config, recipe.quantize).config
        return config

    dtype = resolve_dtype(recipe.train.dtype)
    revision = recipe.revision
    if quantized is not None:
        options = {"revision": revision, "dtype": dtype, "lazy": lazy}
        return load(recipe.model, transform=fit, **options), quantized
    loaded = load_base(
        recipe.model, below, revision=revision, dtype=dtype, transform=fit, lazy=lazy
    )
    dense = "quantization" not in read_config(recipe.model, recipe.revision)
    return loaded, recorded[1] if recorded is not None and dense else None


def _stored_biases(recipe: Recipe, loaded: Loaded) -> mx.Dtype | None:
    """Return the dtype of the base's biases on disk for ``adapter.pooled``, None without it.

    Raises:
        SlimError: If the base is not stored quantized, or the run's dtype rounds its biases.
    """
    if not recipe.adapter.pooled:
        return None
    if "quantization" not in read_config(loaded.path):
        raise SlimError(
            f"adapter.pooled=true folds into the biases of a quantized model, {recipe.model} is "
            "not quantized",
            f"quantize it first: mlx-slim quantize {recipe.model} -o DIR, then model=DIR",
        )
    stored, computed = stored_dtype(folder_tensors(loaded.path)), resolve_dtype(recipe.train.dtype)
    if computed not in (stored, mx.float32):
        raise SlimError(
            f"adapter.pooled=true: {recipe.model} stores its biases in {dtype_name(stored)}, "
            f"which {dtype_name(computed)} would round",
            f"set train.dtype={dtype_name(stored)}",
        )
    return stored


def prepare_model(recipe: Recipe) -> Tuned:
    """Return the base of ``recipe`` with its trainable parameters chosen: adapters, or all."""
    from mlx_lm.utils import get_total_parameters

    sharding = shards(recipe)
    loaded, base = prepare_base(recipe, lazy=sharding)
    if sharding and reads_other_blocks(loaded.model):
        raise SlimError(
            f"blocks of {loaded.config['model_type']} attend to keys of other blocks: their "
            "gradient is lost where blocks are computed again",
            "set train.shard=none",
        )
    total = get_total_parameters(loaded.model)
    qat = recipe.quantize.qat
    rounds = make_policy(loaded.model, recipe.quantize).chosen if qat else {}
    mx.random.seed(recipe.train.seed)
    injected = None
    if recipe.method == "full":
        loaded.model.unfreeze()
    else:
        dora = recipe.method == "dora"
        below = combined(loaded.model, parse_adapters(recipe.adapter.on))
        tied = bool(loaded.config.get("tie_word_embeddings"))
        start = [read_start(loaded.model, one, tied=tied) for one in started_from(recipe)]
        stored_as = _stored_biases(recipe, loaded)
        injected = inject(
            loaded.model,
            recipe.adapter,
            dora=dora,
            below=below,
            stored=stored_as,
            keep=base is not None,
        )
        for stored in start:
            start_from(loaded.model, stored, recipe.adapter, injected, dora=dora)
    sharded = None
    if sharding:
        again = recipe.train.grad_checkpoint
        sharded = ShardedModel(loaded.model, world(), short(loaded.path), checkpointed=again)
        loaded.notes.append(f"sharded among {world().size()} ranks: {sharded.counts}")
    mx.eval(loaded.model.parameters())
    tuned = Tuned(loaded, loaded.config, injected, total, base, sharded)
    if qat:
        stored = stored_dtype(folder_tensors(loaded.path))
        tuned.callbacks.append(FakeQuantizer(loaded.model, rounds, stored))
    if injected is not None and recipe.adapter.adaptive is not None:
        tuned.callbacks.append(RankBudget(loaded.model, recipe.adapter.adaptive))
    return tuned


def prepare_data(
    recipe: Recipe,
    tuned: Tuned,
    out: Path,
    *,
    unchanged: bool,
    data: DataConfig | None = None,
    find: Callable[[SourceConfig], Source] | None = None,
    readers: Sequence[ModelConfig] = (),
) -> Prepared:
    """Tokenise the rows on rank 0, then open them on every rank.

    ``data`` replaces ``recipe.data`` where a run is trained on other rows, ``find`` opens them;
    ``readers`` are the configs of other models that read them.
    """
    limit = shortest_limit([tuned.config, *readers])
    keep_within(tuned.loaded.tokenizer, [tuned.config, *readers])

    def rows() -> Prepared:
        return prepare(
            data or recipe.data,
            tuned.loaded.tokenizer,
            max_length=recipe.train.max_length,
            seed=recipe.rows_seed,
            folder=out,
            unchanged=unchanged,
            find=find or finder(out),
            limit=limit,
            preference=recipe.preference_rows,
        )

    if world().size() == 1:
        return rows()
    if world().rank() == 0:
        rows()  # writes what the other ranks, and then all of them, open
    true_on_all_ranks()
    return rows()


def from_rows(
    model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
) -> tuple[Objective, Objective | None]:
    """Return cross-entropy of the rows, for training and for validation rows."""
    return CrossEntropy(model, chunk, vocabulary, num_threads), None


def full_logits_notice(config: ModelConfig) -> str:
    """Return the warning about a model that does not split into body and head."""
    return f"{config['model_type']}: body and head do not split; full logits are computed"


def build_loop(
    recipe: Recipe,
    tuned: Tuned,
    data: Prepared,
    out: Path,
    observer: events.Observer,
    budget: int,
    objectives: Objectives = from_rows,
) -> Loop:
    """Return the loop of ``recipe``: batches, objective, threads.

    ``objectives`` makes what is minimised and what validation rows are measured by, from model,
    ``train.loss_chunk``, vocabulary and threads.

    Raises:
        SlimError: If packing is demanded of a model whose packed rows do not stay apart.
    """
    config = recipe.train
    model = tuned.model
    compiled = on_gpu() if config.compile == "auto" else config.compile
    validation_limit = VALIDATION_SHAPES if compiled else None
    limit = SHAPES - (VALIDATION_SHAPES if data.validation else 0) if compiled else None
    if limit is not None and recipe.distill is not None:
        limit -= (
            1  # of the largest batch, tried before targets are generated and the model is rebuilt
        )
    if limit is not None and recipe.has_rounds:
        limit -= COMPILED_SHAPES
    if config.grad_checkpoint and tuned.sharded is None and reads_other_blocks(model):
        raise SlimError(
            f"blocks of {tuned.config['model_type']} attend to keys of other blocks: their "
            "gradient is lost by checkpointing",
            "set train.grad_checkpoint=false",
        )
    mode = config.batching if recipe.preference is None else "grouped"
    with tuned.computable():
        packs = mode == "grouped" or structure.supports_packing(model)
    if not packs:
        if mode == "packed":
            raise SlimError(
                f"rows packed into one sequence do not stay apart in {tuned.config['model_type']}",
                "set train.batching=grouped",
            )
        mode = "grouped"

    # A RoPE that looks at the length sees that of the packed sequence: it may not pass the rows'.
    length = min(config.max_length, boundary_of(model) or config.max_length)

    train_rows, validation_rows, unit = data.train_view, data.validation_view, data.unit

    def cheaper(rows: RowStore, limit: int | None, shared: float = 1.0) -> Mode:
        with tuned.shaped():
            balance = attention_balance(model, length, gpu=on_gpu(), fused=fused_here())
        sizes = config.batch_tokens, length, config.seed
        masked = balance.masked
        return choose_mode(
            rows, *sizes, balance.causal, limit, packed_balance=masked, grouped_fraction=shared
        )

    # Of few shapes, those of rows of like length are padded most.
    validation_mode: Mode = "grouped"
    if compiled and validation_rows and mode != "grouped":
        validation_mode = cheaper(validation_rows, validation_limit)
    dropout = 0.0 if recipe.method == "full" else recipe.adapter.dropout
    with tuned.computable():
        sharing = can_have_prefix_sharing(config, model, length, mode, compiled, dropout, observer)
    shared = 1.0
    if sharing:
        sizes = config.batch_tokens, length
        rows = Batcher(train_rows, *sizes, "grouped", config.seed, unit=unit)
        shared = shared_fraction(rows)
        sharing = config.prefix_sharing is True or shared < 1 - _WORTH_SHARING
    if mode == "auto":
        mode = cheaper(train_rows, limit, shared if sharing else 1.0)
    if sharing and mode == "grouped":
        text = f"rows share what they begin with: {1 - shared:.0%} fewer positions are computed"
        observer.notify(events.Notice(text))
    # Each chunk has separate gradients: cheap for adapters, a second model for full tuning.
    num_threads = 1 if recipe.trains_weights or compiled else fewest(default_num_threads())
    vocabulary = tuned.config.get("vocab_size", 8)
    with tuned.computable():
        objective, validation_objective = objectives(
            model, config.loss_chunk, vocabulary, num_threads
        )
    if isinstance(objective, CrossEntropy) and objective.split is None:
        observer.notify(events.Notice(full_logits_notice(tuned.config), level="warning"))

    multiples = layer_multiples(model, trainable(model), config.layer_decay)
    if config.layer_decay < 1:
        places = described(model, trainable(model), config.layer_decay)
        rates = ", ".join(f"{place} {multiple:.3g}" for place, multiple in places.items())
        observer.notify(events.Notice(f"learning rates by depth, of the run's: {rates}"))
    if scaled := scaling_notice(config):
        observer.notify(events.Notice(scaled))
    if config.neftune_alpha:
        validation_objective = validation_objective or objective
        objective = NoisyEmbeddings(objective, model, config.neftune_alpha)

    def batcher(rows: RowStore, mode: Mode, limit: int | None) -> Batcher:
        return Batcher(rows, config.batch_tokens, length, mode, config.seed, limit, unit)

    return Loop(
        model=model,
        objective=objective,
        validation_objective=validation_objective,
        config=config,
        batcher=batcher(train_rows, mode, limit),
        validation=(
            batcher(validation_rows, validation_mode, validation_limit) if validation_rows else None
        ),
        observer=observer,
        checkpoints=out / "checkpoints",
        rate_scale=lambda path: multiples[path] * learning_rate_scale(path, recipe.adapter),
        budget_bytes=budget,
        compiled=compiled,
        num_threads=num_threads,
        prefix_sharing=sharing and mode == "grouped",
        callbacks=tuned.callbacks,
        sharded=tuned.sharded,
    )
