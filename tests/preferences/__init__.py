"""Distillation: losses, caches, agreement of tokenizers, objectives."""
