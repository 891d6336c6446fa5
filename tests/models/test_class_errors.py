"""What a model class cannot do is one line; what is not its fault passes."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_slim.bench.small_configs import small_config
from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.class_errors import class_errors


def test_an_error_inside_a_model_class() -> None:
    model = build(small_config("qwen3"))
    with (
        pytest.raises(SlimError, match=r"qwen3 cannot do it: .*"),
        class_errors("qwen3 cannot do it"),
    ):
        model(mx.zeros((1, 2, 3, 4), mx.int32))  # type: ignore[operator]


def test_an_operation_without_a_gradient() -> None:
    index, values = mx.array([0, 1]), mx.arange(3.0)
    with pytest.raises(SlimError, match=r"it: .*VJP with respect to indices"), class_errors("it"):
        mx.grad(lambda i: mx.take_along_axis(values, i, 0).sum())(index)


def test_our_own_errors_and_memory_pass() -> None:
    with pytest.raises(KeyError), class_errors("it"):
        raise KeyError("ours")
    with pytest.raises(RuntimeError, match="unable to allocate"), class_errors("it"):
        raise RuntimeError("unable to allocate 3 bytes")
    with pytest.raises(SlimError, match=r"^as it is$"), class_errors("it"):
        raise SlimError("as it is")
