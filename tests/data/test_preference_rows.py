"""Pairs of answers and labelled answers: read, cut and dropped together, counted, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.config.schema import DataConfig
from mlx_slim.data.formats import Dropped
from mlx_slim.data.preference_rows import read_answers
from mlx_slim.data.prepare import Prepared, prepare
from mlx_slim.data.sources import RawRow
from mlx_slim.data.with_prompts import WithPrompts
from mlx_slim.errors import SlimError


def read(value: dict[str, Any], kind: Any = "pairs", **options: Any) -> list[tuple[str, str]]:
    """Return prompt and answer of each example, as texts."""
    options = {"columns": {}, "system": None, **options}
    texts = []
    for example in read_answers(RawRow("rows.jsonl", 1, value), kind, **options):
        learned = [m for m, w in zip(example.messages, example.turn_weights, strict=True) if w]
        others = [m for m, w in zip(example.messages, example.turn_weights, strict=True) if not w]
        texts.append(tuple("|".join(m["content"] for m in some) for some in (others, learned)))
    return texts


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = [user("Hi"), answer("Hello"), user("Go")]
P = "Hi|Hello|Go"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "Hi"),
        ({"prompt": CHAT, "chosen": [answer("Yes")], "rejected": [answer("No")]}, "Hi|Hello|Go"),
        ({"chosen": [*CHAT, answer("Yes")], "rejected": [*CHAT, answer("No")]}, "Hi|Hello|Go"),
        # as HuggingFaceH4/ultrafeedback_binarized: the prompt as a text besides
        (
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), answer("Yes")],
                "rejected": [user("Hi"), answer("No")],
            },
            "Hi",
        ),
        (
            {"chosen": "Human: Hi Assistant: Yes", "rejected": "Human: Hi Assistant: No"},
            "Human: Hi Assistant: ",
        ),
        # the prompt as turns, and whole conversations that repeat it
        ({"prompt": CHAT, "chosen": [*CHAT, answer("Yes")], "rejected": [*CHAT, answer("No")]}, P),
        (
            {
                "prompt": "Hi",
                "chosen": [{"from": "human", "value": "Hi"}, answer("Yes")],
                "rejected": [answer("No")],
            },
            "Hi",
        ),
        # as a table holds turns
        (
            {
                "prompt": json.dumps(CHAT),
                "chosen": json.dumps([answer("Yes")]),
                "rejected": json.dumps([answer("No")]),
            },
            "Hi|Hello|Go",
        ),
    ],
)
def test_a_pair_is_two_answers_to_one_prompt(row: dict[str, Any], prompt: str) -> None:
    assert read(row) == [(prompt, "Yes"), (prompt, "No")]
    with_system = read({**row, "system": "Be brief."})
    assert all("Be brief." in before for before, _ in with_system)


def test_columns_and_system_of_the_recipe() -> None:
    row = {"question": "Hi", "best": "Yes", "worst": "No"}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    assert read(row, columns=columns, system="S")[1] == ("S|Hi", "No")


def test_an_answer_has_its_label() -> None:
    row = {"prompt": "Hi", "completion": [answer("No")], "label": False}
    (example,) = read_answers(RawRow("r", 1, row), "labels", columns={}, system=None)
    assert example.label is False
    assert read(row, "labels") == [("Hi", "No")]
    whole = {**row, "completion": [user("Hi"), answer("No")]}  # it repeats the prompt
    assert read(whole, "labels") == [("Hi", "No")]


def test_a_prompt_is_not_lost_where_both_answers_begin_with_one_turn() -> None:
    row = {"prompt": "Hi", "chosen": [answer("So"), answer("A")], "rejected": [answer("So")]}
    row["rejected"].append(answer("B"))
    assert read(row) == [("Hi", "So|A"), ("Hi", "So|B")]


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"instruction": "a", "output": "b"}, "pairs", "columns seen: instruction, output"),
        ({"prompt": "a", "chosen": "b"}, "pairs", "expected: prompt, chosen, rejected"),
        ({"prompt": "a", "completion": "b", "label": True}, "pairs", "expected: prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "labels", "prompt, completion, label"),
        ({"prompt": "a", "completion": "b"}, "labels", "prompt, completion, label"),
        ({"prompt": None, "completion": "b", "label": True}, "labels", "seen: completion, label;"),
        ({"prompt": "a", "completion": "b", "label": None}, "labels", "'label' is None"),
        ({"prompt": "a", "completion": "b", "label": 1}, "labels", "'label' is 1, expected true"),
        ({"prompt": "a", "completion": "b", "label": "no"}, "labels", "'label' is 'no'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "pairs", "are str and int"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "pairs", "'prompt' is int 3"),
        ({"chosen": "b", "rejected": "c"}, "pairs", "begin with nothing in common"),
        (
            {"chosen": [*CHAT, answer("b")], "rejected": [*CHAT[:2], user("Stop"), answer("b")]},
            "pairs",
            "differ from turn 3 on, a turn of the user",
        ),
        (  # another question than the prompt, which would be asked twice
            {"prompt": "Hi", "chosen": [user("Hi!"), answer("b")], "rejected": [answer("c")]},
            "pairs",
            "'chosen' begins with a turn of the user, 'Hi!', behind the prompt's",
        ),
        (
            {"prompt": CHAT[:1], "completion": [*CHAT[2:], answer("c")], "label": True},
            "labels",
            "'completion' begins with a turn of the user, 'Go', behind the prompt's",
        ),
        (  # the question is in a column that would not be read
            {"question": "Hi?", "chosen": "It is so", "rejected": "It is not"},
            "pairs",
            "no 'prompt', and 'question' is in neither answer",
        ),
        (
            {"messages": CHAT, "chosen": "It is so", "rejected": "It is not"},
            "pairs",
            "no 'prompt', and 'messages' is in neither answer",
        ),
        (
            {"prompt": [{"role": "x"}], "chosen": [answer("b")], "rejected": [answer("c")]},
            "pairs",
            "turn 1: role 'x'",
        ),
    ],
)
def test_other_rows_are_refused_in_one_line(row: dict[str, Any], kind: str, expected: str) -> None:
    with pytest.raises(SlimError) as refused:
        read(row, kind)
    assert expected in refused.value.message
    assert "rows.jsonl, row 1" in refused.value.message
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "empty answer"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer"),
        ({"chosen": [*CHAT, answer("b")], "rejected": CHAT}, "empty answer"),
        (
            {"prompt": "a", "chosen": [answer("b")], "rejected": [{"from": "gpt", "value": "b"}]},
            "the same answer",
        ),
    ],
)
def test_pairs_that_say_nothing_are_dropped_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        read(row)
    assert reason in dropped.value.reason


# ------------------------------------------------------------------------------------ prepared


@pytest.fixture
def pairs(tmp_path: Path, tokens: Any) -> Any:
    def go(rows: list[dict[str, Any]], kind: Any = "pairs", length: int = 64, **data: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(**{"path": str(path), "validation": 0, "template": "plain", **data})
        settings = {"max_length": length, "seed": 0, "folder": tmp_path / "out"}
        return prepare(config, tokens, preference=kind, **settings)

    return go


def texts(prepared: Prepared, tokens: Any) -> list[str]:
    rows = (prepared.train.row(i) for i in range(len(prepared.train)))
    return [tokens.decode(ids[supervised]) for ids, supervised in rows]


def _pair(i: int, rejected: str = "no") -> dict[str, Any]:
    return {"prompt": f"{i}?", "chosen": "yes", "rejected": rejected}


def test_both_answers_of_a_pair_are_neighbours_used_or_dropped_together(
    pairs: Any, tokens: Any
) -> None:
    rows = [_pair(0), _pair(1, "n" * 100), _pair(2, "yes"), _pair(3)]
    prepared = pairs(rows)
    assert texts(prepared, tokens) == ["yes<|im_end|>", "no<|im_end|>"] * 2
    assert prepared.unit == 2
    (source,) = prepared.ledger["sources"]
    assert (source["rows_given"], source["rows_used"]) == (4, 2)
    dropped = {reason: entry["count"] for reason, entry in source["rows_dropped"].items()}
    assert dropped == {
        "longer than 64 tokens": 1,
        "chosen and rejected are the same answer": 1,
    }
    assert prepared.ledger["split"]["train_rows"] == 2


def test_answers_cut_on_the_right_until_they_are_the_same_are_dropped(
    pairs: Any, tokens: Any
) -> None:
    rows = [_pair(0), {"prompt": "?", "chosen": "a" * 80 + "b", "rejected": "a" * 90}]
    prepared = pairs(rows, truncation="right")
    assert len(prepared.train) == 2
    rows[1]["rejected"] = "b" * 90
    prepared = pairs(rows, truncation="right")
    assert prepared.train.lengths.tolist()[2:] == [64, 64]
    (source,) = prepared.ledger["sources"]
    assert source["rows_truncated"]["count"] == 1


def test_answers_cut_on_the_left_keep_one_prompt(pairs: Any, tokens: Any) -> None:
    row = {"prompt": "p" * 70, "chosen": "yes", "rejected": "no" * 9}
    prepared = pairs([row], truncation="left")
    (one, first), (other, second) = (prepared.train.row(i) for i in range(2))
    prompts = [
        ids[: int(np.argmax(mask))].tolist() for ids, mask in ((one, first), (other, second))
    ]
    assert prompts[0] == prompts[1]
    assert len(other) == 64
    with pytest.raises(SlimError, match=r"longer than train\.max_length=64"):
        pairs([row], truncation="error")


def test_pairs_are_split_and_weighted_whole(pairs: Any, tokens: Any, tmp_path: Path) -> None:
    rows = [_pair(i) for i in range(20)]
    prepared = pairs(rows, validation=0.25)
    assert (len(prepared.train), len(prepared.validation)) == (30, 10)
    for store in (prepared.train, prepared.validation):
        assert (store.index[1::2] == store.index[::2] + 1).all()
        assert (store.index[::2] % 2 == 0).all()
    assert len(prepared.prompted) == 5
    path = [{"path": str(tmp_path / "rows.jsonl"), "weight": 1.5}]
    half = pairs(rows, path=path)
    assert len(half.train) == 60
    assert (half.train.index[1::2] == half.train.index[::2] + 1).all()


def test_a_pair_of_which_an_answer_validates_is_not_trained_on(pairs: Any, tmp_path: Path) -> None:
    held_back = tmp_path / "held.jsonl"
    held_back.write_text(json.dumps({"prompt": "1?", "chosen": "well", "rejected": "no"}) + "\n")
    prepared = pairs([_pair(0), _pair(1), _pair(2)], validation=str(held_back))
    assert len(prepared.train) == 4
    assert prepared.ledger["split"]["removed_from_train_as_duplicates_of_validation"] == 1


def test_labels_are_kept_with_their_rows(pairs: Any) -> None:
    rows = [{"prompt": f"{i}?", "completion": "yes", "label": i % 3 == 0} for i in range(12)]
    prepared = pairs(rows, "labels", validation=4)
    desirable = np.concatenate([prepared.train.labels, prepared.validation.labels])
    index = np.concatenate([prepared.train.index, prepared.validation.index])
    assert desirable.tolist() == [i % 3 == 0 for i in index]
    assert prepared.unit == 1
    assert pairs([_pair(0)]).train.labels is None


def test_other_rows_are_other_data(pairs: Any, tmp_path: Path) -> None:
    fingerprint = pairs([_pair(0)]).fingerprint
    assert fingerprint["preference"] == "pairs"


def test_with_prompts_every_token_of_chosen_rows_is_a_target(pairs: Any) -> None:
    prepared = pairs([_pair(0), _pair(1)])
    view = WithPrompts(prepared.train, 2)
    assert len(view) == 4
    for i in range(4):
        ids, supervised = view.row(i)
        assert view.supervised[i] == supervised.sum()
        assert supervised.sum() == (len(ids) - 1 if i % 2 == 0 else 3)
    assert view.answers_S.sum() == prepared.train.supervised.sum()
    assert view.weights(0) is None


def test_refusals_of_whole_files_count_pairs_and_name_what_pairs_can_have(pairs: Any) -> None:
    with pytest.raises(SlimError) as refused:
        pairs([{"prompt": "a", "chosen": "b" * 80, "rejected": "c"}])
    assert "data.truncation=left" in refused.value.hint and "split" not in refused.value.hint
    with pytest.raises(SlimError, match="all 6 are in the validation set too"):
        pairs([_pair(0)] * 8, validation=2)
