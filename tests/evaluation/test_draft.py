"""Speculative decoding: the same greedy answer, honest counts, and who may not draft."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import ChatSession, open_session
from mlx_slim.evaluation.draft import DraftCount, DraftFigures
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one of the same tokenizer that agrees with it now and then."""
    folder = tmp_path_factory.mktemp("draft")
    model = tiny_model(folder / "model", head_dim=32)
    student = tiny_model(folder / "student", head_dim=32)
    weights = mx.load(str(student / "model-00001-of-00002.safetensors"))
    assert isinstance(weights, dict)
    mx.random.seed(7)
    shaken = {name: w + 0.02 * mx.random.normal(w.shape) for name, w in weights.items()}
    mx.save_safetensors(str(student / "model-00001-of-00002.safetensors"), shaken)
    return model, student


def answer(session: ChatSession, ids: list[int], max_tokens: int = 30) -> str:
    return "".join(session.stream(ids, max_tokens=max_tokens, temperature=0.0))


@pytest.mark.parametrize("width", [1, 4])
def test_a_greedy_answer_is_the_one_without_a_draft(models: tuple[Path, Path], width: int) -> None:
    model, student = models
    plain = open_session(model)
    drafted = open_session(model, draft_model=student, num_draft_tokens=width)
    ids = plain.text_ids("hello there")
    first = answer(plain, ids, 12)
    assert answer(drafted, ids, 12) == first
    for more in (" and then", " something else, longer than before", ""):  # the cache is reused
        ids = plain.text_ids("hello there" + first.encode("ascii", "ignore").decode() + more)
        for tokens in (1, 9):
            assert answer(drafted, ids, tokens) == answer(plain, ids, tokens)
    assert drafted.last is not None and drafted.last.cached_tokens == len(ids) - 1


def test_an_interrupted_answer_leaves_both_caches_right(models: tuple[Path, Path]) -> None:
    model, student = models
    drafted = open_session(model, draft_model=student)
    ids = drafted.text_ids("count to ten")
    expected = answer(open_session(model), ids, 12)
    for count in (1, 2, 5):
        stream: Any = drafted.stream(ids, max_tokens=12, temperature=0.0)
        for _ in range(count):
            next(stream)
        stream.close()
        assert answer(drafted, ids, 12) == expected


def test_acceptance_and_speed_are_reported(models: tuple[Path, Path]) -> None:
    model, _ = models
    itself, other = (open_session(model, draft_model=draft) for draft in models)
    ids = itself.text_ids("hello there")
    for session in (itself, other):
        answer(session, ids, 29)  # 7 rounds of 3 drafted and 1 more, and 1
        assert session.last is not None and session.last.draft is not None
    one, two = itself.last, other.last
    assert one is not None and one.draft is not None and two is not None and two.draft is not None
    assert (one.draft.proposed, one.draft.accepted) == (22, 22)
    assert two.draft.accepted < two.draft.proposed
    assert one.draft.speedup is None
    timed = itself.timed_without_draft()
    assert timed is not None and timed.draft is not None and timed.draft.speedup is not None
    assert "22 of 22 proposed tokens accepted (100%), " in str(timed.draft)
    assert "x the speed without it" in str(timed.draft)
    plain = open_session(model)
    answer(plain, ids)
    assert plain.timed_without_draft() is plain.last and plain.last is not None
    assert plain.last.draft is None


def test_the_count_of_two_rounds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of 3 accepted in the first second, 0 of 3 in the next two, 1 of 1 in the last."""
    clock = iter([1.0, 1.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("mlx_slim.evaluation.draft.time.perf_counter", lambda: next(clock))
    drafted = [True, True, False, False, True]
    responses = [
        SimpleNamespace(generation_tokens=n + 1, from_draft=draft)
        for n, draft in enumerate(drafted)
    ]
    count = DraftCount(5, 3)
    assert len(list(count.watch(iter(responses)))) == 5
    assert count.figures == DraftFigures(3 + 2 + 1, 3, 2, 3.0)
    both = count.figures + DraftFigures(4, 1, 6, 1.0, plain_seconds=1.0)
    assert both == DraftFigures(10, 4, 8, 4.0, 1.0)
    assert both.speedup == 2.0


def test_a_draft_of_another_tokenizer_is_one_line(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", head_dim=32)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SlimError, match=r"cannot draft for .*2 have different ids") as caught:
        open_session(models[0], draft_model=other)
    assert "\n" not in caught.value.message


def test_a_cache_that_cannot_be_cut_back_is_refused_for_both(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """mlx-lm asks once, while a rotating cache is not full, and answers wrong afterwards."""
    sliding = tiny_model(tmp_path / "sliding", "gemma3_text")
    for pair in ((sliding, models[0]), (models[0], sliding)):
        with pytest.raises(SlimError, match="sliding cannot be used with a draft"):
            open_session(pair[0], draft_model=pair[1])
