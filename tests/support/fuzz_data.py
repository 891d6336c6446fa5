"""Targets of the fuzz tests that are data: rows, templates, tasks, recipes, matrices, replies."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.fuzz_models import make_model
from tests.support.fuzz_run import Target

_BASE = "base"
_ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": "é"}]}
    for n in range(6)
]
_TABLE = [{"prompt": f"say {n} " * 100, "completion": f"{n}, said"} for n in range(6)]
_ABOUT = {"version": 1, "name": "sums", "by": ["a", "b"], "licence": {"name": "none", "year": 1}}
_TEMPLATE = """\
{%- set ns = namespace(last=messages | length - 1) -%}
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text.strip() | trim }}<|im_end|>
{% endmacro -%}
{%- for message in messages if message.content is string -%}
{%- set mark = ' ' * (0 if loop.index0 == ns.last else 0) -%}
{{ turn(message.role, message['content'] ~ mark) }}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n'.join(['', '']) }}{% endif -%}
"""
_TASK = """\
kind: generation
data: {path: rows.jsonl, where: "{{ number >= 0 }}"}
fields: {question: text, answer: text}
num_fewshot: 0
description: "Answer.\\n"
prompt: "Q: {{ question | regex_replace('\\\\\\\\s+', ' ') }}\\nA:"
target: "{{ answer | upper }}"
max_tokens: 4
filters:
  strict: {pattern: "#### (-?[0-9.,]+)"}
  flexible: {pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)", take: last}
ignore: [",", "(?s).*#### "]
ignore_case: true
"""
_QUESTIONS = [{"question": f"what is {n}?", "answer": f"#### {n}", "number": n} for n in range(4)]
_RECIPE = """\
extends: parent.yaml
model: base
method: lora
adapter: {rank: 4, alpha: 8, targets: all-linear}
data:
  path: &rows rows.jsonl
  columns: {prompt: question}
train:
  steps: 3
  learning_rate: 1e-4
  max_length: 128
"""
_PARENT = "train: {batch_tokens: 256, schedule: constant, warmup: 0.0}\nmemory: {budget: 1GB}\n"
_MATRIX = """\
title: Small models
models:
  small: {source: base}
methods:
  base: {kind: base}
  lora: {kind: tuned, recipe: {method: lora, adapter: {rank: 4}}}
  fused: {kind: fused, of: lora}
recipe: {data: {path: rows.jsonl}, train: {steps: 2}}
tasks: [{task: arc_easy, limit: 5}]
seeds: [0]
"""
_OVERRIDES = ["train.steps=3", "data.columns={prompt: question}", "adapter.targets=[q_proj]"]
_REPLY = {
    "choices": [
        {"message": {"role": "assistant", "content": "Because."}, "finish_reason": "stop"},
    ],
    "usage": {"completion_tokens": 3},
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------- rows


def make_rows(folder: Path) -> None:
    """Write the same rows as every kind of file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_model(folder / _BASE)
    (folder / _BASE / "chat_template.jinja").write_text(_TEMPLATE)
    _write(folder / "rows.jsonl", _ROWS)
    (folder / "rows.json").write_text(json.dumps({**_ABOUT, "data": _ROWS}))
    (folder / "rows.txt").write_text("One paragraph.\n\nAnother one,\nof two lines.\n")
    (folder / "rows.csv").write_text('prompt,completion\na,"b, c"\n"d\ne",f\n')
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    long = [{**row, "note": "a remark " * 200} for row in _ROWS]  # that bits may flip in
    table = pa.Table.from_pylist(long)
    pq.write_table(table, folder / "rows.parquet", compression="none", row_group_size=4)
    table = pa.Table.from_pylist(_TABLE)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink:
        writer = pa.ipc.new_stream(sink, table.schema)
        writer.write_table(table)
        writer.close()


def use_rows(folder: Path, out: Path, name: str = "rows.jsonl") -> None:
    """Make tokens of a file of rows."""
    from mlx_slim.config.schema import DataConfig
    from mlx_slim.data import sources
    from mlx_slim.data.ledger import SourceLedger
    from mlx_slim.data.pipeline import Pipeline
    from mlx_slim.models.load import load_tokenizer

    template = folder / "mine.jinja"
    has_template = template.is_symlink() or template.exists()
    named: dict[str, Any] = {"template": str(template)} if has_template else {}
    data = DataConfig(path=str(folder / name), **named)
    pipeline = Pipeline(data, load_tokenizer(folder / _BASE), max_length=256)
    for config in data.sources:
        source = sources.find(config)
        ledger = SourceLedger(source.name, source.kind, config.weight, source.ignored)
        for _ in pipeline.rows(source, config, ledger):
            pass


