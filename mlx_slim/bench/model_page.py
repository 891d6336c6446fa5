"""The page of what works for which model type, and what of it another run contradicts.

Invariant: the page is a function of the table alone; a reason stands once,
under a number. Try it: ``mlx-slim bench models -o docs/models.json``.
"""

from __future__ import annotations

import re

from mlx_slim.bench.models import COLUMNS, NOT_SMALL, OK, ModelTable, Table

_HEAD = """# Model types

What works for each model type of mlx-lm {mlx_lm} (MLX {mlx}): a random model of a small \
configuration goes through each command. ✓ works, – does not build from a small configuration; a \
number stands for the line that the command prints, [below](#reasons). {counts} `mlx-slim bench \
models -o docs/models.json` writes this page; `--type NAME` tries one type on your machine.

A model type is the `model_type` of `config.json`, or the class that mlx-lm reads it with (mistral \
is read with llama's, Phi-4 with phi3's).
"""
_MEANINGS = {
    "load": "the logits are those of mlx-lm's own loader.",
    "LoRA": "and **QLoRA**, **full**: four steps on a few rows, each row in a sequence of its own; "
    "gradients are finite and not zero, the loss falls, and what was saved computes what was "
    "trained.",
    "packed": "rows packed into one sequence have the loss and the gradient of separate ones.",
    "split head": "the model splits into body and head, so that full logits never exist.",
    "eval": "scores are those of a plain pass over each request; **shared prefixes**: each prefix "
    "was computed once for that.",
    "quantize": "4 bits, saved and loaded: the logits are those of the dequantized weights.",
    "prune depth": "and **prune width**: a quarter of the layers, half of the groups.",
    "fuse": "the fused model has the logits of base and adapter.",
    "GGUF out": "written in F16 and read back; **GGUF in**: that file converted has the logits of "
    "the model.",
}


def page(table: ModelTable) -> str:
    """Return the page of a table."""
    models, columns = table.models, table.columns
    numbers: dict[str, int] = {}
    rows = []
    for name, row in models.items():
        cells = [_symbol(name, row[column], numbers) for column in columns]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    built = [row for row in models.values() if not _not_small(row[columns[0]])]
    counts = " · ".join(f"{column} {sum(row[column] == OK for row in built)}" for column in columns)
    sections = [
        _HEAD.format(
            mlx_lm=table.mlx_lm,
            mlx=table.mlx,
            counts=f"{len(built)} of {len(models)} types build small; of these: {counts}.",
        ),
        "\n".join(f"- **{name}**: {_MEANINGS[name]}" for name in COLUMNS if name in _MEANINGS),
        f"| model type | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n" + "\n".join(rows),
        "## Reasons",
        "\n".join(f"{number}. {_escaped(reason)}" for reason, number in numbers.items()),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _not_small(cell: str) -> bool:
    return cell.startswith(NOT_SMALL)


def _symbol(name: str, cell: str, numbers: dict[str, int]) -> str:
    if cell == OK:
        return "✓"
    if _not_small(cell):
        return "–"
    reason = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", "TYPE", cell)
    return str(numbers.setdefault(reason, len(numbers) + 1))


def _escaped(text: str) -> str:
    """Return plain text such that Markdown shows it as it stands."""
    return re.sub(r"([\[\]<>*_`|])", r"\\\1", text)


def disagreements(recorded: Table, table: Table) -> list[str]:
    """Return a line for each cell of ``table`` that ``recorded`` has otherwise.

    Numbers in reasons are measured (a gap of logits) and do not count.
    """
    return [
        f"{name}, {column}: {cell!r}, recorded: {recorded.get(name, {}).get(column)!r}"
        for name, row in table.items()
        for column, cell in row.items()
        if _plain(cell) != _plain(recorded.get(name, {}).get(column, ""))
    ]


def _plain(cell: str) -> str:
    return re.sub(r"\d[\d.,e+-]*", "#", cell)
