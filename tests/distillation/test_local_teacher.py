"""A model of this machine as a teacher that writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.config.distill import TeacherConfig
from mlx_slim.distillation.local_teacher import LocalTeacher
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.plain import plain_generate
from mlx_slim.models.load import load
from tests.support.tiny import fixed_answer_model, tiny_model

FLOWS = "It flows."


def teacher(model: Path, max_tokens: int = 12, **more: Any) -> LocalTeacher:
    until = more.pop("until", ())
    config = TeacherConfig(model=str(model), **more)
    return LocalTeacher(config, dtype=mx.float32, max_tokens=max_tokens, until=until)


def chats(*texts: Any) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixed_answer_model(tmp_path_factory.mktemp("speaks") / "flows", FLOWS)


def test_answers_end_where_the_model_ends_them(flows: Path) -> None:
    local = teacher(flows)
    assert list(local.answer(chats("Why?", "And why is that so?"))) == [(FLOWS, "eos")] * 2
    assert list(teacher(flows, until=["ow"]).answer(chats("Why?"))) == [("It fl", "until")]
    assert list(teacher(flows, 5).answer(chats("Why?"))) == [("It fl", "length")]


def test_the_model_reads_its_chat_template_and_answers_like_a_plain_loop(
    tiny: Callable[..., Path],
) -> None:
    folder = tiny("qwen2")
    local = teacher(folder)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = local.text(chat)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    loaded = load(str(folder), dtype=mx.float32)
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    assert list(local.answer([chat])) == [plain_generate(loaded.model, loaded.tokenizer, ids, 12)]


def test_a_base_model_reads_the_bare_question(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base", chat_template=None, bos=True)
    local = teacher(folder)
    assert local.text(chats("Water is")[0]) == "Water is"
    loaded = load(str(folder), dtype=mx.float32)
    ids = loaded.tokenizer.encode("Water is")
    answers_ = list(local.answer(chats("Water is")))
    assert answers_ == [plain_generate(loaded.model, loaded.tokenizer, ids, 12)]


def test_the_model_is_loaded_for_the_first_answer_and_freed_by_close(flows: Path) -> None:
    local = teacher(flows)
    assert local._model is None
    list(local.answer(chats("Why?")))
    assert local._model is not None
    local.close()
    assert local._model is None
    assert list(local.answer(chats("Why?"))) == [(FLOWS, "eos")]


def test_prompts_that_are_cut_are_counted(flows: Path) -> None:
    local = teacher(flows)
    list(local.answer(chats("short", "x" * 600)))
    assert local.truncated == 1


def test_settings_follow_what_decides_the_answers(flows: Path, tmp_path: Path) -> None:
    same, other = teacher(flows), fixed_answer_model(tmp_path / "other", "By me!")
    assert same.settings == teacher(flows).settings
    different = [
        teacher(flows, max_tokens=13),
        teacher(flows, until=["."]),
        teacher(other),
    ]
    config = json.loads((flows / "tokenizer_config.json").read_text())
    config["chat_template"] += " "
    (flows / "tokenizer_config.json").write_text(json.dumps(config))
    different.append(teacher(flows))
    hashes = [json.dumps(t.settings) for t in [same, *different]]
    assert len(set(hashes)) == len(hashes)


def test_a_missing_model_is_refused_before_the_first_request(flows: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="nowhere"):
        teacher(tmp_path / "nowhere")
    with pytest.raises(SlimError, match="adapter"):
        teacher(flows, adapter=str(tmp_path))
    folder = fixed_answer_model(tmp_path / "strict", FLOWS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('no system here') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SlimError, match="refuses a row: no system here"):
        list(teacher(folder).answer(chats("Why?")))
