"""A question of a task as it is scored: contexts and continuations.

Invariant: ``pairs`` is what a model reads and what is scored after it, one pair a choice. Usually
one context stands before all choices; where the choices are contexts (WinoGrande), each has its
own, and the continuation is the same. Try it: ``mlx-slim tasks winogrande``.

    openbookqa   context | choice 1      context | choice 2
    winogrande   context with option 1 | rest      context with option 2 | rest
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question, ready to be encoded.

    Attributes:
        doc_id: Its row's number in the task's own rows, from 0.
        subject: Its subtask, None where a task has none.
        context: The whole prompt, without a delimiter at the end.
        choices: Continuations as scored, delimiter included; none for generation.
        lengths: Characters that ``acc_norm`` divides by: of each choice without its delimiter, or
            of each context without description and examples. Of a text that is predicted: its words
            and its UTF-8 bytes, which perplexities divide by.
        target: Place of the right choice, or the right text; where several are right, the first.
        others: The other right ones.
        contexts: Of each choice its own prompt; none where ``context`` stands before all.
    """

    doc_id: int
    subject: str | None
    context: str
    choices: tuple[str, ...]
    lengths: tuple[int, ...]
    target: int | str
    others: tuple[int | str, ...] = ()
    contexts: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[int | str, ...]:
        """All right answers."""
        return (self.target, *self.others)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of each choice; none for generation."""
        contexts = self.contexts or (self.context,) * len(self.choices)
        return list(zip(contexts, self.choices, strict=True))

    @property
    def readable(self) -> tuple[str, ...]:
        """Each choice as a reader tells it from the others, behind ``context``."""
        if not self.contexts:
            return self.choices
        return tuple(before.removeprefix(self.context) + after for before, after in self.pairs)

    @property
    def longest(self) -> tuple[str, str]:
        """The longest of ``pairs``; the prompt and an empty text for generation."""
        return max(self.pairs, key=lambda pair: len(pair[0] + pair[1]), default=(self.context, ""))
