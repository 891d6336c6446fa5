"""The picture of ``analyze intruders``: where the new directions are, as SVG.

Invariant: the same numbers give the same bytes: no date, fixed ids. Try it:
``mlx-slim analyze intruders BASE --adapter DIR -o OUT`` and open ``OUT/intruders.svg``.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from mlx_slim.analyze.intruders import Intruders


def plot(intruders: Intruders) -> str:
    """Return an SVG: the cosine of each leading direction, and intruders by block and layer."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mlx-slim", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
        _cosines(left, intruders)
        _by_layer(figure, right, intruders)
        total = intruders.overall()
        figure.suptitle(
            f"{total['intruders']} intruder dimensions in {total['matrices']} matrices "
            f"(k = {intruders.k}, ε = {intruders.epsilon:g})"
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "mlx-slim"})
    return buffer.getvalue()


def _cosines(axes: Any, intruders: Intruders) -> None:
    for matrix in intruders.matrices:
        cosine = np.array(matrix.cosine)
        rank = np.arange(1, len(cosine) + 1)
        new = cosine < intruders.epsilon
        axes.plot(rank[~new], cosine[~new], ".", color="#8899aa", alpha=0.4, markersize=4)
        axes.plot(rank[new], cosine[new], ".", color="#c0392b", markersize=5)
    axes.axhline(intruders.epsilon, color="#c0392b", linewidth=0.8, linestyle="--")
    axes.axvline(intruders.k + 0.5, color="#444444", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="leading direction of the tuned weight",
        ylabel="largest |cosine| with a direction of the base",
        ylim=(0, 1.03),
    )


def _by_layer(figure: Any, axes: Any, intruders: Intruders) -> None:
    blocks: dict[str, dict[int, int]] = {}
    for matrix in intruders.matrices:
        number = re.search(r"\.(\d+)\.", matrix.path)
        name = matrix.path.rsplit(".", 1)[-1]
        blocks.setdefault(name, {})[int(number[1]) if number else 0] = matrix.intruders
    last = max(max(counts) for counts in blocks.values())
    grid = np.full((len(blocks), last + 1), np.nan)
    for row, counts in enumerate(blocks.values()):
        for block, count in counts.items():
            grid[row, block] = count
    top = max(1.0, float(np.nanmax(grid)))
    image = axes.imshow(grid, aspect="auto", cmap="Reds", vmin=0, vmax=top, interpolation="nearest")
    axes.set_yticks(range(len(blocks)), list(blocks))
    axes.set(xlabel="block", title="intruders by layer")
    figure.colorbar(image, ax=axes, label="count")
