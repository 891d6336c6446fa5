"""Which model and method gains from a second machine over which link: the table of the guide.

Invariant: nothing of this machine is in it, and no row is read: a step of each recipe, with rows of
Alpaca's usual length, on a Mac of the table. Try it: ``mlx-slim plan --machines 2 --table``.
"""

from __future__ import annotations

from mlx_slim.config.load import load_recipe
from mlx_slim.planner import macs, time
from mlx_slim.planner.links import LINKS, several_machines
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shipped_models import model_config
from mlx_slim.planner.work import TrainingWork
from mlx_slim.units import human_bytes

MAC = "m4-max-128gb"
ROW_TOKENS = 208  # Alpaca's mean
_STEPS = 100
RUNS = (
    ("TinyLlama 1.1B, LoRA", "tinyllama-lora", ()),
    ("TinyLlama 1.1B, full", "tinyllama-full", ()),
    ("Mistral 7B, LoRA", "mistral-lora", ()),
    ("Mistral 7B, full", "mistral-lora", ("method=full",)),
    ("LLaMA-2 7B, LoRA", "llama2-lora", ()),
    ("LLaMA-2 7B, full", "llama2-lora", ("method=full",)),
)


def markdown(machines: int = 2, mac: str = MAC) -> str:
    """Return the table: memory of each machine, bytes and seconds of a step, speed-ups.

    Raises:
        SlimError: The Mac is not in the table, or the number of machines cannot be used.
    """
    target = macs.find_mac(mac)
    head = ["run", "each needs", "a step alone", "sends a step", *LINKS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, name, overrides in RUNS:
        recipe = load_recipe(name, overrides).recipe
        config, _ = model_config(recipe)
        tokens = _STEPS * recipe.train.batch_tokens * recipe.train.accumulate
        prediction = predict(
            config,
            recipe,
            gpu=True,
            budget=macs.budget(target.memory_gb),
            gpu_bytes=target.working_set_bytes,
            machine=time.apple(target.chip_name, target.chip),
            work=TrainingWork(tokens, tokens, ROW_TOKENS, ""),
            suggest=False,
            local=False,
        )
        plans = [several_machines(prediction, recipe, machines, link) for link in LINKS.values()]
        step = plans[0].step_seconds
        assert step is not None
        cells = [
            title,
            human_bytes(plans[0].peak_bytes) + " (too much)" * (not prediction.fits),
            f"{step.low:.0f} to {step.high:.0f} s",
            human_bytes(plans[0].sent_bytes),
        ]
        for plan in plans:
            assert plan.speed_up is not None
            verdict = plan.verdict.split(":")[0]
            cells.append(
                {"helps": "{:.1f} to {:.1f} ×", "may help": "{:.1f} to {:.1f} × (?)"}.get(
                    verdict, "no"
                ).format(plan.speed_up.low, plan.speed_up.high)
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
