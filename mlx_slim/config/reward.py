"""The recipe's ``reward`` section: how answers are drawn and scored, and what is learned from them.

Invariant: a default or a bound of learning from rewards stands here and nowhere else; defaults are
TRL's. A recipe without the section is a fine-tune. Try it:
``mlx-slim train smollm2-grpo train.steps=3 --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.values import LARGEST

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


class RewardConfig(Section):
    """Group-relative policy optimization on rewards that a program computes (arXiv 2402.03300).

    For each question ``group_size`` answers are drawn (section ``rounds``); the advantage A of an
    answer is its reward minus the group's mean. With ρ = π/π_old a token's loss is

        −min(ρ·A, clip(ρ, 1 − epsilon, 1 + epsilon_high)·A) + beta·KL to the model at the start.

    Attributes:
        task: Evaluation task (a name or a YAML file) whose metric scores an answer against the
            answer of its row; None where ``--reward`` names a function.
        metric: Of that task; None is its first one.
        loss_type: How the tokens' losses become one: ``grpo`` the mean over answers of each
            answer's mean, ``bnpo`` the mean over the tokens of a step, ``dr_grpo`` their sum over
            answers times ``rounds.max_tokens`` (arXiv 2503.20783), ``dapo`` their sum over the
            tokens of a round (arXiv 2503.14476).
        group_size: Answers to a question (TRL's ``num_generations``).
        scale_rewards: ``group`` divides advantages by the standard deviation of the group, ``none``
            does not; None is ``none`` for ``dr_grpo``, as its paper says, else ``group``.
        beta: Weight of the KL divergence; 0 needs no reference.
        use_bias_correction_kl: Multiply the KL divergence of a token by ρ, as TRL does.
        epsilon: How far ρ may fall below 1 before a token with A < 0 is no longer learned.
        epsilon_high: How far above 1 with A > 0; None is ``epsilon``. DAPO's paper uses 0.28.
        mask_truncated: Learn nothing from answers that were cut at ``rounds.max_tokens`` (TRL's
            ``mask_truncated_completions``).
    """

    task: str | None = None
    metric: str | None = None
    loss_type: LossType = "dapo"
    group_size: Annotated[int, Field(ge=2, le=256)] = 8
    scale_rewards: Literal["group", "none"] | None = None
    beta: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    use_bias_correction_kl: bool = True
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: Annotated[float, Field(gt=0, le=LARGEST)] | None = None
    mask_truncated: bool = False

    @model_validator(mode="after")
    def _a_metric_is_of_a_task(self) -> RewardConfig:
        if self.metric is not None and self.task is None:
            raise ValueError(f"metric={self.metric} is read of a task: set task, or drop metric")
        return self

    @property
    def upper(self) -> float:
        """``epsilon_high``, resolved."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def divides_by_spread(self) -> bool:
        """Whether advantages are divided by the standard deviation of their group."""
        if self.scale_rewards is None:
            return self.loss_type != "dr_grpo"
        return self.scale_rewards == "group"


@dataclass(frozen=True)
class RewardSource:
    """A function that scores answers: on the command line, for it is run (``--reward``).

    Attributes:
        function: ``FILE.py:FUNCTION``.
        sha256: Of the file.
    """

    function: str
    sha256: str

    @property
    def same(self) -> tuple[str, str]:
        """What a resume must match: the file may have moved."""
        return self.function.rpartition(":")[2], self.sha256
