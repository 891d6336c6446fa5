"""Distillation: what teachers say, kept on disk, and losses and objectives that learn from it."""
