"""A model whose tensors are cut among ranks: a block is whole only while it is computed.

Invariant: the module holds this rank's slices under the names of the whole tensors, so optimizer
state and gradients are slices too. A block gathers its tensors before its forward pass and drops
them; its backward pass gathers them again, computes the block once more (as gradient checkpointing
does), sums the gradients over the ranks and keeps the slice of this rank. What is outside of the
blocks (embedding, last norm, head) is gathered once a micro-batch.

Memory of a rank: model, gradients and optimizer over the number of ranks, one gathered block with
its gradient, embedding and head with theirs, activations. Fully sharded data parallelism: arXiv
2304.11277. Try it: ``python -m pytest tests/sharding/test_model.py``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_slim.errors import SlimError
from mlx_slim.models.dropout import draw_key, dropout_again, dropout_from
from mlx_slim.models.finite import is_finite
from mlx_slim.models.structure import blocks, blocks_path
from mlx_slim.models.tensors import few
from mlx_slim.runtime import all_gather_bytes
from mlx_slim.sharding.collectives import Collectives
from mlx_slim.sharding.layout import Slice, SliceCounts, count, slice_of

_UNIT = "_sharded_unit"


def _flat(parameters: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(parameters))


def is_sharded(block: nn.Module) -> bool:
    """Return whether a block has slices of its tensors."""
    return hasattr(block, _UNIT)


def _put(module: nn.Module, values: Mapping[str, mx.array]) -> None:
    module.update(tree_unflatten(list(values.items())))


class _Unit:
    """A block's tensors among the ranks: paths begin at the block."""

    def __init__(
        self, layout: dict[str, Slice], collectives: Collectives, checkpointed: bool
    ) -> None:
        self._layout, self._collectives = layout, collectives
        self._checkpointed = checkpointed

    def call(self, block: nn.Module, original: Any, args: tuple, kwargs: dict) -> Any:
        """Compute the block whole; the block holds its slices again afterwards."""
        if self._collectives.looking:
            return original(block, *args, **kwargs)
        slices = _flat(block.parameters())
        values = {key: one for key, one in (*enumerate(args), *kwargs.items()) if _is_float(one)}
        inputs = [mx.stop_gradient(value) for value in values.values()]
        if not block.training:
            _put(block, self._collectives.gather(slices, self._layout, inputs))
            output = original(block, *args, **kwargs)
            _put(block, slices)
            return output
        names = list(_flat(block.trainable_parameters()))
        frozen = {path: value for path, value in slices.items() if path not in set(names)}
        places, structure = list(values), []
        drawing = self._drawing()
        # The graph holds what it needs of these; a function that held them would keep them longer.
        fixed_args = [None if index in values else one for index, one in enumerate(args)]
        fixed_kwargs = {name: None if name in values else one for name, one in kwargs.items()}

        def compute(arrays: tuple[mx.array, ...], whole: dict[str, mx.array]) -> list[mx.array]:
            """Return the flat outputs of the block with ``whole`` tensors."""
            again, named = list(fixed_args), dict(fixed_kwargs)
            for place, value in zip(places, arrays, strict=True):
                if isinstance(place, int):
                    again[place] = value
                else:
                    named[place] = value
            _put(block, whole)
            with drawing():
                leaves: Any = tree_flatten(original(block, *again, **named))
            structure[:] = [path for path, _ in leaves]
            return [value for _, value in leaves]

        def gather(cut: list[mx.array], after: list[mx.array]) -> dict[str, mx.array]:
            everything = {**frozen, **dict(zip(names, cut, strict=True))}
            return self._collectives.gather(everything, self._layout, after)

        @mx.custom_function
        def forward(arrays: list[mx.array], cut: list[mx.array]) -> list[mx.array]:
            outputs = compute(tuple(arrays), gather(cut, arrays))
            _put(block, slices)
            return outputs

        @forward.vjp
        def backward(primals: Any, cotangents: Any, _: Any) -> tuple[list, list]:
            arrays, cut = primals
            cotangents = list(cotangents)
            whole = gather(cut, cotangents)
            # Not before the gradient has come here: all blocks would be computed again at once.
            arrays = mx.depends(list(arrays), cotangents)
            rest = {path: whole[path] for path in frozen}

            def once_more(*differentiated: mx.array) -> list[mx.array]:
                trained = dict(zip(names, differentiated[len(places) :], strict=True))
                return compute(differentiated[: len(places)], {**rest, **trained})

            trained = [whole[path] for path in names]
            _, gradients = mx.vjp(once_more, [*arrays, *trained], cotangents)
            _put(block, slices)
            of_inputs, of_trained = gradients[: len(places)], gradients[len(places) :]
            summed = self._collectives.reduce(
                dict(zip(names, of_trained, strict=True)), self._layout
            )
            if summed and of_inputs:
                # The block below begins when the gradients of this one are slices.
                of_inputs = mx.depends(list(of_inputs), list(summed.values()))
            return list(of_inputs), list(summed.values())

        arrays, trained = list(values.values()), [slices[path] for path in names]
        outputs: Any = forward(arrays, trained)
        return tree_unflatten(list(zip(structure, outputs, strict=True)))

    def _drawing(self) -> Callable[[], AbstractContextManager[None]]:
        """Return a context in which a block draws what it draws where it is not sharded.

        It is entered in the forward pass, and once more when the block is computed again.
        """
        if self._checkpointed:
            return partial(dropout_from, draw_key())
        return partial(dropout_again, [])


