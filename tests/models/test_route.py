"""What a model computes before, between and after its blocks, and models that do not come apart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.bench.small_configs import small_config
from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.route import enter, leave, refuse_entangled

IDS = mx.array([[7 * i % 256 for i in range(20)], [3 * i % 256 for i in range(20)]])


def _model(model_type: str) -> Any:
    mx.random.seed(0)
    return build(small_config(model_type)).eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "qwen3_next", "phi"])
def test_the_parts_are_the_whole(model_type: str) -> None:
    model = _model(model_type)
    refuse_entangled(model)
    hidden, forwards = enter(model, IDS)
    for forward in forwards:
        hidden = forward(hidden)
    assert mx.array_equal(leave(model, IDS, hidden), model(IDS)).item()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma3n", "attend to keys of other blocks"), ("afm7", "attend to keys")],
)
def test_blocks_that_do_not_come_apart(model_type: str, reason: str) -> None:
    with pytest.raises(SlimError, match=reason):
        refuse_entangled(_model(model_type))


def test_more_than_hidden_states_between_blocks() -> None:
    model = _model("llama")
    kind = type(model.model)

    class Between(kind):
        """Adds something behind each block."""

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            hidden = self.embed_tokens(inputs)
            for layer in self.layers:
                hidden = layer(hidden, "causal", None) + 1
            return self.norm(hidden)

    model.model.__class__ = Between
    with pytest.raises(SlimError, match="pass on more than hidden states"):
        refuse_entangled(model)
