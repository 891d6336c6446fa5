"""What must be equal on all ranks of a run: versions, recipe, model, rows.

Invariant: ranks that would train on something else end before anything is written, and rank 0 says
what differs. One rank reads nothing here. Try it:
``mlx.launch -n 2 --backend ring -- mlx-slim train smollm2-lora -o RUN``.
"""

from __future__ import annotations

from mlx_slim import runtime
from mlx_slim.agreement import on_every_rank, refuse_differences
from mlx_slim.artifacts import hash_json, provenance
from mlx_slim.config.schema import Recipe
from mlx_slim.finetuning.contents import contents
from mlx_slim.models.load import model_hash, resolve
from mlx_slim.reading import JsonObject


def version_facts() -> JsonObject:
    """Return the versions and the kind of device of this rank."""
    record = provenance()
    device = "gpu" if runtime.on_gpu() else "cpu"
    return {"python": record["python"], **record["versions"], "the device": device}


def rank_facts(recipe: Recipe) -> JsonObject:
    """Return what must be equal on all ranks: name -> value.

    Raises:
        SlimError: If the model or the rows of ``recipe`` are not here.
    """
    facts = {**version_facts(), "the recipe": hash_json(recipe.model_dump(mode="json"))}
    models = {recipe.model: recipe.revision}
    if recipe.distill is not None:
        teachers = [one for one in recipe.distill.teachers if one.model and one.base_url is None]
        models |= {str(one.model): one.revision for one in teachers}
    for name, revision in models.items():
        facts[f"the files of {name}"] = model_hash(resolve(name, revision))
    for name, value in contents(recipe).items():
        facts[f"the {name}"] = value if isinstance(value, str) else hash_json(value)
    return facts


def refuse_unlike_ranks(recipe: Recipe) -> None:
    """End all ranks where one would train on something else; nothing is read on one rank.

    Raises:
        SlimError: On one of the ranks; the others end with its exit code and say nothing.
    """
    if runtime.world().size() > 1:
        refuse_differences(on_every_rank(lambda: rank_facts(recipe)))
