"""Tokenizers in GGUF: what a file lacks is refused; what is rebuilt does what its tables say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from mlx_slim.errors import SlimError
from mlx_slim.export.model import export_gguf
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf import tokenizer as gguf_tokenizer
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.gguf.tokenizer import build_tokenizer
from mlx_slim.models.gguf.vocab import vocabulary
from mlx_slim.models.load import load, load_tokenizer, read_config
from tests.models.gguf.test_load import IDS, write_gguf
from tests.support.tiny import CHATML, tiny_model

NAMED = {"default": CHATML, "tool_use": CHATML + "{{ tools }}", "rag v2": CHATML + "x"}


def byte_level(**changes: Any) -> dict[str, Any]:
    """The metadata of a small byte-level tokenizer; ``changes`` by the keys' last part."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "in", "<|end|>"]
    merges = ["Ġ t", "h e", "Ġt he", "i n"]
    inputs = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1] * 260 + [3]),
        "merges": merges,
        "eos_token_id": 260,
        **changes,
    }
    existing = {
        f"tokenizer.ggml.{key}": value for key, value in inputs.items() if value is not None
    }
    return {"general.architecture": "llama", "tokenizer.chat_template": CHATML, **existing}


def pieces(**changes: Any) -> dict[str, Any]:
    """The metadata of a small SentencePiece tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁a", "ab", "▁ab", "▁", "a", "b", "c", "▁▁", "w", "o", "r", "wo", "or"]
    inputs = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array(
            [0.0] * 259 + [-1, -0.5, -2, -9, -9, -9, -9, -3, -9, -9, -9, -5, -4], np.float32
        ),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 13),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    existing = {
        f"tokenizer.ggml.{key}": value for key, value in inputs.items() if value is not None
    }
    return {"general.architecture": "llama", **existing}


def test_whole_files_are_rebuilt() -> None:
    notes: list[str] = []
    tokenizer = build_tokenizer(byte_level(), notes)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in the<|end|>")) == [
        "in", "Ġthe", "<|end|>",
    ]  # fmt: skip
    assert not notes
    assert build_tokenizer(pieces(), notes).encode("ab") == [1, 261]
    assert notes == ["the file has no chat template: it cannot chat, and rows are read as text"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            byte_level(merges=None),
            "no tokenizer.ggml.merges, which a tokenizer of type 'gpt2'",
        ),
        (
            byte_level(tokens=None),
            "no tokenizer.ggml.tokens, which a tokenizer of type 'gpt2' needs",
        ),
        (byte_level(merges=[]), "no tokenizer.ggml.merges"),
        (
            byte_level(merges=["Ġ t", "h e"]),
            "merges do not produce 2 of its 4 longer tokens, such as",
        ),
        (byte_level(merges=["Ġ t", "h e", "Ġthe", "i n"]), "merge 'Ġthe' is not a pair of tokens"),
        (byte_level(merges=["Ġ t", "h e", "Ġt he", "i n", "q qq"]), "cannot be rebuilt"),
        (byte_level(token_type=None), "no tokenizer.ggml.token_type, which a tokenizer of type"),
        (byte_level(token_type=np.array([1])), "has 261 tokens but 1 types"),
        (byte_level(eos_token_id=999), "eos_token_id is 999, it has 261 tokens"),
        (pieces(scores=None), "no tokenizer.ggml.scores, which a tokenizer of type 'llama' needs"),
        (pieces(scores=np.zeros(3)), "has 272 tokens and the scores of 3"),
        (pieces(scores=np.zeros(272)), "scores are all equal"),
        (pieces(token_type=None), "no tokenizer.ggml.token_type"),
        (pieces(bos_token_id=272), "bos_token_id is 272, it has 272 tokens"),
    ],
)
def test_what_a_file_lacks_is_one_line(metadata: Any, message: str) -> None:
    with pytest.raises(SlimError, match=message) as error:
        build_tokenizer(metadata, [])
    assert "\n" not in str(error.value)


def test_what_is_missing_but_not_needed_is_said() -> None:
    notes: list[str] = []
    metadata = byte_level(eos_token_id=None, padding_token_id=999, seperator_token_id=3)
    metadata.pop("tokenizer.chat_template")
    build_tokenizer(metadata, notes)
    assert len(notes) == 3
    assert notes[0] == "tokenizer.ggml.padding_token_id is 999, no token's: left out"
    assert notes[1].startswith("the file names no end token")
    assert notes[2].startswith("the file has no chat template")
    twice = byte_level()
    twice["tokenizer.ggml.tokens"][250] = twice["tokenizer.ggml.tokens"][249]
    with pytest.raises(SlimError, match="cannot be rebuilt"):
        build_tokenizer(twice, notes := [])  # a byte is lost with it
    assert notes == ["1 tokens stand twice in the file: one id of each is never used"]


def test_a_mistake_in_rebuilding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges in the wrong order cut text otherwise than the scores say; so does a lost token."""
    right = gguf_tokenizer._merges

    def reversed_merges(*args: Any) -> Any:
        return right(*args)[::-1]

    monkeypatch.setattr(gguf_tokenizer, "_merges", reversed_merges)
    with pytest.raises(SlimError, match="by the file's tables"):
        build_tokenizer(pieces(), [])
    monkeypatch.setattr(gguf_tokenizer, "_add_special_tokens", lambda *_: [260])
    with pytest.raises(SlimError, match=r"the control token '<.end.>' is cut into pieces"):
        build_tokenizer(byte_level(eos_token_id=None), [])


