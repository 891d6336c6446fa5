"""Tasks: their YAML, rows, prompts, answers taken out of texts, and metrics."""
