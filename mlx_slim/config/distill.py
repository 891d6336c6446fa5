"""The recipe's ``distill`` section: who teaches, and what the student takes from it.

Invariant: a default or a bound of distillation stands here and nowhere else. A recipe without the
section is a fine-tune. Try it:
``mlx-slim distill smollm2-lora "distill.teachers=[{model: BIGGER}]" --dry-run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Fraction, PositiveInt, Section


class TeacherConfig(Section):
    """One teacher (in mutual distillation: the second student).

    Attributes:
        model: Hub id or folder; None is the model that the student came from. With ``base_url``
            its name there.
        revision: Commit or tag of a hub model.
        adapter: Folder of an adapter that the teacher wears.
        base_url: An OpenAI-compatible endpoint that answers for the teacher.
        api_key_env: Name of the environment variable that holds the endpoint's key.
        weight: This teacher's share of the divergence (logits; shares are divided by their sum), or
            α of its rationales (arXiv 2402.04616).
        name: What reports call it; None takes the last part of ``model``.
    """

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str | None = None

    @model_validator(mode="after")
    def _an_endpoint_is_no_folder(self) -> TeacherConfig:
        if self.base_url is None:
            if self.api_key_env is not None:
                raise ValueError(
                    f"api_key_env={self.api_key_env} has no base_url: a key is for an endpoint"
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


class DistillConfig(Section):
    """What a student learns from its teachers (arXiv 1503.02531).

    Logits: L = (1−λ)·CE + λ·T²·Σ_m share_m·KL_m at temperature T.

    Attributes:
        teachers: One or more; each is loaded alone, and only to write down what it says.
        method: ``logits`` (needs one tokenizer), ``sequence`` (the teacher's own texts,
            arXiv 1606.07947), ``rationales`` (arXiv 2402.04616), ``mutual`` (the one "teacher" is a
            second student, arXiv 1706.00384), or ``auto``: logits where the tokenizers agree, else
            sequence.
        divergence: ``forward`` KL(teacher‖student), ``reverse`` KL(student‖teacher), or
            ``symmetric``, the mean of both.
        temperature: T; both sides' logits are divided by it.
        weight: λ, the share of the divergence; 0 is plain fine-tuning.
        top_k: Logits of a teacher that are kept for each token (the rest is one bucket), or
            ``all``.
        cache: Folder of what teachers said, shared between runs; None keeps it in the run folder.
    """

    teachers: Annotated[list[TeacherConfig], Field(min_length=1)] = Field(
        default_factory=lambda: [TeacherConfig()]
    )
    method: Literal["auto", "logits", "sequence", "rationales", "mutual"] = "auto"
    divergence: Literal["forward", "reverse", "symmetric"] = "forward"
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    weight: Fraction = 0.5
    top_k: Literal["all"] | PositiveInt = 64
    cache: str | None = None

    @model_validator(mode="after")
    def _two_students(self) -> DistillConfig:
        if self.method != "mutual":
            return self
        if len(self.teachers) != 1:
            raise ValueError(
                f"method=mutual has one second student, not {len(self.teachers)} teachers"
            )
        if self.teachers[0].base_url is not None or self.teachers[0].adapter is not None:
            raise ValueError(
                "method=mutual trains its second student: give teachers=[{model: FOLDER}] "
                "without base_url and adapter"
            )
        return self
