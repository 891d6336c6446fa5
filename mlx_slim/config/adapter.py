"""The ``adapter`` section of a recipe.

Invariant: as in ``schema.py``, whose part this is: a default or a bound stands here alone. Try it:
``mlx-slim train smollm2-lora adapter.rank=16 --dry-run -o /tmp/run``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlx_slim.config.section import Section
from mlx_slim.config.values import LARGEST, Count, Factor, PositiveInt, Steps

DEFAULT_ALPHA = 16.0


class AdaptiveConfig(Section):
    """Ranks that move to the layers that need them: AdaLoRA (arXiv 2303.10512).

    A run starts with ``adapter.rank`` everywhere and ends with ``target_rank`` on average.

    Attributes:
        target_rank: Mean rank of a layer at the end.
        warmup: Steps, or their share when below 1, before the first triplet goes.
        final: Steps, or their share when below 1, at the end with ranks that no longer change.
        interval: Steps between two cuts.
        beta1: Smoothing of a triplet's sensitivity |w·g|.
        beta2: Smoothing of that sensitivity's uncertainty.
        orthogonality: γ of the penalty γ(‖PᵀP−I‖² + ‖QQᵀ−I‖²).
    """

    target_rank: PositiveInt
    warmup: Steps = 0.1
    final: Steps = 0.3
    interval: PositiveInt = 10
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.85
    orthogonality: Annotated[float, Field(ge=0, le=LARGEST)] = 0.1


class AdapterConfig(Section):
    """Of ``lora``, ``qlora`` and ``dora`` (arXiv 2106.09685, 2305.14314, 2402.09353).

    Attributes:
        rank: r, columns of A and rows of B.
        alpha: ΔW = alpha/r · BA (alpha/√r with rslora, arXiv 2312.03732).
        scale: The factor itself instead of ``alpha``: ΔW = scale · BA, as mlx-lm stores it.
        dropout: Share of the adapter's inputs dropped in training.
        targets: ``all-linear`` (of a mixture the experts too, but no router that has fewer outputs
            than the rank), or module names (``q_proj``, ``self_attn.q_proj``), or ``re:PATTERN``
            matched against the whole path inside a block.
        modules_to_save: Modules that are trained in full beside the adapter, by name or path, as in
            PEFT: ``embed_tokens``, ``lm_head``, ``norm``. One that is quantized is made dense.
        layers: ``all``, the last N blocks, or a list of block indices.
        scaling: ``standard`` (alpha/r) or ``rslora`` (alpha/√r).
        init: ``standard`` (A uniform, B zero) or ``pissa`` (top-r SVD of W, arXiv 2404.02948).
        lora_plus_ratio: lr(B) / lr(A) (LoRA+, arXiv 2402.12354).
        pooled: Sum the inputs of each quantization group before A, over a base quantized in mode
            affine, so that ``fuse`` folds the adapter into its biases without loss (QA-LoRA,
            arXiv 2309.14717).
        adaptive: Ranks that change during training (AdaLoRA); None leaves them.
        on: Adapter folders, each ``DIR`` or ``DIR=WEIGHT``, that lie frozen under this one.
        init_from: Folder of an adapter (ours, mlx-lm's or PEFT's) of the same rank, scale and
            layers, whose factors are trained on; None starts as ``init`` says.
    """

    rank: PositiveInt = 8
    alpha: Factor | None = None
    scale: Factor | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: str | list[str] = "all-linear"
    modules_to_save: list[str] = Field(default_factory=list)
    layers: Literal["all"] | PositiveInt | list[Count] = "all"
    scaling: Literal["standard", "rslora"] = "standard"
    init: Literal["standard", "pissa"] = "standard"
    lora_plus_ratio: Annotated[float, Field(ge=1.0, le=LARGEST)] = 1.0
    pooled: bool = False
    adaptive: AdaptiveConfig | None = None
    on: list[str] = Field(default_factory=list)
    init_from: str | None = None

    @model_validator(mode="after")
    def _keys_fit(self) -> AdapterConfig:
        if self.init_from is not None and (self.init != "standard" or self.adaptive):
            other = f"init={self.init}" if self.init != "standard" else "adaptive"
            raise ValueError(
                f"init_from={self.init_from} and {other} both set the starting weights: drop one"
            )
        if self.pooled and (self.init != "standard" or self.adaptive or self.on or self.init_from):
            other = next(
                key for key in ("adaptive", "on", "init_from", "init") if getattr(self, key)
            )
            raise ValueError(
                f"pooled=true trains one LoRA whose A starts at random, and {other} is set too: "
                "drop one of them"
            )
        if self.modules_to_save and (self.pooled or self.on):
            other, why = "on", "adds updates up"
            if self.pooled:
                other, why = "pooled", "folds into the biases of a quantized base"
            raise ValueError(
                f"modules_to_save trains whole modules, and {other} {why}: drop one of them"
            )
        if self.alpha is not None and self.scale is not None:
            raise ValueError(
                f"alpha={self.alpha} and scale={self.scale} are both set: give one, "
                "the other follows from the rank"
            )
        if self.adaptive is None:
            return self
        if self.init != "standard":
            raise ValueError(
                f"adaptive starts from orthonormal factors, not from init={self.init}: drop one"
            )
        if self.adaptive.target_rank > self.rank:
            raise ValueError(
                f"adaptive.target_rank={self.adaptive.target_rank} is above rank={self.rank}, "
                "from which ranks are only lowered"
            )
        return self

    @property
    def _per_alpha(self) -> float:
        return 1.0 / (self.rank**0.5 if self.scaling == "rslora" else self.rank)

    @property
    def resolved_scale(self) -> float:
        """The factor s in ΔW = s · BA."""
        if self.scale is not None:
            return self.scale
        return (self.alpha if self.alpha is not None else DEFAULT_ALPHA) * self._per_alpha

    @property
    def resolved_alpha(self) -> float:
        """The alpha that gives ``resolved_scale`` at this rank and scaling."""
        return self.resolved_scale / self._per_alpha
