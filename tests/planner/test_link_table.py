"""The table of the guide to several machines: made from the recipes, and no other."""

from __future__ import annotations

from pathlib import Path

from mlx_slim.planner.link_table import markdown

GUIDE = Path(__file__).parents[2] / "docs" / "several-machines.md"


def test_the_guide_has_the_table_of_today() -> None:
    assert markdown() in GUIDE.read_text(encoding="utf-8"), "mlx-slim plan --machines 2 --table"
