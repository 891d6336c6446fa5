"""The recipe's ``distill`` section: teachers, and what the student learns from them.

Invariant: a default or a bound of distillation stands here and nowhere else. A recipe without the
section is a fine-tune. Try it:
``mlx-slim distill smollm2-lora "distill.teachers=[{model: BIGGER}]" --dry-run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.uld import ULDConfig
from mlx_slim.config.values import Factor, Fraction, PositiveInt


def _check_template(text: str) -> None:
    from mlx_slim.config.expressions import compile_text  # jinja2: a tenth of a second

    compile_text(text)


class TeacherConfig(Section):
    """One teacher (in mutual distillation: the second student).

    Attributes:
        model: Hub id or folder; None is the model that the student came from. With ``base_url``
            its name there.
        revision: Commit or tag of a hub model.
        adapter: Folder of an adapter that the teacher wears.
        base_url: An OpenAI-compatible endpoint that answers for the teacher.
        api_key_env: Name of the environment variable that holds the endpoint's key.
        weight: Weight of this teacher's divergence (logits; weights are divided by their sum), or
            α of its rationales (arXiv 2402.04616).
        name: What reports call it; None takes the last part of ``model``.
        prefix: What a student reads before a question to give this teacher's rationale, Jinja over
            the row's fields; None is ``[rationale N] ``, N the teacher's number.
    """

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    weight: Factor = 1.0
    name: str | None = None
    prefix: str | None = None

    @field_validator("prefix")
    @classmethod
    def _is_a_template(cls, value: str | None) -> str | None:
        if value is not None:
            _check_template(value)
        return value

    @model_validator(mode="after")
    def _an_endpoint_is_no_folder(self) -> TeacherConfig:
        if self.base_url is None:
            if self.api_key_env is not None:
                raise ValueError(
                    f"api_key_env={self.api_key_env} needs base_url: a key is for an endpoint"
                )
            return self
        if self.model is None:
            raise ValueError(f"base_url={self.base_url} needs model=NAME, as the endpoint calls it")
        for key in ("revision", "adapter"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"base_url={self.base_url} and {key}={getattr(self, key)} are both set: "
                    "an endpoint loads its own model"
                )
        return self


RATIONALE = """\
{{ prompt }}
{% if choices is defined %}Options:
{% for choice in choices %}- {{ choice }}
{% endfor %}{% endif %}Correct answer: {{ answer }}

