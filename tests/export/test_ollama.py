"""A folder for Ollama: a checked GGUF file, a template, stops, parameters; or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from gguf import GGUFReader

from mlx_slim.cli.main import run
from mlx_slim.data.chat_render import apply_chat_template
from mlx_slim.export import ollama
from mlx_slim.export.card import Card
from mlx_slim.export.ollama import describe_chat, export_ollama
from mlx_slim.models.convert import convert
from mlx_slim.models.gguf.load import import_gguf
from mlx_slim.models.gguf.write import write_gguf
from mlx_slim.models.load import load, load_tokenizer, read_config
from tests.adapters.support import IDS
from tests.support.adapters import tuned_logits, write_adapter, write_quantized
from tests.support.go_template import read_modelfile, render_go
from tests.support.memory import reset_peak
from tests.support.tiny import VOCAB, tiny_model

REVERSED = "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are multiples of 256."""
    return tiny_model(
        tmp_path_factory.mktemp("wide") / "wide", hidden_size=256, intermediate_size=512
    )


def _formats(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


def test_a_folder_for_ollama(wide: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(wide, tmp_path / "mine"))
    sampling = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "top_p": None}
    (source / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "eos_token_id": [VOCAB - 6, 258], **sampling})
    )
    done = export_ollama(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mine-q4_k_m.gguf", "Modelfile", "README.md", ".mlx-slim.json"}
    lines = read_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert lines[0] == ("FROM", "./mine-q4_k_m.gguf")
    assert set(lines[2:]) >= {
        ("stop", "<|im_end|>"),
        ("num_ctx", "512"),
        ("temperature", "0.6"),
        ("top_k", "20"),
        ("repeat_penalty", "1.05"),
    }
    tokenizer = load_tokenizer(source)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat.append({"role": "user", "content": "2"})
    assert render_go(dict(lines)["TEMPLATE"], chat) == apply_chat_template(tokenizer, chat)
    formats = _formats(tmp_path / "out" / "mine-q4_k_m.gguf")
    assert formats["output.weight"] == "Q6_K" and formats["blk.0.attn_q.weight"] == "Q4_K"
    assert formats["output_norm.weight"] == "F32"
    assert (
        done.facts[0].endswith("(20 Q4_K, 7 F32, 3 Q6_K)")
        and "ollama create mine" in done.commands[0]
    )


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k", "q6_k", "q5_1"])
def test_every_type_reads_back_here(wide: Path, tmp_path: Path, kind: str) -> None:
    export_ollama(wide, tmp_path / "out", kind=kind)
    report = convert(tmp_path / "out" / f"wide-{kind}.gguf", tmp_path / "back")
    assert report.exact
    expected, logits = load(wide).model(IDS), load(tmp_path / "back").model(IDS)
    bits = int(kind[1])
    limit = {4: 0.5, 5: 0.25, 6: 0.12}[bits]
    assert mx.abs(logits - expected).max() < limit * mx.abs(expected).max()


def test_rows_that_are_no_multiple_of_256_are_counted(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(tiny("llama")), "--to", "ollama", "-o", str(tmp_path / "out")]
    assert run([*words, "--type", "q6_k"]) == 0
    assert "no multiple of 256: Q8_0 instead of Q6_K" in capfd.readouterr().out
    assert set(_formats(tmp_path / "out" / "llama-q6_k.gguf").values()) == {"F32", "Q8_0"}


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_is_fused_into_its_base(
    tiny: Callable[..., Path], tmp_path: Path, bits: int | None
) -> None:
    base = tiny("llama") if bits is None else write_quantized(tmp_path / "q", tiny("llama"), bits)
    write_adapter(tmp_path / "run" / "adapters", base, size=0.5)
    done = export_ollama(tmp_path / "run", tmp_path / "out", kind="f32")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["run-f32.gguf"]
    logits = import_gguf(tmp_path / "out" / "run-f32.gguf").model(IDS)
    expected = tuned_logits(base, tmp_path / "run" / "adapters")
    close = 5e-4 if bits is None else 0.01  # dequantized to the dtype of its scales
    assert mx.abs(logits - expected).max() < close * mx.abs(expected).max()
    assert mx.abs(logits - load(base).model(IDS)).max() > 0.05
    assert not list(tmp_path.glob(".out*")) and "ollama create run" in done.commands[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card


def test_a_run_of_a_whole_model_is_taken(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "run" / "model")
    export_ollama(tmp_path / "run", tmp_path / "out", kind="q8_0")
    assert list((tmp_path / "out").glob("*-q8_0.gguf"))


def test_a_chat_template_that_ollama_cannot_have_is_refused_before_weights_are_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(tmp_path / "m", chat_template=REVERSED)
    monkeypatch.setattr(ollama, "load", lambda *_, **__: pytest.fail("weights were read"))
    words = ["export", str(source), "--to", "ollama", "-o", str(tmp_path / "out")]
    assert run(words) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and "cannot become one of Ollama" in error
    assert "--to gguf" in error and [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_without_a_chat_template_completes_texts(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m", chat_template=None, max_position_embeddings=32768)
    text, notes = describe_chat(load_tokenizer(source), read_config(source), source)
    assert dict(read_modelfile(text))["TEMPLATE"] == "{{ .Prompt }}"
    assert dict(read_modelfile(text))["num_ctx"] == "8192"
    assert any("no chat template" in note for note in notes)
    assert any("8,192 of the model's 32,768" in note for note in notes)


def test_an_answer_without_an_end_token_stops_where_the_user_begins(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}ASSISTANT: "
    source = tiny_model(tmp_path / "m", chat_template=plain)
    (source / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    text, _ = describe_chat(load_tokenizer(source), read_config(source), source)
    lines = read_modelfile(text)
    assert ("stop", "USER:") in lines and ("temperature", "0") in lines


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{llama}", "--type", "q4_k_l"], "unknown GGUF type 'q4_k_l'"),
        (["{phi}"], "phi models cannot be exported to GGUF"),
        (["{llama}", "--model", "{llama}"], "--model is the base of an adapter"),
        (["{llama}", "--dtype", "float32"], "--dtype is not used with --to ollama"),
        (["{nowhere}"], "does not exist"),
        (["{moved}"], "the base of"),
        (["{llama}", "-o", "out.gguf"], "the output is a folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: Any,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"llama": tiny("llama"), "phi": tiny("phi"), "nowhere": tmp_path / "nowhere"}
    base = Path(shutil.copytree(tiny("llama"), tmp_path / "base"))
    places["moved"] = write_adapter(tmp_path / "a", base)
    shutil.rmtree(base)
    assert run(["export", "--to", "ollama", "-o", "out", *(w.format(**places) for w in words)]) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("adapter", [False, True])
def test_an_interrupted_export_leaves_nothing(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    source = write_adapter(tmp_path / "a", tiny("llama"), size=0.5) if adapter else tiny("llama")
    before = [path.name for path in tmp_path.iterdir()]
    writes = []

    def stop(card: Card, folder: Path) -> None:
        writes.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "write", stop)
    words = ["export", str(source), "--to", "ollama", "-o", str(tmp_path / "deep" / "out")]
    assert run(words) == 130 and writes
    assert [path.name for path in tmp_path.iterdir()] == before


def test_the_same_export_again_is_complete(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = ["export", str(tiny("llama")), "--to", "ollama", "-o", str(tmp_path / "out")]
    assert run(words) == 0 and run(words) == 0
    assert run([*words, "--type", "q8_0"]) == 2


def test_one_matrix_in_float32_at_most_is_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    from mlx_slim.models.gguf import kquants, write

    source = tiny_model(
        tmp_path / "m", hidden_size=256, intermediate_size=8192, num_hidden_layers=2
    )
    loaded = load(source)
    matrix = 256 * 8192 * 4
    monkeypatch.setattr(write, "_ROWS_BYTES", 1 << 20)
    monkeypatch.setattr(kquants, "_CHUNK", 64)
    monkeypatch.setattr(kquants.os, "cpu_count", lambda: 1)
    tracemalloc.start()
    held = reset_peak()
    try:
        write_gguf(
            tmp_path / "m.gguf", loaded.model, loaded.tokenizer, loaded.config, "q4_k_m", "m"
        )
        ours = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The blocks of one matrix are 0.2 of it in float32; rows of it and their codes are less.
    assert ours < 0.8 * matrix
    assert mx.get_peak_memory() - held < 0.3 * matrix
