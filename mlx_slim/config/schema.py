"""The recipe: every key, its one default and its range.

Invariant: a default or a bound stands here (for ``adapter`` and ``distill``, in the file of that
name) and nowhere else; unknown keys are errors. The sections mirror the YAML (``adapter``,
``quantize``, ``data``, ``train``, ``distill``, ``memory``), and each is the only configuration
object of the component that reads it. Try it:
``mlx-slim train smollm2-lora train.steps=3 --dry-run -o /tmp/run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.adapter import AdapterConfig
from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.section import (
    LARGEST,
    MOST,
    Bytes,
    Count,
    Factor,
    Fraction,
    PositiveInt,
    Rate,
    Section,
    Seed,
    Steps,
)

Method = Literal["full", "lora", "qlora", "dora"]

DEFAULT_FALLBACK_RATE = 3.0e-4  # of AdamW beside Muon (github.com/KellerJordan/Muon)
TASK = "task:"  # how a source names an evaluation task


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


class TrainConfig(Section):
    """The loop.

    Attributes:
        epochs: Passes over the rows (a fraction is allowed); ``steps`` wins when given.
        steps: Optimizer steps.
        batch_tokens: Computed tokens of one micro-batch (padding counted), the memory knob.
        max_length: Longest row, tokens.
        batching: ``grouped`` (rows of like length, padded right), ``packed`` (rows share a
            sequence, isolated), or ``auto``: whichever costs less.
        prefix_sharing: Compute what rows of a micro-batch begin with once (a template, a system
            message, examples): ``auto`` where that takes a tenth less time and the adapters have
            no dropout, ``true`` also where the gain is small. The loss is the same; dropout draws
            one mask for the shared part. Off in a compiled step (``compile``) and for models whose
            attention cannot share.
        accumulate: Micro-batches per optimizer step and rank.
        learning_rate: Peak rate.
        layer_decay: Ratio of the learning rates of a block and the one above it; the last block
            and the head have the full rate, the embedding the least (``training/layer_rates.py``).
        fallback_learning_rate: With ``muon``, the peak rate of AdamW for what Muon does not take
            (embeddings, head, norms, biases); None is 3e-4, as in Muon's reference code.
        schedule: ``constant``, ``linear``, ``cosine`` or ``wsd`` (warm-up, stable, decay).
        warmup: Warm-up steps, or their share when below 1.
        decay: Share of the steps that ``wsd`` decays in.
        min_lr_ratio: Final rate / peak rate.
        optimizer: From mlx; Adam and AdamW are bias-corrected.
        weight_decay: Decoupled where the optimizer has it. Matrices decay, embeddings too; norms,
            biases and other vectors (DoRA's magnitudes, AdaLoRA's λ) do not.
        decay_all: Whether those decay as well.
        clip: Largest gradient L2 norm; 0 turns clipping off.
        grad_checkpoint: Recompute each block in the backward pass.
        compile: Fuse the step with ``mx.compile``; ``auto`` does on a GPU. Micro-batches are then
            padded to at most 24 shapes and hold other rows, so an epoch may have a few steps more
            or less than without.
        dtype: ``auto`` is bfloat16 on a GPU, float32 on a CPU.
        seed: Of everything random.
        log_every: Steps between reports of a step.
        validate_every: Steps between validations (one more at the end).
        validate_task: Evaluation task, some questions of which are answered at each validation:
            early stopping and the step that is kept follow its first metric, not the loss. Its test
            questions, and those that are trained on, are left out.
        validate_split: Split of that task, or file with rows of it; None takes ``validation``,
            ``dev`` or ``train``, whichever is not scored and there.
        validate_limit: Questions of that task, at most.
        save_every: Steps between checkpoints (one more at the end).
        keep: Newest checkpoints kept; the best one is kept besides.
        early_stopping: Stop after this many validations without a new best; None never.
        neftune_alpha: Noise on the input embeddings in training, uniform in ±alpha/√(L·d) for a row
            of L tokens and the width d (NEFTune, arXiv 2310.05914, which uses 5 to 15); 0 none.
        loss_chunk: Supervised positions whose logits exist at one time; None chooses.
        duty: Fraction of the time that the run computes; below 1 it pauses after each step, for
            other programs and for a cooler machine. Results are the same; tokens/s count computing.
        keep_awake: Prevent the machine's sleep while the run lasts (caffeinate, systemd-inhibit).
    """

    epochs: Factor = 3
    steps: PositiveInt | None = None
    batch_tokens: Annotated[int, Field(ge=8, le=MOST)] = 4096
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 512
    batching: Literal["auto", "grouped", "packed"] = "auto"
    prefix_sharing: Literal["auto"] | bool = "auto"
    accumulate: PositiveInt = 1
    learning_rate: Rate = 2.0e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    fallback_learning_rate: Rate | None = None
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: Steps = 0.03
    decay: Fraction = 0.2
    min_lr_ratio: Fraction = 0.0
    optimizer: Literal["adamw", "adam", "adafactor", "lion", "muon", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    decay_all: bool = False
    clip: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    grad_checkpoint: bool = False
    compile: Literal["auto"] | bool = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: Seed = 0
    log_every: PositiveInt = 1
    validate_every: PositiveInt = 200
    validate_task: str | None = None
    validate_split: str | None = None
    validate_limit: PositiveInt = 100
    save_every: PositiveInt = 200
    keep: PositiveInt = 3
    early_stopping: PositiveInt | None = None
    neftune_alpha: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    loss_chunk: PositiveInt | None = None
    duty: Annotated[float, Field(ge=0.05, le=1)] = 1.0
    keep_awake: bool = True

    @model_validator(mode="after")
    def _what_is_set_has_an_effect(self) -> TrainConfig:
        if self.optimizer == "adam" and self.weight_decay > 0:
            raise ValueError(
                f"optimizer=adam ignores weight_decay={self.weight_decay}: use adamw, or 0"
            )
        if self.validate_split is not None and self.validate_task is None:
            raise ValueError(
                f"validate_split={self.validate_split} is of validate_task, which is not set: name "
                "the task"
            )
        if self.fallback_learning_rate is not None and self.optimizer != "muon":
            raise ValueError(
                f"fallback_learning_rate={self.fallback_learning_rate} is for optimizer=muon, not "
                f"{self.optimizer}: drop it"
            )
        return self

    @property
    def resolved_fallback_rate(self) -> float:
        """The peak rate of what Muon does not take."""
        return self.fallback_learning_rate or DEFAULT_FALLBACK_RATE

    @model_validator(mode="after")
    def _a_row_fits_a_batch(self) -> TrainConfig:
        if self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is below max_length={self.max_length}: "
                "a full row must fit a batch"
            )
        return self


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
    memory: MemoryConfig = MemoryConfig()
    report_answers: Annotated[int, Field(ge=0, le=16)] = 3
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)

    @property
    def rows_seed(self) -> int:
        """The seed that splits and draws rows."""
        return self.train.seed if self.data.seed is None else self.data.seed

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
        if problems:
            raise ValueError("; ".join(problems))
        return self
