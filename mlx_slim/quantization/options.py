"""How to quantize: the values that ``mlx-slim quantize`` takes.

Invariant: the only home of these defaults; nothing heavy is imported. Try it:
``mlx-slim quantize --help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.config.values import MOST, Bytes, Count, PositiveInt


@dataclass(frozen=True)
class CompressOptions:
    """How to quantize and how to judge it.

    Attributes:
        quantize: Bits, group size and mode.
        method: ``rtn`` (rounding to nearest) or a calibrated method of ``quantization.methods``.
        embed_bits: Bits of embedding and head (``methods.embed_bits``); None is the method's.
        recipe: A mixed recipe of mlx-lm, with ``rtn`` only.
        calibration: Text or data set to calibrate and judge on; None is the Alpaca mirror.
        samples: Calibration rows, at most.
        length: Tokens of a calibration row.
        fidelity_samples: Validation rows that the result is compared on; 0: no comparison.
        revision: Commit or tag of a hub model.
        target_bytes: Most bytes that the files of weights may take: the bits of each layer are
            chosen.
        bits_per_weight: The same as bits of all parameters for each weight.
        sensitivity: How a layer's loss in fewer bits is told; None is measured.
        sensitivity_samples: Calibration rows that it is measured on, at most.
        compensate: Rank of adapters that make up for the error; None makes none.
    """

    quantize: QuantizeConfig
    method: str = field(
        default="rtn", metadata=option("rtn, awq, gptq, dwq, dynamic or blockwise.")
    )
    embed_bits: Literal[2, 3, 4, 5, 6, 8] | None = field(
        default=None,
        metadata=option(
            "Bits of embedding and head; default --bits, or more: blockwise 6, gptq 6 and awq 4 "
            "for the embedding."
        ),
    )
    recipe: str | None = field(
        default=None,
        metadata=option(
            "Mixed precision of method rtn: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.",
        ),
    )
    calibration: str | None = field(
        default=None, metadata=option("Text file or data set; default Alpaca.")
    )
    samples: PositiveInt = field(
        default=32,
        metadata=option("Rows that all methods but rtn look at.", flag="--calibration-samples"),
    )
    length: Annotated[int, Interval(ge=8, le=MOST)] = field(
        default=256, metadata=option("Tokens of a row.", flag="--calibration-length")
    )
    fidelity_samples: Count = field(
        default=4,
        metadata=option(
            "Validation rows on which the result is compared with its source; 0: none."
        ),
    )
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))
    target_bytes: Bytes | None = None
    bits_per_weight: Annotated[float, Interval(gt=0, le=32)] | None = field(
        default=None,
        metadata=option("Choose the bits of each layer: at most N for a weight.", metavar="N"),
    )
    sensitivity: Literal["rules", "measured"] | None = field(
        default=None,
        metadata=option(
            "Of the layers, for such a size: measured one by one [measured], or rules."
        ),
    )
    sensitivity_samples: PositiveInt = field(
        default=2, metadata=option("Calibration rows that it is measured on.")
    )

    compensate: PositiveInt | None = field(
        default=None,
        metadata=option(
            "Make an adapter that corrects the error, without training (EoRA).", metavar="RANK"
        ),
    )

    @property
    def sized(self) -> bool:
        """Whether the result has a size to meet, and each layer bits of its own."""
        return self.target_bytes is not None or self.bits_per_weight is not None

    @property
    def measures(self) -> bool:
        """Whether the loss of each layer is measured."""
        return self.sized and self.sensitivity != "rules"
