"""A model is read a block at a time: rows pass a block, then its weights are freed.

Invariant: of a model that is opened unread, MLX holds one block at a time, beside the tensor that
is being read and the hidden states of the rows; what its rows meet is what the whole model computes
for them, bit for bit. A model in memory takes the same way and keeps its weights. Blocks that hand
on more than hidden states cannot be computed one at a time: such a model is read as a whole.
Try it: ``mlx-slim quantize MODEL -o DIR``.

Shapes: B rows, T tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.artifacts import public_name
from mlx_slim.models import structure
from mlx_slim.models.activations import use_fast_experts, use_fast_swiglu
from mlx_slim.models.finite import check_finite
from mlx_slim.models.load import Loaded, commit_of, read_tokenizer, resolve
from mlx_slim.models.opening import cast, check_runs, open_corrected, read_weights
from mlx_slim.models.quantized import use_fast_matmul
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.route import Forward, entangled, enter, leave
from mlx_slim.progress import stage, tracked
from mlx_slim.reading import ModelConfig

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Logits = Callable[[mx.array], mx.array]  # token ids (B, T) to logits (B, T, V)
Open = Callable[[], nn.Module]
# A model in memory, or what opens one whose weights are not read, anew at each call.
Weights = nn.Module | Open


@dataclass(frozen=True)
class Unread:
    """What ``Loaded`` is, without its weights: ``open`` gives a model that has not read them."""

    open: Open
    tokenizer: TokenizerWrapper
    config: ModelConfig
    path: Path
    source: str
    revision: str | None
    notes: list[str] = field(default_factory=list)


def unread(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
) -> Unread:
    """Return a model as ``models.load.load`` does, its weights unread.

    Raises:
        SlimError: As ``load``; NaN and infinities are found where a weight is read.
    """
    folder = resolve(source, revision, trust_remote_code=trust_remote_code)

    def opened() -> tuple[nn.Module, ModelConfig, list[str]]:
        return open_corrected(folder, dtype=dtype, trust_remote_code=trust_remote_code)

    open_model = with_fast_forwards(lambda: opened()[0])
    model, config, notes = opened()
    check_runs(model, folder)
    with stage(f"loading the tokenizer of {public_name(source)}"):
        tokenizer, more = read_tokenizer(folder, config, trust_remote_code)
    return Unread(
        open_model,
        tokenizer,
        config,
        folder,
        str(source),
        commit_of(folder, revision),
        [*notes, *more],
    )


def with_fast_forwards(weights: Open) -> Open:
    """Return what opens the same model with the forward passes of a CPU.

    They are tried on real weights, of a model that is dropped: what is opened has read none.
    """
    tried = weights()
    use_fast_matmul(tried)
    use_fast_swiglu(tried)
    classes = {path: type(module) for path, module in tried.named_modules()}
    del tried

    def open_model() -> nn.Module:
        model = weights()
        use_fast_experts(model)  # before the classes: mixtures share the instance it replaces
        for path, module in model.named_modules():
            if type(module) is not classes[path]:
                module.__class__ = classes[path]
        return model

    return open_model


def weights_of(model: Loaded | Unread) -> Weights:
    """Return the model, or what opens it."""
    return model.model if isinstance(model, Loaded) else model.open


def rounded(weights: Open, *dtypes: mx.Dtype | None) -> Open:
    """Return the same model with weights cast to one dtype after the other; None is no cast.

    All arrays between a file and a weight are in memory at one time: cast no more than is needed.
    """

    def open_model() -> nn.Module:
        model = weights()
        for dtype in filter(None, dtypes):
            cast(model, dtype)
        return model

    return open_model


def tensors_of(weights: Weights) -> dict[str, mx.array]:
    """Return the parameters by name. Those of an unread model are this dictionary's alone.

    Popped and evaluated one after the other, one of them is in memory at a time.
    """
    model = weights if isinstance(weights, nn.Module) else weights()
    tensors: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    if model is not weights:
        free_weights(model)
    return tensors


def count_of_blocks(weights: Weights) -> int:
    """Return the number of blocks of a model."""
    return len(structure.blocks(weights if isinstance(weights, nn.Module) else weights()))


def outside_blocks(model: nn.Module, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return those of ``tensors`` that are not of the blocks of ``model``."""
    prefix = structure.blocks_path(model) + "."
    return {name: value for name, value in tensors.items() if not name.startswith(prefix)}


