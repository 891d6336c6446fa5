"""Fine-tuning: from a recipe and rows to a run folder; ``run.py`` is what ``train`` calls."""
