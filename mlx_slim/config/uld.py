"""The recipe's ``distill.uld`` section: how logits of another tokenizer's teacher are compared.

Invariant: names and defaults are those of TRL's ``GOLDConfig`` (``use_extended_uld``,
``uld_token_merge_strategy``, ``uld_use_hybrid_loss``, ``uld_hybrid_*_weight``). Try it:
``mlx-slim distill smollm2-lora distill.method=uld "distill.teachers=[{model: OTHER}]" --dry-run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.values import LARGEST

PartWeight = Annotated[float, Field(ge=0, le=LARGEST)]


class ULDConfig(Section):
    """How distributions over different vocabularies are compared (arXiv 2402.12030).

    Attributes:
        extended: Align the two models' tokens where they end at the same byte of an answer, and
            merge those between; else the i-th token of one with the i-th of the other.
        merge: Of a group of tokens: ``observed`` is the distribution after its first token, times
            the probability of its other tokens; ``bayesian`` is the distribution of its last token,
            times the probability of those before it.
        hybrid: Compare tokens that both vocabularies have by ``divergence`` (``forward``,
            ``reverse`` or ``jsd``), and only the others by their sorted probabilities.
        matched_weight: Of the first part; None takes the share of the teacher's tokens that the
            student has too.
        unmatched_weight: Of the second part; None takes 1 less that share.
    """

    extended: bool = True
    merge: Literal["observed", "bayesian"] = "observed"
    hybrid: bool = False
    matched_weight: PartWeight | None = None
    unmatched_weight: PartWeight | None = None

    @model_validator(mode="after")
    def _both_weights(self) -> ULDConfig:
        weights = (self.matched_weight, self.unmatched_weight)
        if weights.count(None) == 1:
            raise ValueError(
                f"matched_weight={weights[0]} and unmatched_weight={weights[1]}: set both, or none"
            )
        if weights != (None, None) and not self.hybrid:
            raise ValueError("matched_weight and unmatched_weight are weights of hybrid=true")
        if weights == (0, 0):
            raise ValueError("matched_weight=0 and unmatched_weight=0 compare nothing")
        return self
