"""Folders: a file a split, what datasets saved, LLaMA-Factory's list of data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.schema import SourceConfig
from mlx_slim.data import sources
from mlx_slim.errors import SlimError
from tests.data.conftest import learned

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(6)]


def read(path: Any, **settings: Any) -> Any:
    return [row.value for row in sources.find(SourceConfig(path=str(path), **settings))]


def jsonl(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_a_file_a_split_as_mlx_lm_has_it(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:3])
    jsonl(tmp_path / f"{name}.jsonl", ROWS[3:5])
    jsonl(tmp_path / "test.jsonl", ROWS[5:])
    assert read(tmp_path) == ROWS[:3]
    assert read(tmp_path, split="validation") == read(tmp_path, split=name) == ROWS[3:5]
    assert read(tmp_path, split="test") == ROWS[5:]


def test_a_split_at_the_end_of_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "alpaca-train-00000-of-00001.jsonl", ROWS[:3])
    jsonl(tmp_path / "alpaca-test.jsonl", ROWS[3:])
    assert read(tmp_path) == ROWS[:3]
    assert read(tmp_path, split="test") == ROWS[3:]


def test_a_folder_a_split_and_names_in_capitals(tmp_path: Path) -> None:
    jsonl(tmp_path / "train" / "b.jsonl", ROWS[:3])
    jsonl(tmp_path / "test" / "a.jsonl", ROWS[3:])
    assert read(tmp_path) == ROWS[:3]
    jsonl(tmp_path / "upper" / "TRAIN.JSONL", ROWS[:1])
    jsonl(tmp_path / "upper" / "TEST.JSONL", ROWS[1:])
    assert read(tmp_path / "upper") == ROWS[:1]


def test_another_split_is_never_taken_for_the_wanted_one(tmp_path: Path, make: Any) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:3])
    jsonl(tmp_path / "test-00000-of-00001.jsonl", ROWS[3:])
    with pytest.raises(SlimError, match="no split 'validation', only train, test") as error:
        read(tmp_path, split="validation")
    assert f"data.path=[{{path: {tmp_path}, split: train}}]" in error.value.hint
    with pytest.raises(SlimError, match="no split 'validation'"):
        make(tmp_path, validation=str(tmp_path))
    jsonl(tmp_path / "docs" / "test-plan.jsonl", ROWS[:2])  # a name that only begins like a split
    assert read(tmp_path / "docs") == ROWS[:2]


def test_the_folders_validation_rows_are_held_out(tmp_path: Path, make: Any) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:3])
    jsonl(tmp_path / "valid.jsonl", ROWS[3:])
    prepared = make(tmp_path, validation=str(tmp_path))
    assert (len(prepared.train), len(prepared.validation)) == (3, 3)


def test_saved_data_sets(tmp_path: Path, make: Any) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert read(tmp_path / "one") == ROWS
    data.select([4, 1]).save_to_disk(str(tmp_path / "chosen"))
    assert read(tmp_path / "chosen") == [ROWS[4], ROWS[1]]
    splits = {"train": data.select(range(4)), "validation": data.select([4, 5])}
    datasets.DatasetDict(splits.items()).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits") == ROWS[:4]
    assert read(tmp_path / "splits", split="valid") == ROWS[4:]
    with pytest.raises(SlimError, match="no split 'test', only train, validation"):
        read(tmp_path / "splits", split="test")
    assert len(make(tmp_path / "splits", validation=str(tmp_path / "splits")).validation) == 2
    next((tmp_path / "one").glob("*-00001-*.arrow")).unlink()
    with pytest.raises(SlimError, match=r"lacks data-00001-of-00002\.arrow, 1 of the 2 files"):
        read(tmp_path / "one")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", ""])
def test_a_saved_data_set_names_files_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(SlimError, match="is outside the folder"):
        read(tmp_path)


# ------------------------------------------------------------------------------ LLaMA-Factory

GERMAN = {
    "file_name": "german.json",
    "columns": {"prompt": "frage", "query": "text", "response": "antwort", "history": "davor"},
}
TURNS = {
    "file_name": "turns.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "dialog", "system": "role_play"},
    "tags": {
        "role_tag": "who",
        "content_tag": "says",
        "user_tag": "customer",
        "assistant_tag": "agent",
    },
}


@pytest.fixture
def factory(tmp_path: Path) -> Any:
    """Return a function: entries -> their folder, with rows in two formats."""
    rows = [{"frage": "Wo?", "text": "Ulm", "antwort": "Hier.", "davor": [["Wer?", "Ich."]]}]
    rows += [{"frage": "Wann?", "text": "", "antwort": "Jetzt.", "davor": []}]
    (tmp_path / "german.json").write_text(json.dumps(rows))
    dialog = [{"who": "customer", "says": "Hi"}, {"who": "agent", "says": "Hello"}]
    jsonl(tmp_path / "turns.jsonl", [{"dialog": dialog, "role_play": "Be short."}])
    jsonl(tmp_path / "raw.jsonl", [{"content": "all of it"}])

    def go(**entries: Any) -> Any:
        (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
        return tmp_path

    return go


def test_alpaca_columns_and_history(factory: Any, make: Any, tokens: Any) -> None:
    prepared = make(factory(german=GERMAN))
    assert learned(prepared, tokens, 0)[1] == "Ich.<|im_end|>\nHier.<|im_end|>\n"
    assert "user\nWo?\nUlm<|im_end|>" in learned(prepared, tokens, 0)[0]
    assert learned(prepared, tokens, 1)[1] == "Jetzt.<|im_end|>\n"


def test_sharegpt_tags_and_system(factory: Any, make: Any, tokens: Any) -> None:
    prepared = make(f"{factory(german=GERMAN, turns=TURNS)}:turns")
    text, answer = learned(prepared, tokens)
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi")
    assert answer == "Hello<|im_end|>\n"


def test_a_prompt_alone_is_text(factory: Any, make: Any, tokens: Any) -> None:
    prepared = make(factory(raw={"file_name": "raw.jsonl", "columns": {"prompt": "content"}}))
    assert learned(prepared, tokens)[0].startswith("all of it")


def test_one_of_several_is_named(factory: Any) -> None:
    folder = factory(german=GERMAN, turns=TURNS)
    with pytest.raises(SlimError, match="names 2 data sets: german, turns") as error:
        read(folder)
    assert error.value.hint == f"name one: data.path={folder}:german"
    assert read(f"{folder}:german")[1]["output"] == "Jetzt."
    with pytest.raises(SlimError, match="names no 'germ'"):
        read(f"{folder}:germ")


def test_the_entry_is_part_of_the_fingerprint(factory: Any) -> None:
    def existing(folder: Any) -> Any:
        return sources.find(SourceConfig(path=str(folder))).fingerprint()["sha256"]

    first = existing(factory(german=GERMAN))
    columns = {**GERMAN["columns"], "response": "text"}
    assert existing(factory(german={**GERMAN, "columns": columns})) != first
    assert existing(factory(german=GERMAN)) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": True}, "german: ranking .* is not supported"),
        ({"num_samples": 3}, "german: num_samples is not supported"),
        ({"formatting": "chatml"}, "unknown formatting 'chatml'"),
        ({"columns": {"images": "i"}}, "columns.images is not supported"),
        ({"columns": {"prompt": 3}}, "columns is .*expected names"),
        (
            {"columns": {"prompt": "nope"}},
            "row 1: .* takes the prompt from column 'nope', the row has frage",
        ),
        ({"file_name": "../german.json"}, "is outside the folder"),
        ({"file_name": "absent.json"}, "file_name 'absent.json' does not exist"),
        ({"file_name": 3}, "file_name is 3"),
    ],
)
def test_what_an_entry_says_is_followed_or_refused(
    factory: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SlimError, match=message) as error:
        read(factory(german={**GERMAN, **changes}))
    assert "\n" not in str(error.value)


def test_rows_that_lie_on_a_hub_are_named(factory: Any) -> None:
    with pytest.raises(SlimError, match="not in this folder") as error:
        read(factory(far={"hf_hub_url": "some/data"}))
    assert error.value.hint.endswith("data.path=some/data")
