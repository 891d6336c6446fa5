"""Linear layers whose weights stay in 16 bits while a CPU computes in float32.

A CPU computes in float32 whatever a model is stored in. Scoring keeps the matrices of the blocks as
they are stored, and widens one at a time, for one product: a twentieth of the time where a pass has
a thousand positions, more where it has fewer (``widen``). Invariant: the product is that of the
widened weight, bit for bit, and the parameters and the base class stay those of ``nn.Linear``.
Nothing changes on a GPU, which computes in what is stored. Try it:
``python -m pytest tests/models/test_half_weights.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models.build import build
from mlx_slim.models.tensors import Tensor
from mlx_slim.reading import ModelConfig
from mlx_slim.runtime import on_gpu

_HALF = (mx.bfloat16, mx.float16)


class HalfLinear(nn.Linear):
    """``nn.Linear`` with a weight of 16 bits, for inputs in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x Wᵀ + bias; x is (..., I)."""
        # Widened once x is computed: else the scheduler may widen all layers' weights at once.
        (weight_OI,) = mx.depends([self["weight"]], [x])
        transposed_IO = weight_OI.astype(x.dtype).T
        if "bias" in self:
            return mx.addmm(self["bias"], x, transposed_IO)
        return x @ transposed_IO


def keep_half(model: nn.Module) -> None:
    """Let the linear layers of the blocks keep weights of 16 bits, in place; nothing on a GPU.

    Args:
        model: Its weights in what they are stored in, read or not.
    """
    if not on_gpu():
        for module in _layers(model):
            if module["weight"].dtype in _HALF:
                module.__class__ = HalfLinear


def widen(model: nn.Module) -> None:
    """Undo ``keep_half``: matrices in float32, one cast at a time."""
    for module in _layers(model, HalfLinear):
        module.__class__ = nn.Linear
        module["weight"] = module["weight"].astype(mx.float32)
        mx.eval(module["weight"])


def half_numbers(config: ModelConfig, tensors: Iterable[Tensor], dtype: mx.Dtype) -> int:
    """Return how many weights ``keep_half`` would leave in 16 bits; 0 where it is not worth asking.

    Args:
        config: Of the model.
        tensors: Of its files.
        dtype: To compute in.

    Raises:
        SlimError: If mlx-lm does not know the model type, or the config does not fit it.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    all_half = all(tensor.dtype in ("BF16", "F16") for tensor in matrices)
    if on_gpu() or dtype != mx.float32 or not all_half or config.get("model_file"):
        return 0
    return sum(module["weight"].size for module in _layers(build(config)))


def _layers(model: nn.Module, kind: type[nn.Linear] = nn.Linear) -> Iterator[nn.Linear]:
    layers = getattr(model, "layers", None)
    for block in layers if isinstance(layers, list) else ():
        yield from (module for module in block.modules() if type(module) is kind)
