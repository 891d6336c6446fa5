"""What papers report of smaller models: beside ours on the page, with what differs.

Invariant: a figure is a published one, or the ratio of two of them. Try it: ``mlx-slim report DIR``
on the folder of a finished search.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A smaller model of a paper.

    Attributes:
        name: Model and method.
        size: What remains: parameters, or bits.
        first: Score of the original, percent.
        second: Of the smaller model, percent.
        tasks: What was scored.
        source: Where it stands.
    """

    name: str
    size: str
    first: float
    second: float
    tasks: str
    source: str

    @property
    def retained(self) -> float:
        """``second / first``."""
        return self.second / self.first


PUBLISHED = (
    Published(
        "LLaMA-7B, widths, tuned on Alpaca",
        "80% of the parameters",
        63.25,
        59.23,
        "mean of seven, zero-shot",
        "LLM-Pruner, arXiv 2305.11627",
    ),
    Published(
        "Qwen3-8B, 36 to 28 layers, 100 steps of distillation",
        "about 80% of the parameters",
        76.53,
        61.66,
        "HellaSwag",
        "NVIDIA ModelOpt",
    ),
    Published(
        "Llama-2-7B, 3 bits, block-wise training",
        "3-bit weights, groups of 128",
        64.86,
        64.02,
        "mean of five, zero-shot",
        "EfficientQAT, arXiv 2407.11062",
    ),
    Published(
        "Llama-2-7B, 2 bits, block-wise training",
        "2-bit weights, groups of 64",
        64.86,
        60.14,
        "mean of five, zero-shot",
        "EfficientQAT, arXiv 2407.11062",
    ),
)