Explain in two or three sentences why this answer is correct."""


class QueryConfig(Section):
    """How a text teacher is queried; its responses are greedy.

    Attributes:
        prompt: For its rationale: Jinja over the row's fields, ``prompt``, ``answer`` and, in rows
            of a multiple-choice task, ``choices``.
        max_tokens: Longest answer, tokens; longer ones are cut, counted and not learned.
        until: Texts that end an answer, for teachers that do not end it themselves.
        concurrency: Requests to an endpoint at one time.
        timeout: Seconds that an endpoint may be silent.
        retries: Tries after the first one (429, 5xx, a lost connection).
    """

    prompt: str = RATIONALE
    max_tokens: PositiveInt = 256
    until: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5

    @field_validator("prompt")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        _check_template(value)
        return value


class DistillConfig(Section):
    """What a student learns from its teachers (arXiv 1503.02531).

    Logits: L = (1−λ)·CE + λ·T²·Σ_m share_m·KL_m at temperature T.
    ULD: L = (1−λ)·CE + λ·Σ_m share_m·d_m, d the distance of sorted probabilities, a mean over the
    aligned tokens of a row, then over rows.
    Sequence: L = (1−λ)·CE(data) + λ·Σ_m share_m·CE(texts of m), each a mean over its own tokens.
    Rationales: L = CE(data) + Σ_m α_m·CE(rationales of m), each a mean over its own tokens.

    Attributes:
        teachers: One or more; each is loaded alone, and only to write down what it says.
        method: ``logits`` (needs one tokenizer), ``uld`` (logits of a teacher with another
            tokenizer, arXiv 2402.12030), ``sequence`` (the teacher's own texts,
            arXiv 1606.07947), ``rationales`` (arXiv 2402.04616), ``mutual`` (the one "teacher" is a
            second student, arXiv 1706.00384), ``on-policy`` (logits, on texts of the data and of
            the student, arXiv 2306.13649), or ``auto``: logits where the tokenizers agree, else
            sequence.
        on_policy_fraction: With ``on-policy``, the share of micro-batches whose answers the student
            writes (``rounds``); their loss is the divergence alone. None is 0.5.
        divergence: ``forward`` KL(teacher‖student), ``reverse`` KL(student‖teacher),
            ``symmetric``, the mean of both, or ``jsd``, the generalized Jensen-Shannon divergence
            β·KL(p‖m) + (1−β)·KL(q‖m) of teacher p and student q from m = β·p + (1−β)·q.
        beta: β of ``jsd``; 0 is forward and 1 reverse. None is 0.5.
        temperature: T; both sides' logits are divided by it.
        weight: λ, the share of the divergence or of the teachers' texts; 0 is plain fine-tuning.
        top_k: Logits of a teacher that are kept for each token (the rest is one bucket), or
            ``all``.
        cache: Folder of cached teacher targets, shared between runs; None: in the run folder.
        ask: How text teachers are queried.
        uld: How ``uld`` compares the vocabularies.
    """

    teachers: Annotated[list[TeacherConfig], Field(min_length=1)] = Field(
        default_factory=lambda: [TeacherConfig()]
    )
    method: Literal["auto", "logits", "sequence", "rationales", "mutual", "on-policy", "uld"] = (
        "auto"
    )
    on_policy_fraction: Fraction | None = None
    divergence: Literal["forward", "reverse", "symmetric", "jsd"] = "forward"
    beta: Fraction | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    weight: Fraction = 0.5
    top_k: Literal["all"] | PositiveInt = 64
    cache: str | None = None
    ask: QueryConfig = QueryConfig()
    uld: ULDConfig = ULDConfig()

    @property
    def sampled_fraction(self) -> float:
        """The share of micro-batches whose answers the student writes."""
        if self.method != "on-policy":
            return 0.0
        return 0.5 if self.on_policy_fraction is None else self.on_policy_fraction

    @property
    def jsd_beta(self) -> float:
        """β of the generalized Jensen-Shannon divergence that ``divergence`` names."""
        ends = {"forward": 0.0, "reverse": 1.0}
        return ends.get(self.divergence, 0.5 if self.beta is None else self.beta)

    @model_validator(mode="after")
    def _what_is_set_has_an_effect(self) -> DistillConfig:
        if self.on_policy_fraction is not None and self.method != "on-policy":
            raise ValueError(
                f"on_policy_fraction={self.on_policy_fraction} is for method=on-policy, not "
                f"{self.method}: drop one of them"
            )
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(
                f"beta={self.beta} is for divergence=jsd, not {self.divergence}: drop it"
            )
        if self.method == "uld" and self.divergence != "forward" and not self.uld.hybrid:
            raise ValueError(
                f"divergence={self.divergence} is for uld.hybrid=true: sorted probabilities have a "
                "distance and no divergence"
            )
        if self.method == "uld" and self.divergence == "symmetric":
            raise ValueError(
                "divergence=symmetric is not for method=uld: expected forward, reverse or jsd"
            )
        return self

    @model_validator(mode="after")
    def _two_students(self) -> DistillConfig:
        if self.method != "mutual":
            return self
        if len(self.teachers) != 1:
            raise ValueError(
                f"method=mutual has {len(self.teachers)} teachers: expected one, the second student"
            )
        if self.teachers[0].base_url is not None or self.teachers[0].adapter is not None:
            raise ValueError(
                "method=mutual trains its second student: give teachers=[{model: FOLDER}] "
                "without base_url and adapter"
            )
        return self
