"""Talking: cached turns equal fresh ones, templates are used or refused, adapters are put on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import quantize_model

from mlx_slim.adapters.inject import inject
from mlx_slim.adapters.store import save_adapter
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import LONGEST_PROMPT, ChatSession, open_session
from mlx_slim.models.load import load
from mlx_slim.models.save import save_model
from tests.support.tiny import tiny_model


def answer(session: ChatSession, ids: list[int], max_tokens: int = 12) -> str:
    return "".join(session.stream(ids, max_tokens=max_tokens, temperature=0.0))


def test_a_turn_computes_only_what_is_new_and_answers_as_if_afresh(
    tiny: Callable[..., Path],
) -> None:
    session = open_session(tiny("llama"))
    messages = [{"role": "user", "content": "Name three fruits."}]
    first = answer(session, session.chat_ids(messages))
    assert session.last is not None
    assert session.last.cached_tokens == 0
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And one?"}]
    ids = session.chat_ids(messages)
    second = answer(session, ids)
    assert session.last.cached_tokens > 20
    assert second == answer(open_session(tiny("llama")), ids)


def test_another_conversation_does_not_see_the_one_before(tiny: Callable[..., Path]) -> None:
    session = open_session(tiny("llama"))
    answer(session, session.text_ids("a long first prompt about something else"))
    ids = session.text_ids("a short one")
    assert answer(session, ids) == answer(open_session(tiny("llama")), ids)


def test_an_interrupted_answer_leaves_the_cache_right(tiny: Callable[..., Path]) -> None:
    session = open_session(tiny("llama"))
    ids = session.text_ids("count to ten")
    stream: Any = session.stream(ids, max_tokens=12, temperature=0.0)
    next(stream)
    next(stream)
    stream.close()
    assert answer(session, ids) == answer(open_session(tiny("llama")), ids)


def test_more_than_the_model_reads_is_said_once(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tiny_model(tmp_path / "short", "llama", max_position_embeddings=16)
    session = open_session(folder, tell=lines.append)
    answer(session, session.text_ids("count"), max_tokens=4)
    assert not lines
    answer(session, session.text_ids("count"), max_tokens=14)
    answer(session, session.text_ids("count to a hundred in steps of two"), max_tokens=2)
    assert lines == ["the model reads 16 tokens by its config: what follows is unreliable"]


def test_the_same_prompt_twice(tiny: Callable[..., Path]) -> None:
    session = open_session(tiny("llama"))
    ids = session.text_ids("again and again")
    assert answer(session, ids) == answer(session, ids)
    assert session.last is not None
    assert session.last.cached_tokens == len(ids) - 1  # the last one gives the first logits


def test_an_adapter_changes_the_answer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load(tiny("llama"))
    config = AdapterConfig(rank=4)
    injected = inject(loaded.model, config, dora=False)
    mx.random.seed(1)
    parameters = [
        (name, mx.random.normal(value.shape))
        for name, value in _flat(loaded.model.trainable_parameters())
    ]
    loaded.model.load_weights(parameters, strict=False)
    save_adapter(
        tmp_path / "adapter", loaded.model, config, injected, dora=False, base=str(tiny("llama"))
    )
    plain, tuned = open_session(tiny("llama")), open_session(tiny("llama"), tmp_path / "adapter")
    ids = plain.text_ids("hello there")
    assert answer(plain, ids) != answer(tuned, ids)
    with pytest.raises(SlimError, match="not an adapter folder"):
        open_session(tiny("llama"), tmp_path / "absent")


def _flat(nested: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(dict(tree_flatten(nested)).items())


def test_a_quantized_model_answers_as_its_stock_self(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_lm import load as stock_load
    from mlx_lm.generate import generate

    loaded = load(tiny("llama"))
    model, config = quantize_model(loaded.model, loaded.config, 32, 4)
    save_model(tmp_path / "q4", model, loaded.tokenizer, config)
    session = open_session(tmp_path / "q4")
    ids = session.text_ids("hello there")
    stock, tokenizer = stock_load(str(tmp_path / "q4"))[:2]
    assert answer(session, ids) == generate(stock, tokenizer, ids, max_tokens=12)


def test_a_base_model_cannot_chat_and_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    session = open_session(tiny_model(tmp_path / "base", "llama", chat_template=None))
    with pytest.raises(SlimError, match="no chat template"):
        session.chat_ids([{"role": "user", "content": "hello"}])
    with pytest.raises(SlimError, match="empty"):
        answer(session, [])


def test_a_template_that_refuses_a_role_is_one_line(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system role') }}"
    session = open_session(tiny_model(tmp_path / "strict", "llama", chat_template=template))
    with pytest.raises(SlimError, match="refuses roles system, user: no system role"):
        session.chat_ids([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_several_templates_without_a_default_are_one_whole_line(tmp_path: Path) -> None:
    session = open_session(tiny_model(tmp_path / "several", "llama"))
    session.tokenizer._tokenizer.chat_template = {"plain": "x", "rag": "y"}
    with pytest.raises(SlimError, match=r"templates \(plain, rag\), none called default") as error:
        session.chat_ids([{"role": "user", "content": "y"}])
    assert "--no-chat-template" in error.value.hint


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(tiny: Callable[..., Path]) -> None:
    session = open_session(tiny("llama"))
    long = "a" * (LONGEST_PROMPT + 1)
    with pytest.raises(SlimError, match="the user's message has more than 1,048,576 characters"):
        session.chat_ids([{"role": "user", "content": long}])
    with pytest.raises(SlimError, match="the prompt has more than"):
        session.text_ids(long)