@dataclass
class BlockBatch:
    """Rows on their way through the blocks: ``hidden_BTD`` enters the next one."""

    tokens_BT: mx.array
    hidden_BTD: mx.array
    forwards: list[Forward]

    def pass_block(self, index: int) -> None:
        """Replace the hidden states by what block ``index`` returns for them."""
        self.hidden_BTD = self.forwards[index](self.hidden_BTD)
        mx.eval(self.hidden_BTD)


def batch_of(model: nn.Module, tokens_BT: mx.array) -> BlockBatch:
    """Return rows at the first block of ``model``."""
    batch = BlockBatch(tokens_BT, *enter(model, tokens_BT))
    mx.eval(batch.hidden_BTD)
    return batch


class RowLogits:
    """Logits of a model on rows that passed its blocks; called with the tokens of one of them."""

    def __init__(self, model: nn.Module, batches: Iterable[BlockBatch]) -> None:
        self._model = model
        self._hidden = {_key(batch.tokens_BT): batch.hidden_BTD for batch in batches}

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        """Return the logits (B, T, V)."""
        return leave(self._model, tokens_BT, self._hidden[_key(tokens_BT)])


def _key(tokens: mx.array) -> bytes:
    return np.array(tokens, np.int64).tobytes()


class Walk:
    """Passes batches of rows through a model, block by block; it is walked once.

    Args:
        weights: A model in memory, or what opens it.
        rows: Batches of token ids (B, T).
        where: Begins the message where a weight is no number.
    """

    def __init__(
        self, weights: Weights, rows: Iterable[mx.array], where: str = "the weights"
    ) -> None:
        self._where = where
        self._open: Open | None = None
        model = weights if isinstance(weights, nn.Module) else weights()
        self._whole = bool(entangled(model))
        if self._whole and model is not weights:
            read_weights(model, where)
        elif not isinstance(weights, nn.Module):
            self._open = weights
            tensors = outside_blocks(model, tensors_of(weights))
            check_finite(((name, tensors.pop(name)) for name in list(tensors)), where)
        self.model = model
        self._rows = list(rows)
        self._batches: list[BlockBatch] = []
        if not self._whole:
            self._batches = [batch_of(model, tokens_BT) for tokens_BT in self._rows]
        if self._open is not None:
            _free(model, outside_blocks(model, dict(tree_flatten(model.parameters()))))  # pyright: ignore

    def blocks(self, name: str) -> Iterator[tuple[int, nn.Module]]:
        """Yield number and block, its weights read; they are freed before the next one."""
        blocks = structure.blocks(self.model)
        prefix = structure.blocks_path(self.model)
        for index, block in enumerate(tracked(blocks, name, "blocks")):
            if self._open is not None:
                check_finite(
                    [(f"{prefix}.{index}.{path}", value) for path, value in _parameters(block)],
                    self._where,
                )
            yield index, block
            if self._open is not None:
                free_weights(block)

    def passed(self, index: int) -> Iterator[tuple[mx.array, mx.array]]:
        """Pass each batch through block ``index``; yield what enters it and what leaves it."""
        for batch in self._batches:
            entering_BTD = batch.hidden_BTD
            batch.pass_block(index)
            yield entering_BTD, batch.hidden_BTD

    def to_the_end(self, name: str) -> Logits:
        """Pass all blocks; return ``answers``."""
        for index, _ in self.blocks(name):
            for _ in self.passed(index):
                pass
        return self.answers()

    def answers(self) -> Logits:
        """Return the logits of the rows, which passed all blocks, as a function of their tokens."""
        if self._whole:
            return self.model  # type: ignore[return-value]
        return RowLogits(self.model if self._open is None else self._open(), self._batches)


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.parameters())  # type: ignore[return-value]


def _free(model: nn.Module, tensors: Iterable[str]) -> None:
    model.update(tree_unflatten([(name, mx.array([])) for name in tensors]))  # pyright: ignore
    mx.clear_cache()


def answers_of(
    weights: Weights, rows_NT: mx.array, name: str, where: str = "the weights"
) -> Logits:
    """Return the logits (1, T, V) of a model on rows, as a function of one of them (1, T).

    Args:
        weights: A model in memory, or what opens it.
        rows_NT: Token ids.
        name: Of the stage.
        where: Begins the message where a weight is no number.
    """
    return Walk(weights, [row_T[None] for row_T in rows_NT], where).to_the_end(name)
