"""Pages that stand alone: one style, and templates that escape what they show.

Invariant: a page needs no network; every text that a model, a data set or a user wrote is escaped.
Try it: ``mlx-slim report RUN``.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mlx_slim.units import human_bytes, human_seconds

_STYLE = Path(__file__).with_name("templates") / "page.css"


def environment(templates: Path) -> Environment:
    """Return the environment of the templates in a folder; ``css`` is the style of every page."""
    created = Environment(
        loader=FileSystemLoader(templates),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    created.filters.update(
        bytes=lambda size: human_bytes(size).replace(" ", "\u00a0"),
        duration=human_seconds,
        rate=lambda value: f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e"),
        count=lambda value: f"{value:,}",
    )
    created.globals["css"] = Markup(_STYLE.read_text(encoding="utf-8"))
    return created
