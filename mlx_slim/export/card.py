"""The model card: what an artifact is, where it comes from and what was measured.

Invariant: numbers are read only from the records beside the artifact (``run.json``,
``fuse.json``, results of ``mlx-slim eval``); no path of this machine is named. Try
it: ``mlx-slim export runs/mine --to peft -o peft`` writes one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mlx_slim.artifacts import is_hub_id, public_name, write_text
from mlx_slim.export.fuse import RECORD
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.units import human_bytes

CARD = "README.md"


@dataclass
class Card:
    """What goes into a card.

    Attributes:
        title: Heading.
        base: Hub id or name of the model it comes from.
        library: ``peft``, ``transformers``, ``mlx`` or ``gguf``: the hub's tag.
        what: One sentence.
        metrics: Rows of (what, value).
        provenance: Rows of (what, value).
        usage: Commands, one a line.
    """

    title: str
    base: str
    library: str
    what: str
    metrics: list[tuple[str, str]] = field(default_factory=list)
    provenance: list[tuple[str, str]] = field(default_factory=list)
    usage: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the card as Markdown with the hub's front matter."""
        tags = {"library_name": self.library, "tags": ["mlx-slim"]}
        if is_hub_id(self.base):
            tags["base_model"] = self.base
        lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in tags.items()), "---", ""]
        lines += [f"# {self.title}", "", self.what, ""]
        if self.usage:
            lines += ["```", *self.usage, "```", ""]
        for heading, rows in (("Measured", self.metrics), ("Provenance", self.provenance)):
            if rows:
                lines += [f"## {heading}", "", "| | |", "|---|---|"]
                lines += [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows]
                lines.append("")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write ``README.md``."""
        write_text(folder / CARD, self.text())


def records_of(folder: Path) -> list[tuple[str, JsonObject]]:
    """Return (file name, content) of the records in ``folder`` or, of a run, above it."""
    records = []
    for name in ("run.json", RECORD, "results.json"):
        for place in (folder, folder.parent):
            if (place / name).is_file() and (place == folder or name == "run.json"):
                records.append((name, read_object(place / name)))
                break
    return records


def describe(folder: Path, card: Card) -> None:
    """Add to ``card`` what the records beside ``folder`` say."""
    for name, record in records_of(folder):
        if name == "run.json":
            _run(record, card)
        elif name == RECORD:
            _fuse(record, card)
        else:
            _results(record, card)


def _run(record: JsonObject, card: Card) -> None:
    recipe, done = record.get("recipe", {}), record.get("result", {}).get("done", {})
    train, data = recipe.get("train", {}), recipe.get("data", {})
    result, compared = record.get("result", {}), recipe.get("preference")
    if done.get("best_validation") is not None:
        card.metrics.append(
            (
                "validation loss",
                f"{done['best_validation']:.4f} {'a comparison' if compared else 'nats a token'}"
                + ("" if done.get("best_task") is not None else f", step {done['best_step']}"),
            )
        )
    if done:
        card.metrics += [
            ("optimizer steps", f"{done['step']:,}"),
            ("training tokens", f"{done['tokens']:,}"),
            ("peak memory of training", human_bytes(done["peak_memory_bytes"])),
        ]
    if result.get("trainable"):
        trained = f"{result['trainable']:,} of {result['total']:,} parameters"
        card.provenance.append(("trained", trained))
    path = data.get("path")
    sources = path if isinstance(path, list) else [{"path": path}]
    names = [public_name(entry["path"]) for entry in sources if entry.get("path")]
    card.provenance += [("method", str(recipe.get("method"))), ("data", ", ".join(names))]
    if recipe.get("method") != "full":
        adapter = recipe.get("adapter", {})
        settings = {key: value for key, value in adapter.items() if value is not None}
        card.provenance.append(("adapter", json.dumps(settings)))
    keys = ("optimizer", "learning_rate", "schedule", "epochs", "steps", "batch_tokens", "seed")
    settings = {key: train[key] for key in keys if train.get(key) is not None}
    card.provenance.append(("training", json.dumps(settings)))
    _versions(record, card)


def _fuse(record: JsonObject, card: Card) -> None:
    effect = record["effect"]
    card.metrics += [
        ("adapter's effect retained by the fuse", f"{effect['kept']:.1%}"),
        ("KL from base + adapter", f"{effect['kl']:.2g} nats a token (the base: "
         f"{effect['kl_base']:.2g}), on {effect['tokens']:,} tokens of {record['text']}"),
        ("same top-1 token as base + adapter", f"{effect['top1']:.1%}"),
    ]  # fmt: skip
    if record["lost"]:
        card.metrics.append(("warning", f"the tune is lost: {record['lost']}"))
    card.provenance += [
        ("fused", f"{record['mode']}, {record['layers']} layers, {record['dtype']}"),
        ("fused base", record["base"]),
        ("fused adapter", json.dumps(record["adapter"].get("lora_parameters", {}))),
    ]
    _versions(record, card)


def _results(record: JsonObject, card: Card) -> None:
    for task, scores in record.get("tasks", {}).items():
        for metric, value in scores.get("metrics", {}).items():
            error = f" ± {value['stderr']:.4f}" if value.get("stderr") is not None else ""
            shots = scores.get("num_fewshot", 0)
            text = f"{value['value']:.4f}{error} ({scores.get('n')} questions, {shots}-shot)"
            card.metrics.append((f"{task}, {metric}", text))


def _versions(record: JsonObject, card: Card) -> None:
    versions = record.get("provenance", {}).get("versions", {})
    if versions and not any(name == "versions" for name, _ in card.provenance):
        card.provenance.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
