"""Predicts memory, time and disk before anything runs, and what to change so that it fits."""
