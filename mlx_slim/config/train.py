"""The recipe's ``train`` section: batches, optimizer, schedule, validation and checkpoints.

Invariant: a default or a bound of the training loop stands here and nowhere else. Try it:
``mlx-slim train smollm2-lora train.steps=3 --dry-run -o /tmp/run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.values import LARGEST, MOST, Factor, Fraction, PositiveInt, Rate, Seed, Steps

DEFAULT_FALLBACK_RATE = 3.0e-4  # of AdamW beside Muon (github.com/KellerJordan/Muon)


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
        accumulate: Micro-batches per optimizer step, on any number of ranks.
        scale_with_ranks: Whether a step has ``accumulate`` micro-batches for each rank: another run
            on another number of them. Learning rate, warm-up and ``steps`` stay what they are.
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
        shard: What a rank holds of the model where there are several: ``full`` is a slice of every
            tensor, gathered a block at a time (weights, gradients and optimizer state; blocks are
            computed again in the backward pass), ``none`` all of it; ``auto`` shards where one
            rank's predicted memory does not fit its budget.
        keep_awake: Prevent the machine's sleep while the run lasts (caffeinate, systemd-inhibit).
    """

    epochs: Factor = 3
    steps: PositiveInt | None = None
    batch_tokens: Annotated[int, Field(ge=8, le=MOST)] = 4096
    max_length: Annotated[int, Field(ge=8, le=MOST)] = 512
    batching: Literal["auto", "grouped", "packed"] = "auto"
    prefix_sharing: Literal["auto"] | bool = "auto"
    accumulate: PositiveInt = 1
    scale_with_ranks: bool = False
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
    shard: Literal["auto", "none", "full"] = "auto"
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
