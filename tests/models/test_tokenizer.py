"""Tokens without an embedding are refused wherever a text meets a model; a missing end is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run
from mlx_slim.config.schema import DataConfig
from mlx_slim.data.prepare import prepare
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import open_session
from mlx_slim.evaluation.scoring.perplexity import TextDocuments, TextJob
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.models.load import load, load_tokenizer
from mlx_slim.models.tokenizer import keep_within, vocabulary_size
from mlx_slim.quantization.calibration import read_calibration
from tests.support.tiny import SPECIALS, tiny_model

TOOL = "<|tool|>"


def with_tokens(folder: Path, *tokens: str, special: bool = True) -> Path:
    """Give a model's tokenizer tokens that its embedding has no row for, after the spare ids."""
    from tokenizers import AddedToken, Tokenizer

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    spare = [f"<|spare{number}|>" for number in range(5)]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in spare])
    tokenizer.add_tokens([AddedToken(text, special=special) for text in tokens])
    tokenizer.save(path)
    return folder


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def wide(tmp_path: Path) -> Any:
    """A model whose tokenizer knows one token more than its embedding has rows (264)."""
    return with_tokens(tiny_model(tmp_path / "wide"), TOOL)


def rows(path: Path, *completions: str) -> Path:
    lines = [json.dumps({"prompt": "a", "completion": text}) for text in completions]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_token_that_no_text_holds_is_only_said(wide: Any) -> None:
    loaded = load(wide)
    assert any("1 tokens of the tokenizer have no row in the embedding of 264 rows" in note
               for note in loaded.notes)  # fmt: skip
    assert loaded.tokenizer.encode("abc")
    narrow = load_tokenizer(tiny_model(wide.parent / "narrow"))
    assert getattr(narrow, "embedding_rows", None) is None


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_hold_it_are_named(wide: Any, tmp_path: Path, processes: int) -> None:
    path = rows(tmp_path / "rows.jsonl", "b", f"c {TOOL}")
    config = DataConfig(path=str(path), validation=0)

    def prepared(config: Any) -> Any:
        return prepare(config, load_tokenizer(wide), max_length=64, seed=0,
                       folder=tmp_path / "p", processes=processes)  # fmt: skip

    with pytest.raises(SlimError) as error:
        prepared(config)
    assert error.value.message == (
        "rows.jsonl, line 2: the token '<|tool|>' has the id 264, the model's embedding has "
        "264 rows"
    )
    assert len(prepared(config.model_copy(update={"max_rows": 1})).train) == 1


