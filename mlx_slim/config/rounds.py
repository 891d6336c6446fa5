"""The recipe's ``rounds`` section: how a model answers prompts while it is trained.

Invariant: a default or a bound of rounds stands here and nowhere else; the section is used by
``distill.method=on-policy``. Try it:
``mlx-slim distill distill-on-policy-smollm2 rounds.steps=8 --dry-run``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mlx_slim.config.section import Section
from mlx_slim.config.values import PositiveInt


class RoundsConfig(Section):
    """Rounds of answers: the model answers prompts, then learns from the answers.

    Attributes:
        steps: Optimizer steps of a round; at the last one the text is as many steps old, less one.
        max_tokens: Longest answer, tokens; a row has ``train.max_length`` at most. Answers that are
            cut are learned from and counted.
        temperature: Logits are divided by it before a token is drawn.
        top_p: Mass of the likeliest tokens that are drawn from; 1 is all.
    """

    steps: PositiveInt = 16
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def longest_answers(self, prompts: Sequence[Sequence[int]], max_length: int) -> list[int]:
        """Return the longest answer to each prompt: prompt and answer fit ``max_length`` tokens."""
        return [max(1, min(self.max_tokens, max_length - len(prompt))) for prompt in prompts]
