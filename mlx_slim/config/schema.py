"""The recipe: every key, its one default and its range.

Invariant: a default or a bound stands here (for ``adapter``, ``train``, ``distill``,
``preference`` and ``reward``, in the file of that name) and nowhere else; unknown keys are errors.
The sections mirror the YAML (``adapter``, ``quantize``, ``data``, ``train``, ``distill``,
``preference``, ``reward``, ``memory``), and each is the only configuration object of the component
that reads it. Try it:
``mlx-slim train smollm2-lora train.steps=3 --dry-run -o /tmp/run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.preference import PreferenceConfig, PreferenceRows
from mlx_slim.config.reward import RewardConfig
from mlx_slim.config.rounds import RoundsConfig
from mlx_slim.config.section import Section
from mlx_slim.config.train import TrainConfig
from mlx_slim.config.values import LARGEST, TASK, Bytes, Count, Method, PositiveInt, Seed, Steps


class QuantizeConfig(Section):
    """How ``qlora`` quantizes a base that is not quantized yet, and ``mlx-slim quantize``.

    Attributes:
        bits: Bits per code.
        group_size: Weights that share a scale.
        mode: ``affine`` (scale and bias), or a float format of the OCP MX or NVFP4 family.
        qat: Train with weights rounded to this format (full, lora, dora) and save them in it.
    """

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[16, 32, 64, 128] = 64
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"
    qat: bool = False

    @model_validator(mode="after")
    def _valid_combination(self) -> QuantizeConfig:
        fixed = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
        if self.mode in fixed and (self.bits, self.group_size) != fixed[self.mode]:
            bits, group = fixed[self.mode]
            raise ValueError(
                f"mode {self.mode} requires bits={bits} and group_size={group}, "
                f"not bits={self.bits} and group_size={self.group_size}"
            )
        if self.mode == "affine" and self.group_size == 16:
            raise ValueError("mode affine has group_size 32, 64 or 128, not 16")
        return self


class SourceConfig(Section):
    """One source of training rows.

    Attributes:
        path: Hub data set id, file, folder (``FOLDER:NAME`` of LLaMA-Factory's list of data sets),
            or ``task:NAME``: the prompts and answers of an evaluation task.
        weight: How often its rows come in an epoch: 2 is twice, 0.5 a seeded half.
        format: Row schema; None takes ``data.format``.
        split: Split of a hub data set, of a folder or of a task.
        skip: Leave out its first rows.
        limit: Use only so many rows after them; None takes all.
        system: System message for its rows that bring none; None takes ``data.system``.
    """

    path: str
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    format: Literal["auto", "alpaca", "chat", "completions", "text"] | None = None
    split: str = "train"
    skip: Count = 0
    limit: PositiveInt | None = None
    system: str | None = None

    @property
    def task(self) -> str | None:
        """The task that ``path`` names, None for files and data sets."""
        return self.path.removeprefix(TASK) if self.path.startswith(TASK) else None


class DataConfig(Section):
    """Rows, and how they become token ids with a supervised mask.

    Attributes:
        path: A source, or a list of weighted sources.
        format: Row schema; ``auto`` decides per row from its keys.
        template: ``auto`` (the model's chat template, else Alpaca for Alpaca rows, else plain),
            ``model``, ``alpaca``, ``plain``, ``chatml``, or the path of a Jinja file.
        mask_prompt: Supervise answers only; false supervises every token.
        learn: ``all`` answers of a conversation or only its ``last``; a turn with ``weight: 0`` or
            ``train: false`` is never learned, any other ``weight`` weighs its tokens in the loss.
        truncation: What to do with rows longer than ``train.max_length``; ``left`` cuts behind the
            BOS of a row that begins with one.
        split: Cut long rows into several of at most ``train.max_length`` tokens, each of which
            begins with the last tokens of the one before as context: ``auto`` does so with rows of
            format ``text`` unless ``truncation`` cuts or refuses them, true with all rows.
        split_overlap: Tokens of that context, or their share of ``train.max_length`` when below 1;
            at least the one that a row's first new token is predicted from.
        validation: Share of rows (below 1), number of rows, or the path of a validation file.
        seed: Decides which rows validate, and which ones a fractional weight takes; None is
            ``train.seed``. Set it to compare seeds of training on the same validation rows.
        system: System message for rows that bring none.
        columns: Renames, ours to the file's: ``{prompt: question, completion: answer}``.
        max_rows: Use only the first N rows of the mix, for trying.
    """

    path: str | list[SourceConfig] = "tatsu-lab/alpaca"
    format: Literal["auto", "alpaca", "chat", "completions", "text"] = "auto"
    template: str = "auto"
    mask_prompt: bool = True
    learn: Literal["all", "last"] = "all"
    truncation: Literal["error", "drop", "left", "right"] = "drop"
    split: Literal["auto"] | bool = "auto"
    split_overlap: Steps = 0.125
    validation: Steps | str = 0.02
    seed: Seed | None = None
    system: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    max_rows: PositiveInt | None = None

    @model_validator(mode="after")
    def _long_rows_are_split_or_cut(self) -> DataConfig:
        if self.split is True and self.truncation != "drop":
            raise ValueError(
                f"split=true leaves no row too long, and truncation={self.truncation} is set too: "
                "drop one of them"
            )
        return self

    def splits(self, kind: str) -> bool:
        """Return whether long rows of a format (such as ``text``) are cut into several."""
        return self.split is True or (
            self.split == "auto" and kind == "text" and self.truncation == "drop"
        )

    @property
    def sources(self) -> list[SourceConfig]:
        """``path`` as a list of sources, each with its format filled in."""
        sources = [SourceConfig(path=self.path)] if isinstance(self.path, str) else self.path
        return [s if s.format else s.model_copy(update={"format": self.format}) for s in sources]


class MemoryConfig(Section):
    """The memory guard.

    Attributes:
        budget: ``auto`` (what the device can hold), bytes, or a size such as ``16GB``.
    """

    budget: str | Bytes = "auto"


class ForgettingConfig(Section):
    """A general text that the run must not forget (arXiv 2403.15796).

    Attributes:
        path: Text file, JSON lines with ``text``, or ``task:NAME`` (the task's questions with their
            answers).
        rows: Documents used, the first ones; None all.
        every: Steps between measurements (one before the first step, one at the end).
        max_rise: Largest rise of bits per byte over the start: 0.02 is 2%.
        patience: Measurements in a row above it that stop the run.
    """

    path: str
    rows: PositiveInt | None = None
    every: PositiveInt = 100
    max_rise: Annotated[float, Field(ge=0, le=LARGEST)] = 0.02
    patience: PositiveInt = 1


class Recipe(Section):
    """A whole fine-tune: one model, one method, one mix of data.

    Attributes:
        model: Hub id or folder.
        revision: Commit or tag of a hub model.
        method: ``full``, ``lora``, ``qlora`` or ``dora``.
        distill: Teachers, for ``mlx-slim distill``; None for plain fine-tuning.
        rounds: How the model answers prompts while it is trained (``distill.method=on-policy``,
            ``reward``).
        preference: How answers are compared (DPO, ORPO, KTO, …); None learns each row's answer.
        reward: Rewards for answers that the model draws; None for plain fine-tuning.
        forgetting: A general text that is measured while the run trains; None measures none.
        report_answers: Validation rows that are answered before and after training, for the page
            of the run; 0 none.
        report_to: Trackers besides ``metrics.jsonl`` (each its own extra).
    """

    model: str
    revision: str | None = None
    method: Method = "lora"
    adapter: AdapterConfig = AdapterConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    forgetting: ForgettingConfig | None = None
    distill: DistillConfig | None = None
    rounds: RoundsConfig = RoundsConfig()
    preference: PreferenceConfig | None = None
    reward: RewardConfig | None = None
    memory: MemoryConfig = MemoryConfig()
    report_answers: Annotated[int, Field(ge=0, le=16)] = 3
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)

    @property
    def rows_seed(self) -> int:
        """The seed that splits and draws rows."""
        return self.train.seed if self.data.seed is None else self.data.seed

    @property
    def has_rounds(self) -> bool:
        """Whether the model writes some of the rows that it is trained on."""
        if self.reward is not None:
            return True
        return self.distill is not None and self.distill.sampled_fraction > 0

    @property
    def preference_rows(self) -> PreferenceRows | None:
        """What a row is where answers are compared; None where each row's answer is learned."""
        return None if self.preference is None else self.preference.rows

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the model are trained: all, or those of ``modules_to_save``."""
        return self.method == "full" or bool(self.adapter.modules_to_save)

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = []
        if self.quantize.qat and self.method == "qlora":
            problems.append(
                "quantize.qat rounds float weights and method=qlora has a quantized base: use "
                "full, lora or dora"
            )
        adapter = self.adapter
        of_adapters = ("adaptive", "on", "init_from", "modules_to_save")
        keys = [key for key in of_adapters if getattr(adapter, key)]
        if self.method == "full" and keys:
            key = keys[0]
            problems.append(f"adapter.{key} is set, and method=full trains no adapter: use lora")
        if adapter.modules_to_save and self.quantize.qat:
            problems.append(
                "quantize.qat rounds the weights that it trains, adapter.modules_to_save trains "
                "modules as they are: drop one of them"
            )
        if adapter.pooled and self.method not in ("lora", "qlora"):
            problems.append(
                f"adapter.pooled is a LoRA over a quantized base, and method={self.method}: use "
                "qlora"
            )
        if self.method == "dora" and self.adapter.adaptive:
            problems.append("adapter.adaptive changes ranks of LoRA: use method lora, not dora")
        if self.method == "dora" and self.adapter.on:
            problems.append(
                "adapter.on adds updates up, and a DoRA is not a sum: use method=lora, or fuse the "
                "adapters below into the base first"
            )
        if self.distill is not None and self.distill.method == "mutual":
            beside = {
                "quantize.qat": self.quantize.qat,
                "forgetting": self.forgetting,
                "adapter.adaptive": self.adapter.adaptive,
                "adapter.on": self.adapter.on,
                "adapter.init_from": self.adapter.init_from,
                "adapter.modules_to_save": self.adapter.modules_to_save,
                "train.neftune_alpha": self.train.neftune_alpha,
                "train.layer_decay": self.train.layer_decay < 1,
                "train.validate_task": self.train.validate_task,
            }
            problems += [
                f"{key} is for one student, and distill.method=mutual has two: drop one of them"
                for key, value in beside.items()
                if value
            ]
        if self.rounds != RoundsConfig() and not self.has_rounds:
            problems.append(
                "rounds says how the model answers prompts in training, and nothing here makes it: "
                "set distill.method=on-policy or a reward, or drop rounds"
            )
        if self.preference is not None:
            formats = {source.format for source in self.data.sources} - {"auto"}
            unfit = {
                "distill": self.distill is not None,
                "data.split=true": self.data.split is True,
                "data.mask_prompt=false": not self.data.mask_prompt,
                "data.learn=last": self.data.learn != "all",
                f"data.format={min(formats, default='auto', key=str)}": formats,
                "train.batching=packed": self.train.batching == "packed",
            }
            problems += [
                f"{key} is set, and preference compares whole answers to a prompt: drop one of them"
                for key, value in unfit.items()
                if value
            ]
        if self.reward is not None:
            problems += self._beside_rewards(self.reward)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _beside_rewards(self, reward: RewardConfig) -> list[str]:
        """Return what does not go with learning from rewards."""
        differs = {
            "quantize.qat=true": self.quantize.qat,
            f"train.neftune_alpha={self.train.neftune_alpha:g}": self.train.neftune_alpha,
            f"adapter.dropout={self.adapter.dropout:g}": self.adapter.dropout,
        }
        problems = [
            f"{key} changes the probabilities that answers were drawn with, which reward needs as "
            "they are: drop one of them"
            for key, value in differs.items()
            if value
        ]
        problems += [
            f"{name} and reward are both set: a run learns from one of them"
            for name in ("distill", "preference")
            if getattr(self, name) is not None
        ]
        if not self.data.mask_prompt:
            problems.append("data.mask_prompt=false leaves no question to answer: reward needs one")
        if reward.beta and self.trains_weights:
            problems.append(
                f"reward.beta={reward.beta:g} compares with the weights of the start, a second "
                "copy of what is trained in full: set reward.beta=0, or train an adapter alone"
            )
        return problems