def test_a_converted_tokenizer_that_differs_is_not_kept(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.models import convert as module

    def spoiled(folder: Any, model: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        save(folder, model, tokenizer, *args, **kwargs)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(content))

    save = module.save_model
    monkeypatch.setattr(module, "save_model", spoiled)
    with pytest.raises(SlimError, match="the converted tokenizer differs from that of"):
        convert(tiny("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- several templates


def test_named_templates_go_there_and_back(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template == NAMED
    export_gguf(folder, tmp_path / "out", kind="f16")
    file = tmp_path / "out" / "m-f16.gguf"
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    assert fields["tokenizer.chat_templates"] == ["tool_use", "rag_v2"]
    assert fields["tokenizer.chat_template"] == CHATML
    assert fields["tokenizer.chat_template.tool_use"] == NAMED["tool_use"]
    convert(file, tmp_path / "back")
    again = load_tokenizer(tmp_path / "back").chat_template
    assert again == {"rag_v2" if name == "rag v2" else name: text for name, text in NAMED.items()}


def test_templates_without_a_default_go_there_and_back(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    tokenizer.save_pretrained(folder)
    export_gguf(folder, tmp_path / "out", kind="f16")  # compared on text without a template
    metadata = vocabulary(tokenizer, read_config(folder))
    assert "tokenizer.chat_template" not in metadata
    assert build_tokenizer(metadata, []).chat_template == {"tool_use": CHATML, "rag": CHATML}


# --------------------------------------------------------------------------------- split files


def split_in(path: Path, count: int, **changes: Any) -> list[Path]:
    """Split a GGUF file into parts as llama-gguf-split does; return their paths."""
    reader = GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    paths = []
    for number in range(count):
        part = path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf")
        writer = GGUFWriter(part, "llama")
        if number == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    kind, *inner = field.types
                    writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
        texts_seen = {"no": number, "count": count, **changes.get(str(number), {})}
        writer.add_uint16("split.no", texts_seen["no"])
        writer.add_uint16("split.count", texts_seen["count"])
        writer.add_int32("split.tensors.count", texts_seen.get("tensors", len(names)))
        again = reader.tensors[:1] if texts_seen.get("again") else []
        for tensor in [*reader.tensors[number::count], *again]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(part)
    return paths


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_split_files_are_one_model_given_any_part(
    tiny: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny("llama"), "llama", {"*": kind})
    expected = import_gguf(path)
    halves = split_in(path, 3)
    path.unlink()
    for part in halves:
        actual = import_gguf(part)
        assert actual.config == expected.config
        assert mx.array_equal(actual.model(IDS), expected.model(IDS))
        assert actual.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert convert(halves[1], tmp_path / "out").exact
    assert load(tmp_path / "out").config["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1": {"no": 0}}, "00002-of-00003.gguf is not part 2 of 3: it says 0 of 3"),
        ({"2": {"count": 4}}, "00003-of-00003.gguf is not part 3 of 3: it says 2 of 4"),
        ({"0": {"tensors": 99}}, "have 30 tensors, expected 99"),
        ({"1": {"again": True}}, "is not part 2 of 3: it holds .* again"),
    ],
)
def test_parts_that_do_not_belong_together(
    tiny: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    halves = split_in(tmp_path / "m.gguf", 3, **changes)
    with pytest.raises(SlimError, match=message):
        import_gguf(halves[0])


def test_missing_parts_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama")
    first, second, third = split_in(tmp_path / "m.gguf", 3)
    third.unlink()
    for part in (first, second):
        with pytest.raises(SlimError, match=r"one of 3 shards .* without m-00003-of-00003\.gguf"):
            import_gguf(part)
    second.rename(tmp_path / "other.gguf")
    with pytest.raises(SlimError, match="its name does not say which") as error:
        import_gguf(tmp_path / "other.gguf")
    assert "NAME-00001-of-00003.gguf" in error.value.hint
