"""Slimming: the smallest model that keeps a demanded share of its scores, searched and proved."""
