"""Requests to a teacher about training rows, and the training rows that its responses become.

Invariant: a row keeps its format (Alpaca, chat, completions), so that the student's template treats
it as before; only the answer, and for a rationale the beginning of the question, is replaced. A
rationale is trained behind the prefix of its teacher, so a student that is prompted without a
prefix answers and does not explain (arXiv 2402.04616). Try it:
``mlx-slim distill tinyllm-openbookqa -o runs/try``.

    data       question            -> answer
    sequence   question            -> the teacher's text                        (arXiv 1606.07947)
    rationale  prefix_m + question -> teacher m's explanation of the right answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_slim.config.expressions import compile_text
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data.formats import Dropped, Example, read_example
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.sources import RawRow
from mlx_slim.distillation.answers import TeacherRequest
from mlx_slim.errors import SlimError
from mlx_slim.reading import JsonObject


@dataclass(frozen=True)
class TeacherQuery:
    """One training row that a request to a teacher can be made of.

    Attributes:
        id: The row's ``id``, else its file and line.
        source: Number of its source.
        raw: The row as it was read.
        example: The same in normal form.
    """

    id: str
    source: int
    raw: RawRow
    example: Example

    @property
    def answer(self) -> str:
        """The answer in the data."""
        return self.example.texts[-1]

    @property
    def asks(self) -> bool:
        """Whether there is a question before the last answer: plain text has none."""
        return any(message["role"] == "user" for message in self.example.messages[:-1])

    def sequence(self) -> TeacherRequest:
        """Return the request with the row's own question."""
        return TeacherRequest(self.id, self.example.messages[:-1], self.answer, self.raw.place)

    def rationale(self, template: Callable[[Mapping[str, Any]], str]) -> TeacherRequest:
        """Return the request to explain the right answer."""
        text = self.render(template, "distill.ask.prompt")
        return TeacherRequest(
            self.id, [{"role": "user", "content": text}], self.answer, self.raw.place
        )

    def render(self, template: Callable[[Mapping[str, Any]], str], key: str) -> str:
        """Return a template, rendered with the row's fields, ``prompt`` and ``answer``.

        Raises:
            SlimError: A field that the row does not have; row and field are named.
        """
        turns = [m["content"] for m in self.example.messages[:-1] if m["role"] == "user"]
        fields = {"answer": self.answer.strip(), **self.raw.value, "prompt": turns[-1]}
        try:
            return template(fields)
        except Exception as error:  # a template can raise anything
            raise SlimError(
                f"{self.raw.place}: {key}: {error or type(error).__name__}",
                f"the row has {', '.join(fields)}",
            ) from error

    def row(self, answer: str | None = None, prefix: str = "") -> JsonObject:
        """Return the row for training, with another answer and behind ``prefix`` if given."""
        example, fields = self.example, self.example.fields
        if example.kind == "text":
            return {"text": fields["text"]}
        # White space between question and answer stays.
        lead = self.answer[: len(self.answer) - len(self.answer.lstrip())]
        text = self.answer if answer is None else lead + answer.strip()
        if example.kind == "completions":
            return {"id": self.id, "prompt": prefix + fields["prompt"], "completion": text}
        if example.kind == "alpaca":
            others = {k: fields[k] for k in ("input", "system") if fields.get(k)}
            question = prefix + fields["instruction"]
            return {"id": self.id, "instruction": question, **others, "output": text}
        messages = [dict(message) for message in example.messages]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if prefix and last is not None:
            messages[last]["content"] = prefix + messages[last]["content"]
        messages[-1]["content"] = text
        for message, weight in zip(messages, example.turn_weights, strict=True):
            if message["role"] == "assistant" and weight != 1:
                message["weight"] = weight
        return {"id": self.id, "messages": messages, **example.extras}


def read_queries(
    source: Iterable[RawRow],
    number: int,
    config: SourceConfig,
    data: DataConfig,
    ledger: SourceLedger,
) -> Iterator[TeacherQuery]:
    """Yield the rows of a source that can be learned from; count the others in ``ledger``.

    Raises:
        SlimError: Rows that are wrong, as in ``data.formats``.
    """
    for raw in source:
        ledger.rows_read += 1
        try:
            example = read_example(
                raw,
                config.format or data.format,
                columns=data.columns,
                system=config.system or data.system,
            )
        except Dropped as dropped:
            ledger.drop(dropped.reason, raw)
            continue
        name = raw.value.get("id")
        if not isinstance(name, str) or not name:
            name = f"{raw.where}:{raw.number}"
        yield TeacherQuery(name, number, raw, example)


def prefix_of(setting: str | None, number: int) -> Callable[[Mapping[str, Any]], str]:
    """Return a teacher's prefix as a template; ``number`` counts teachers from 1."""
    return compile_text(f"[rationale {number}] " if setting is None else setting)
