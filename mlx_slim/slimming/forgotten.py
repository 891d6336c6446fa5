"""What a smaller model forgot: bits per byte of a general text that no part of the search used.

Invariant: the text is that of the data mirror (``wikitext``), never fetched, and only its first
part is read, the same for both models. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlx_slim.artifacts import read_records, write_text
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.results import STATE_FILE
from mlx_slim.evaluation.run import evaluate
from mlx_slim.evaluation.scoring.requests import max_length
from mlx_slim.events import Observer
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.reading import read_object

TEXT = "wikitext"
_MOST = 100_000  # characters
_WINDOW = 2048  # tokens: attention over a model's whole length would take most of the time


def general_text(data_dir: Path | None) -> Path | None:
    """Return the file of the general text; None where the mirror has none."""
    mirror = data_dir or os.environ.get("MLX_SLIM_DATA")
    if mirror is None:
        return None
    folder = Path(mirror) / TEXT
    files = (folder / f"{split}.jsonl" for split in ("test", "validation"))
    return next((file for file in files if file.is_file()), None)


def bits_per_byte(
    model: str, text: Path, folder: Path, observer: Observer, revision: str | None
) -> float:
    """Return a model's bits per byte of the first documents of ``text``."""
    excerpt = folder.parent / f"{TEXT}.jsonl"
    if not excerpt.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        rows, size = [], 0
        for row in read_records(text):
            document = row.get("text") or row.get("page")
            if not isinstance(document, str) or not document.strip():
                continue
            rows.append(json.dumps({"text": document[:_MOST]}) + "\n")
            size += len(document[:_MOST])
            if size >= _MOST:
                break
        write_text(excerpt, "".join(rows))
    if not (folder / "results.json").exists():
        longest = max_length(read_config(model, revision), load_tokenizer(model, revision=revision))
        window = min(_WINDOW, longest)
        options = EvalOptions(perplexity=excerpt, revision=revision, max_length=window)
        resume = (folder / STATE_FILE).exists()
        evaluate([model], [], folder, options, resume=resume, observer=observer)
    section = read_object(folder / "results.json", perplexity=dict)["perplexity"]
    return float(section["metrics"]["bits_per_byte"]["value"])
