"""Scores: what a model answers, and how much of it is right."""
