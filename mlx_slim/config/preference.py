"""The recipe's ``preference`` section: which loss compares a good answer with a bad one.

Invariant: a default or a bound of preference tuning stands here and nowhere else; keys have TRL's
names where TRL has one. A recipe without the section learns its answers. Try it:
``mlx-slim train smollm2-dpo preference.loss=ipo --dry-run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.values import LARGEST, Factor

Loss = Literal["sigmoid", "ipo", "robust", "orpo", "simpo", "kto"]
PreferenceRows = Literal["pairs", "labels"]
WITHOUT_REFERENCE = ("orpo", "simpo")
_ONLY = {  # key -> the losses that read it
    "label_smoothing": ("sigmoid", "robust", "simpo"),
    "simpo_gamma": ("simpo",),
    "nll": ("orpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


class PreferenceConfig(Section):
    """How answers are compared (DPO, arXiv 2305.18290; Δ = log-ratio of chosen − of rejected).

    Attributes:
        loss: ``sigmoid`` is DPO, −logσ(βΔ); ``ipo`` (arXiv 2310.12036) and ``robust`` DPO
            (arXiv 2403.00409) have its reference too; ``orpo`` (arXiv 2403.07691) and ``simpo``
            (arXiv 2405.14734) have none; ``kto`` (arXiv 2402.01306) takes single rows with a
            ``label`` in place of pairs.
        beta: β; of ``orpo`` the weight of the odds ratio, of ``simpo`` the scale of the mean
            log-probability.
        label_smoothing: ε, the share of pairs assumed to be the wrong way round: with ``sigmoid``
            it is cDPO; ``robust`` needs it.
        simpo_gamma: γ, the margin that ``simpo`` asks for.
        nll: What ``orpo`` learns besides: the chosen ``answer``, as the paper, or ``all`` of
            prompt and chosen answer, as TRL.
        desirable_weight: Of rows with ``label: true`` (``kto``).
        undesirable_weight: Of rows with ``label: false`` (``kto``).
    """

    loss: Loss = "sigmoid"
    beta: Factor = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    simpo_gamma: Annotated[float, Field(ge=0, le=LARGEST)] = 0.5
    nll: Literal["answer", "all"] = "answer"
    desirable_weight: Factor = 1.0
    undesirable_weight: Factor = 1.0

    @property
    def rows(self) -> PreferenceRows:
        """What a row is: a pair of answers, or one answer with its label."""
        return "labels" if self.loss == "kto" else "pairs"

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model as it was before its first step."""
        return self.loss not in WITHOUT_REFERENCE

    @model_validator(mode="after")
    def _what_is_set_has_an_effect(self) -> PreferenceConfig:
        for key, losses in _ONLY.items():
            value = getattr(self, key)
            if self.loss not in losses and value != type(self).model_fields[key].default:
                raise ValueError(f"{key}={value} is for loss={' or '.join(losses)}: drop it")
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError(
                "loss=robust with label_smoothing=0 is loss=sigmoid: set label_smoothing to the "
                "share of pairs that are the wrong way round, such as 0.1"
            )
        return self


def loss_unit(has: Literal["pairs", "labels"] | None) -> str:
    """Return what a loss is counted by, for a sentence; ``has`` is ``Recipe.preference_rows``."""
    return {"pairs": "a pair", "labels": "a row", None: "nats/token"}[has]