def _only(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        make_rows(folder)
        for path in folder.glob("rows.*"):
            if path.name != f"rows{suffix}":
                path.unlink()

    return make


def _preview(source: Path, out: Path, name: str = "rows.jsonl") -> list[str]:
    words = ["data", "preview", "smollm2-lora", f"model={source / _BASE}", "revision=null"]
    template = [f"data.template={source / 'mine.jinja'}"] * (source / "mine.jinja").is_file()
    return [*words, f"data.path={source / name}", *template]


def make_template(folder: Path) -> None:
    _only(".jsonl")(folder)
    (folder / "mine.jinja").write_text(_TEMPLATE)


# ------------------------------------------------------------- tasks, recipes, matrices


def make_task(folder: Path) -> None:
    (folder / "task.yaml").write_text(_TASK)
    _write(folder / "rows.jsonl", _QUESTIONS)


def use_task(folder: Path, out: Path) -> None:
    """Ask a task's questions, and read answers."""
    from mlx_slim.evaluation.tasks.metrics import record_generation
    from mlx_slim.evaluation.tasks.prompts import build_questions
    from mlx_slim.evaluation.tasks.rows import load_rows
    from mlx_slim.evaluation.tasks.spec import find_task

    task = find_task(str(folder / "task.yaml"))
    for question in build_questions(task, load_rows(task)):
        if task.kind == "generation":
            record_generation(task, question, "It is #### 1,234. " + "a" * 60, "eos")


def make_recipe(folder: Path) -> None:
    (folder / "mine.yaml").write_text(_RECIPE)
    (folder / "parent.yaml").write_text(_PARENT)


def use_recipe(folder: Path, out: Path) -> None:
    from mlx_slim.config.load import load_recipe, render

    render(load_recipe(str(folder / "mine.yaml")))


def make_matrix(folder: Path) -> None:
    (folder / "mine.yaml").write_text(_MATRIX)


def use_matrix(folder: Path, out: Path) -> None:
    from mlx_slim.compare.matrix import cell_recipe, load_matrix

    layout = load_matrix(str(folder / "mine.yaml"))
    for cell in layout.cells:
        if cell.kind == "tuned":
            cell_recipe(layout.matrix, cell.model, cell.method, cell.seed, cell.name)


def make_overrides(folder: Path) -> None:
    (folder / "overrides.json").write_text(json.dumps(_OVERRIDES))


def use_overrides(folder: Path, out: Path) -> None:
    """Apply the words of a command line; what is no list of texts could not be typed."""
    from mlx_slim.config.load import load_recipe
    from mlx_slim.reading import read_json

    words = read_json(folder / "overrides.json")
    words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    load_recipe("smollm2-lora", words)


# ------------------------------------------------------------------------------------ replies


def make_reply(folder: Path) -> None:
    (folder / "reply.json").write_text(json.dumps(_REPLY))


def use_reply(folder: Path, out: Path) -> None:
    """Ask an endpoint that answers with the file's bytes."""
    from mlx_slim.distillation.endpoint import EndpointTeacher
    from mlx_slim.reading import read_bytes
    from tests.support.endpoint import serving

    data = read_bytes(folder / "reply.json")
    with serving(lambda number, body: (200, data, {})) as served:
        teacher = EndpointTeacher(
            "t", served.base_url, "m", max_tokens=4, timeout=2, retries=1, backoff=0.01
        )
        list(teacher.answer([[{"role": "user", "content": "Why?"}]]))


_KINDS = (".jsonl", ".json", ".txt", ".csv", ".jsonl.gz", ".parquet", ".arrow")
TARGETS = [
    *(
        Target(
            f"rows{kind}",
            _only(kind),
            (f"rows{kind}",),
            partial(use_rows, name=f"rows{kind}"),
            partial(_preview, name=f"rows{kind}"),
            weight=3 if kind in (".jsonl", ".parquet") else 1,
        )
        for kind in _KINDS
    ),
    Target("template", make_template, ("mine.jinja",), use_rows, _preview, weight=3),
    Target("chat template", _only(".jsonl"), ("base/chat_template.jinja",), use_rows, _preview),
    Target("task", make_task, ("task.yaml",) * 3 + ("rows.jsonl",), use_task, weight=4),
    Target(
        "recipe",
        make_recipe,
        ("mine.yaml", "parent.yaml"),
        use_recipe,
        lambda source, out: ["train", str(source / "mine.yaml"), "--dry-run", "-o", str(out)],
        weight=3,
    ),
    Target("matrix", make_matrix, ("mine.yaml",), use_matrix, weight=2),
    Target("overrides", make_overrides, ("overrides.json",), use_overrides, weight=2),
    Target("reply", make_reply, ("reply.json",), use_reply, weight=2),
]
