"""The small runs that ``kill_commands`` kills: recipes, a task, a matrix, a space, commands."""

from __future__ import annotations

from dataclasses import dataclass

TRAIN = {
    "method": "lora",
    "adapter": {"rank": 2},
    "quantize": {"group_size": 32},
    "data": {"path": "rows.jsonl", "validation": 4},
    "memory": {"budget": "4GB"},
    "train": {
        "steps": 4,
        "batch_tokens": 256,
        "max_length": 128,
        "save_every": 1,
        "validate_every": 2,
        "keep": 1,
        "learning_rate": 1e-3,
    },
}
TASK = {
    "about": "a toy",
    "kind": "multiple_choice",
    "data": {"path": "toy.jsonl"},
    "fields": {"question": "text", "choices": "texts", "answer": "integer"},
    "prompt": "{{ question }}",
    "choices": "{{ choices }}",
    "target": "{{ answer }}",
}
MATRIX = {
    "title": "toy",
    "recipe": {**TRAIN, "train": {**TRAIN["train"], "steps": 1}},
    "models": {"toy": {"source": "source"}},
    "methods": {
        "base": {"kind": "base"},
        "qlora": {"recipe": {"method": "qlora"}, "learning_rates": [1e-4, 1e-2]},
        "fused": {"kind": "fused", "of": "qlora"},
        "small": {"kind": "pruned", "prune": {"method": "l2", "ratio": 0.5}},
    },
    "tasks": [{"task": "./toytask.yaml", "limit": 4}],
    "sweep": {"steps": 1},
    "intruders": False,
    "forgetting": {"path": "text.txt"},
}

SPACE = {
    "adapter.rank": [1, 2],
    "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
}


@dataclass(frozen=True)
class Command:
    """A small run.

    Attributes:
        words: Of the command line, but for the output.
        resumes: Whether it knows ``--resume``.
        state: The file that stands in its output once ``--resume`` is needed.
        every: Of its moments, every so many is taken: of one that takes many seconds.
    """

    words: list[str]
    resumes: bool = True
    state: str = "recipe.json"
    every: int = 1


_PRUNE = ["prune", "source", "--ratio", "0.5", "--method", "l2", "--calibration", "text.txt"]
_SHORT = ["train.steps=2"]
_EARLY = ("learning_rate=1.0", "steps=12", "early_stopping=1", "validate_every=1", "save_every=3")
_TEACHER = "distill.teachers=[{model: other}]"
_RUNS = {
    "train lora": Command(["train", "small.yaml"]),
    "train qlora": Command(["train", "small.yaml", "method=qlora", *_SHORT]),
    "train full": Command(["train", "small.yaml", "method=full", "train.steps=2"]),
    "train stopped early": Command(["train", "small.yaml", *(f"train.{key}" for key in _EARLY)]),
    "train task rows": Command(
        [
            "train",
            "small.yaml",
            "data.path=[{path: 'task:./toytask.yaml', limit: 6}]",
            "data.validation=0",
        ]
    ),
    "distill logits": Command(["distill", "small.yaml", "train.steps=2", _TEACHER]),
    "distill sequence": Command(
        [
            "distill",
            "small.yaml",
            *_SHORT,
            "distill.teachers=[{model: speaker}]",
            "distill.method=sequence",
            "distill.ask.max_tokens=16",
            "data.max_rows=8",
        ]
    ),
    "distill on-policy": Command(
        [
            *("distill", "small.yaml", "train.steps=3", "train.batch_tokens=128", _TEACHER),
            *("distill.method=on-policy", "rounds.steps=2", "rounds.max_tokens=8"),
        ]
    ),
    "distill mutual": Command(
        ["distill", "small.yaml", *_SHORT, _TEACHER, "distill.method=mutual"]
    ),
    "prune recover": Command(
        [
            *_PRUNE,
            "--recover",
            "small.yaml",
            "--task",
            "./toytask.yaml",
            "--limit",
            "4",
            *_SHORT,
        ],
        state="request.json",
    ),
    "eval": Command(
        ["eval", "source", "--task", "./toytask.yaml", "--perplexity", "text.txt"],
        state="eval.json",
    ),
    "compare": Command(["compare", "toy.yaml", "--quiet"], state="matrix.json"),
    "slim": Command(
        [
            *("slim", "source", "--disk", "150KB", "--task", "./toytask.yaml", "--limit", "12"),
            *("--data", "rows.jsonl"),
        ],
        state="request.json",
        every=31,
    ),
    "sweep": Command(
        [
            *("sweep", "small.yaml", *_SHORT, "train.validate_every=1", "--space", "space.yaml"),
            *("--trials", "2", "--seeds", "1", "--quiet"),
        ],
        state="request.json",
    ),
}
_ONE_SHOT = {
    "convert": ["convert", "source", "--dtype", "float16"],
    "quantize": ["quantize", "source", "--group-size", "32", "--calibration", "text.txt"],
    "prune": _PRUNE,
    "fuse": ["fuse", "source", "--adapter", "tuned", "--calibration", "text.txt", "--force"],
    "export hf": ["export", "source", "--to", "hf"],
    "export gguf": ["export", "source", "--to", "gguf", "--calibration", "text.txt"],
    "export ollama": ["export", "tuned", "--to", "ollama", "--calibration", "text.txt"],
    "export peft": ["export", "tuned", "--to", "peft"],
    "import": ["import", "peft"],
    "analyze": ["analyze", "intruders", "source", "--adapter", "tuned/adapters", "--no-cache"],
}
ALL = {**_RUNS, **{name: Command(words, resumes=False) for name, words in _ONE_SHOT.items()}}
