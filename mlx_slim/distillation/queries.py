"""What a teacher is asked about a training row, and the rows that its answers become.

Invariant: a row keeps its form (Alpaca, chat, completions), so that the student's template treats
it as before; only the answer, or for a rationale the question's beginning too, is another. A
rationale stands behind its teacher's own prefix, so a student that is asked without it answers and
does not explain (arXiv 2402.04616).

    data       question            -> answer
    sequence   question            -> the teacher's own text        (arXiv 1606.07947)
    rationale  prefix_m + question -> why the answer is right, says teacher m
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


@dataclass(frozen=True)
class TeacherQuery:
    """One training row that a teacher can be asked about.

    Attributes:
        id: Its own ``id``, else where it stands.
        source: Number of its source.
        raw: As it came.
        example: In normal form.
    """

    id: str
    source: int
    raw: RawRow
    example: Example

    @property
    def answer(self) -> str:
        """The row's own answer."""
        return self.example.texts[-1]

    @property
    def asks(self) -> bool:
        """Whether there is a question before the last answer: plain text asks nothing."""
        return any(message["role"] == "user" for message in self.example.messages[:-1])

    def sequence(self) -> TeacherRequest:
        """Return the question as the data ask it."""
        return TeacherRequest(self.id, self.example.messages[:-1], self.answer, self.raw.place)

    def rationale(self, template: Callable[[Mapping[str, Any]], str]) -> TeacherRequest:
        """Return the request to explain the right answer."""
        text = self.render(template, "distill.ask.prompt")
        return TeacherRequest(
            self.id, [{"role": "user", "content": text}], self.answer, self.raw.place
        )

    def render(self, template: Callable[[Mapping[str, Any]], str], key: str) -> str:
        """Return a template over the row's fields, ``prompt`` and ``answer``.

        Raises:
            SlimError: A field that the row does not have; row and field are named.
        """
        asked = [m["content"] for m in self.example.messages[:-1] if m["role"] == "user"]
        fields = {"answer": self.answer.strip(), **self.raw.value, "prompt": asked[-1]}
        try:
            return template(fields)
        except Exception as error:  # a template can raise anything
            raise SlimError(
                f"{self.raw.place}: {key}: {error or type(error).__name__}",
                f"the row has {', '.join(fields)}",
            ) from error

    def row(self, answer: str | None = None, prefix: str = "") -> dict[str, Any]:
        """Return the row for training, perhaps with another answer, perhaps behind a prefix."""
        example, fields = self.example, self.example.fields
        if example.kind == "text":
            return {"text": fields["text"]}
        own = self.answer
        lead = own[: len(own) - len(own.lstrip())]  # what stands between question and answer
        text = own if answer is None else lead + answer.strip()
        if example.kind == "completions":
            return {"id": self.id, "prompt": prefix + fields["prompt"], "completion": text}
        if example.kind == "alpaca":
            kept = {k: fields[k] for k in ("input", "system") if fields.get(k)}
            question = prefix + fields["instruction"]
            return {"id": self.id, "instruction": question, **kept, "output": text}
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
        ledger.given += 1
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
        own = raw.value.get("id")
        name = own if isinstance(own, str) and own else f"{raw.where}:{raw.number}"
        yield TeacherQuery(name, number, raw, example)


def prefix_of(setting: str | None, number: int) -> Callable[[Mapping[str, Any]], str]:
    """Return a teacher's prefix as a template; ``number`` counts teachers from 1."""
    return compile_text(f"[rationale {number}] " if setting is None else setting)