def test_a_row_of_a_worker_process_is_named(wide: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", *["b"] * 9000, TOOL)
    config = DataConfig(path=str(path), validation=0)
    with pytest.raises(SlimError, match=r"line 9001: the token '<.tool.>' has the id 264"):
        prepare(config, load_tokenizer(wide), max_length=64, seed=0, folder=tmp_path / "p",
                processes=2)  # fmt: skip


def test_questions_texts_and_calibration_that_hold_it(wide: Any, tmp_path: Path) -> None:
    encoder = RequestEncoder(load_tokenizer(wide), 64)
    assert encoder.checks
    for act in (
        lambda: encoder.request(f"a {TOOL}", " b"),
        lambda: encoder.request("a", f" {TOOL}"),
        lambda: encoder.request("", TOOL),
        lambda: encoder.prompt(TOOL, 4),
    ):
        with pytest.raises(SlimError, match=r"the token '<.tool.>' has the id 264"):
            act()
    with pytest.raises(SlimError, match=r"held\.txt, document 1: .*the token '<.tool.>'"):
        TextJob(TextDocuments("held.txt", ["a", f"b {TOOL}"], 12, ""), encoder)
    (tmp_path / "text.txt").write_text(f"some text\n\nmore {TOOL} text")
    with pytest.raises(SlimError, match=r"text\.txt, line 3: the token '<.tool.>'"):
        read_calibration(
            str(tmp_path / "text.txt"), load_tokenizer(wide), length=8, seen=1, validation=1
        )


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line of a command that refuses its input."""
    assert run([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_commands_refuse_it(
    wide: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts_seen = "the token '<|tool|>' has the id 264, the model's embedding has 264 rows"
    assert f"the prompt: {texts_seen}" in refused(capsys, "generate", wide, "--prompt", TOOL)
    path, out = rows(tmp_path / "rows.jsonl", "b", TOOL), tmp_path / "run"
    inputs = [f"model={wide}", "revision=null", f"data.path={path}", "data.template=auto"]
    line = refused(capsys, "train", "smollm2-lora", *inputs, "train.steps=1", "-o", out)
    assert f"rows.jsonl, line 2: {texts_seen}" in line
    (tmp_path / "task.yaml").write_text(
        "kind: multiple_choice\ndata: {path: questions.jsonl, split: test}\n"
        "prompt: '{{ question }}'\nchoices: ['x', 'y']\ntarget: '{{ answer }}'\n"
    )
    questions = [{"question": "a", "answer": 0}, {"question": f"b {TOOL}", "answer": 1}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    line = refused(capsys, "eval", wide, "--task", tmp_path / "task.yaml", "-o", tmp_path / "s")
    assert "task, question 1: " in line
    assert texts_seen in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": TOOL}, "the end token '<.tool.>' has the id 264, the .* has 264 rows"),
        ({"chat_template": f"{{{{ messages[0].content }}}}{TOOL}"}, "the chat template's '<.tool"),
        ({"chat_template": [{"name": "default", "template": TOOL}]}, "the chat template's '<.tool"),
    ],
)
def test_a_token_of_every_text_is_refused_at_load(
    wide: Any, changes: dict[str, Any], message: str
) -> None:
    settings(wide, **changes)
    for act in (load, load_tokenizer, open_session):
        with pytest.raises(SlimError, match=message):
            act(wide)


def test_a_first_token_is_refused_where_texts_begin_with_it(tmp_path: Path) -> None:
    folder = with_tokens(tiny_model(tmp_path / "m", bos=True), TOOL)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = TOOL
    content["post_processor"]["special_tokens"] = {
        TOOL: {"id": TOOL, "ids": [264], "tokens": [TOOL]}
    }
    path.write_text(json.dumps(content))
    settings(folder, bos_token=TOOL)
    with pytest.raises(SlimError, match=r"the first token of every text '<.tool.>' has the id 264"):
        load_tokenizer(folder)
    settings(folder, bos_token=SPECIALS[1], pad_token=TOOL)  # padding is never read
    assert load_tokenizer(folder).embedding_rows == 264


def test_of_several_models_the_smallest_embedding_counts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "m"))
    keep_within(tokenizer, [{"vocab_size": 264}, {"vocab_size": 260}])
    assert getattr(tokenizer, "embedding_rows", None) is None
    keep_within(tokenizer, [{"vocab_size": 264}, {"text_config": {"vocab_size": 200}}])
    assert tokenizer.embedding_rows == 200


# --------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_configs_end_token_is_learned_and_said(tmp_path: Path, file: str) -> None:
    folder = tiny_model(tmp_path / "m", chat_template=None)
    settings(folder, eos_token=None)
    before = load(folder)
    assert any("neither the tokenizer nor the config names an end" in n for n in before.notes)
    end = load_tokenizer(folder).convert_tokens_to_ids(SPECIALS[2])
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "eos_token_id": [end]}))
    loaded = load(folder)
    assert (
        "the tokenizer names no end token: the config's, '<|im_end|>', ends texts" in loaded.notes
    )
    config = DataConfig(path=str(rows(tmp_path / "rows.jsonl", "b")), validation=0)
    prepared = prepare(config, loaded.tokenizer, max_length=64, seed=0, folder=tmp_path / "p")
    ids, supervised = prepared.train.row(0)
    assert (ids[-1], supervised[-1]) == (end, True)


def test_half_a_character_is_refused_before_the_tokenizer(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    with pytest.raises(SlimError, match=r"the text that ends with .* is half of a character"):
        RequestEncoder(load_tokenizer(folder), 64).request("a\udcff", " b")
    with pytest.raises(SlimError, match=r"the prompt: '.udcff' at character 2 is half"):
        open_session(folder).text_ids("a\udcff")
    with pytest.raises(SlimError, match=r"the user's message: '.udcff' at character 1 is half"):
        open_session(folder).chat_ids([{"role": "user", "content": "\udcff"}])
    config = DataConfig(
        path=str(rows(tmp_path / "rows.jsonl", "b")), validation=0, system="x\ud83d"
    )
    with pytest.raises(SlimError, match=r"rows\.jsonl, line 1: '.ud83d' at character \d+ is half"):
        prepare(config, load_tokenizer(folder), max_length=64, seed=0, folder=tmp_path / "p")


def test_a_vocabulary_is_the_text_parts_where_the_model_sees_pictures() -> None:
    assert vocabulary_size({"vocab_size": 264, "text_config": {"vocab_size": 9}}) == 264
    assert vocabulary_size({"model_type": "mistral3", "text_config": {"vocab_size": 200}}) == 200
    with pytest.raises(SlimError, match="of type mistral3 has no vocab_size"):
        vocabulary_size({"model_type": "mistral3", "text_config": {}})
