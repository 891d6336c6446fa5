"""A recipe in the making: values that follow from rows, width and method, each with its reason.

Invariant: what the user set on the command line is never replaced. The values are those of
``hyperparameters.py``; what memory and time ask for comes from ``choose.py``. Try it:
``mlx-slim train MODEL --data rows.jsonl --dry-run``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_slim.config.layers import COMMAND_LINE
from mlx_slim.config.load import Resolved, from_layers
from mlx_slim.config.recipe_file import value_text
from mlx_slim.config.schema import Recipe
from mlx_slim.planner import hyperparameters
from mlx_slim.planner.choice_inputs import ChoiceInputs, nested
from mlx_slim.planner.suggest import Overrides
from mlx_slim.planner.work import FILLED


@dataclass(frozen=True)
class Choice:
    """A key of the recipe, its value, and why it has this one."""

    key: str
    value: Any
    reason: str

    @property
    def line(self) -> str:
        """``key=value`` and the reason, aligned."""
        return f"{f'{self.key}={value_text(self.value)}':<33} {self.reason}"


@dataclass
class Draft:
    """A recipe in the making."""

    task: ChoiceInputs
    choices: dict[str, Choice] = field(default_factory=dict)

    def pick(self, key: str, value: Any, reason: str) -> Any:
        """Set ``key``, unless the user did; return its value."""
        if self.task.is_fixed(key):
            value, reason = self.task.base.recipe, COMMAND_LINE
            for name in key.split("."):
                value = getattr(value, name)
        self.choices[key] = Choice(key, value, reason)
        return value

    def resolved(self) -> Resolved:
        """Return the recipe so far."""
        task = self.task
        layers = [nested("model", task.base.recipe.model, "the model named")]
        layers += [nested(one.key, one.value, one.reason) for one in self.choices.values()]
        return from_layers(layers, task.base.name, task.overrides)


def start(task: ChoiceInputs, length: int, most_epochs: float | None, why: str) -> Draft:
    """Return what follows from the rows and the width alone."""
    draft = Draft(task)
    lengths = task.fitted(length)
    tokens = int(lengths.sum())
    setting, _, reason = task.validation
    draft.pick("data.path", task.base.recipe.data.path, task.data)
    draft.pick("data.validation", setting, reason)
    longest = f"the longest row has {int(task.lengths.max()):,} tokens"
    of = f"of {len(task.lengths):,} rows"
    longer = task.lengths > length
    if cut := int((longer & task.splits).sum()):
        longest += f"; {cut:,} {of} are longer texts, and cut into several"
    if dropped := int((longer & ~task.splits).sum()):
        longest += f"; {dropped:,} {of} are longer than fits, and dropped"
    draft.pick("train.max_length", length, longest)
    epochs, reason = hyperparameters.epochs(tokens, len(lengths))
    if most_epochs is not None and most_epochs < epochs:
        epochs, reason = most_epochs, why
        if epochs < 1:
            used = round(epochs * len(lengths))
            reason += f": {used:,} rows are trained on once, {len(lengths) - used:,} are not"
    if not task.is_fixed("train.steps"):
        epochs = draft.pick("train.epochs", epochs, reason)
    size = hyperparameters.batch_size(int(tokens * epochs), tokens / len(lengths), length)
    reason = "a step has 1/80 of all tokens, at least 4 rows, at most 16,384 tokens"
    draft.pick("train.batch_tokens", size.batch_tokens, reason)
    draft.pick("train.accumulate", size.accumulate, "micro-batches of a step")
    supervised, one = int(task.supervised.sum()), task.parameters_per_rank
    rank = hyperparameters.rank(supervised, one)
    bits = hyperparameters.capacity(rank, one)
    reason = f"it can store {bits:,} bits, {supervised:,} learned tokens bring about one each"
    draft.pick("adapter.rank", rank, reason)
    if not task.is_fixed("adapter.scale"):
        reason = "LoRA Without Regret, with the learning rate"
        draft.pick("adapter.alpha", hyperparameters.ADAPTER_ALPHA, reason)
    return draft


def complete(
    draft: Draft, recipe: Recipe, method: Overrides, step: Overrides, tried: list[str]
) -> None:
    """Set what follows from the method, and what memory asks for."""
    task = draft.task
    draft.pick("method", recipe.method, ", ".join(tried))
    if "quantize.bits" in method:
        draft.pick("quantize.bits", recipe.quantize.bits, "of the base, quantized when it is read")
    for key in step:
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name)
        why = "recomputes activations, to fit" if key.endswith("checkpoint") else "to fit"
        reason = draft.choices[key].reason + "; " if key in draft.choices else ""
        draft.pick(key, value, reason + why)
    if task.is_fixed("memory.budget"):
        draft.pick("memory.budget", None, "")
    if recipe.method == "full":
        for key in ("adapter.rank", "adapter.alpha"):
            choice = draft.choices.pop(key, None)
            if choice and task.is_fixed(key):
                reason = f"{COMMAND_LINE}; method=full trains no adapter"
                draft.choices[key] = Choice(key, choice.value, reason)
    kind = str(task.config.get("model_type"))
    rate, reason = hyperparameters.learning_rate(recipe.method, task.width, kind)
    draft.pick("train.learning_rate", rate, reason)
    draft.pick("train.schedule", "cosine", "falls to 0 at the last step")
    draft.pick("train.warmup", hyperparameters.WARMUP, "of the steps")
    if task.validation[0]:
        a_step = FILLED * recipe.train.batch_tokens * recipe.train.accumulate
        an_epoch = max(1.0, int(task.lengths.sum()) / a_step)
        every = hyperparameters.validate_every(an_epoch, recipe.train.epochs)
        draft.pick(
            "train.validate_every",
            every,
            "steps: three times an epoch or a shorter run; the best is saved",
        )
        draft.pick("train.save_every", every, "as often as it validates")
        patience = hyperparameters.PER_EPOCH
        draft.pick(
            "train.early_stopping", patience, "validations in a row without a new best end it"
        )