def _is_float(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _sharded_class(original: type) -> type:
    class ShardedBlock(original):  # type: ignore[misc, valid-type]
        """The same block; its tensors are slices until it is called."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, _UNIT).call(self, original.__call__, args, kwargs)

    ShardedBlock.__name__ = f"Sharded{original.__name__}"
    ShardedBlock.__module__ = original.__module__
    return ShardedBlock


class ShardedModel:
    """A model of which each rank keeps a slice; made by all ranks at the same time.

    Its tensors are read, cut and dropped one at a time: while a lazily opened model is cut, MLX
    holds the slices and one whole tensor.

    Args:
        model: Changed in place; its tensors may be unread.
        group: The ranks.
        where: Begins the message about NaN.
        checkpointed: Draw dropout as checkpointed blocks do (``training/grad_checkpoint.py``), not
            as plain ones: a sharded run has the masks of the run that it stands for.

    Attributes:
        model: As given.
        layout: path -> place of each parameter.
        counts: What was cut, padded and kept whole.

    Raises:
        SlimError: On every rank, if one reads NaN or infinity.
    """

    def __init__(
        self,
        model: nn.Module,
        group: mx.distributed.Group,
        where: str = "the weights",
        *,
        checkpointed: bool = False,
    ) -> None:
        self.model = model
        self.collectives = Collectives(group)
        parameters = _flat(model.parameters())
        ranks = self.collectives.size
        self.layout = {path: slice_of(value.shape, ranks) for path, value in parameters.items()}
        sizes = {path: value.dtype.size for path, value in parameters.items()}
        self.counts: SliceCounts = count(self.layout, sizes, ranks)
        bad = []
        for path in list(parameters):
            value = self.cut(path, parameters.pop(path))
            if not is_finite(value):
                bad.append(path)
            _put(model, {path: value})  # the whole tensor is dropped here
            del value
        of_ranks = map(json.loads, all_gather_bytes(json.dumps(bad).encode()))
        if anywhere := {path for each in of_ranks for path in each}:
            raise SlimError(
                f"{where}: NaN or infinity in {few(sorted(anywhere))}",
                "take an earlier checkpoint, or download it again",
            )
        inside = blocks_path(model)
        prefixes = [f"{inside}.{number}." for number in range(len(blocks(model)))]
        for prefix, block in zip(prefixes, blocks(model), strict=True):
            layout = {
                p.removeprefix(prefix): s for p, s in self.layout.items() if p.startswith(prefix)
            }
            block.__class__ = _sharded_class(type(block))
            setattr(block, _UNIT, _Unit(layout, self.collectives, checkpointed))
        self._outside = [p for p in self.layout if not p.startswith(f"{inside}.")]

    def cut(self, path: str, whole: mx.array) -> mx.array:
        """Return this rank's slice of the parameter at ``path``, or of what has its shape."""
        return self.layout[path].cut(whole, self.collectives.rank)

    def gather(self, path: str, slice_: mx.array) -> mx.array:
        """Return, evaluated, the whole of what is cut like the parameter at ``path``.

        All ranks must ask for it at the same place.
        """
        self.collectives.settle()
        whole = self.collectives.gather({path: slice_}, self.layout)[path]
        mx.eval(whole)
        self.collectives.settle()
        return whole

    @contextlib.contextmanager
    def outside_blocks(self, *, trained: bool = True) -> Iterator[None]:
        """Inside, what stands outside of the blocks is whole; the model can be called.

        All ranks must enter it, and call the model equally often: each block is gathered by all.

        Args:
            trained: Gather trained parameters too; a loss that is differentiated calls
                ``gather_trained`` instead.
        """
        everything = _flat(self.model.parameters())
        slices = {path: everything[path] for path in self._outside}
        del everything
        left_out = set() if trained else set(self._trained_outside())
        self.collectives.settle()
        cut = {path: value for path, value in slices.items() if path not in left_out}
        whole = self.collectives.gather(cut, self.layout)
        mx.eval(whole)
        self.collectives.settle()
        _put(self.model, whole)
        del whole
        try:
            yield
        finally:
            self.collectives.settle()
            _put(self.model, slices)

    def gather_trained(self) -> None:
        """Put the trained parameters outside of the blocks into the model, whole.

        Their gradients reach the slices, summed over the ranks. It is called inside
        ``outside_blocks``, which puts the slices back: a layer may look at its weights in the
        backward pass too.
        """
        names = self._trained_outside()
        if not names:
            return
        everything = _flat(self.model.parameters())

        @mx.custom_function
        def forward(cut: list[mx.array]) -> list[mx.array]:
            slices = dict(zip(names, cut, strict=True))
            return list(self.collectives.gather(slices, self.layout).values())

        @forward.vjp
        def backward(_primals: Any, cotangents: Any, _outputs: Any) -> list[mx.array]:
            gradients = dict(zip(names, cotangents, strict=True))
            return list(self.collectives.reduce(gradients, self.layout).values())

        gathered: Any = forward([everything[path] for path in names])
        _put(self.model, dict(zip(names, gathered, strict=True)))

    def _trained_outside(self) -> list[str]:
        trained = _flat(self.model.trainable_parameters()).keys()
        return [path for path in self._outside if path in trained]

    @contextlib.contextmanager
    def shapes_only(self) -> Iterator[None]:
        """Inside, parameters have the shapes of whole tensors and may not be computed."""
        slices = _flat(self.model.parameters())
        _put(self.model, {p: mx.zeros(self.layout[p].shape, v.dtype) for p, v in slices.items()})
        self.collectives.looking = True
        try:
            yield
        finally:
            self.collectives.looking = False
            _put(self.model, slices)

    @contextlib.contextmanager
    def whole(self, paths: Iterable[str]) -> Iterator[None]:
        """Inside, the parameters at ``paths`` and those outside of the blocks are whole.

        All ranks must enter it; inside, each may do something else.
        """
        everything = _flat(self.model.parameters())
        slices = {path: everything[path] for path in [*self._outside, *paths]}
        del everything
        _put(self.model, {path: self.gather(path, value) for path, value in slices.items()})
        try:
            yield
        finally:
            _put(self.model, slices)

    def settle(self) -> None:
        """Forget the order of collectives, once all of them were evaluated."""
        self.collectives.settle()

    def norm(self, gradients: Mapping[str, mx.array]) -> mx.array:
        """Return the L2 norm over the whole gradients, of which each rank has slices."""
        cut, uncut = mx.array(0.0), mx.array(0.0)
        for path, value in gradients.items():
            flat = value.reshape(-1)
            if self.layout[path].rows:
                cut = cut + flat @ flat
            else:
                uncut = uncut + flat @ flat
        return mx.sqrt(self.collectives.total(cut) + uncut)
