"""Memory, time and disk of a run, predicted before it starts, and settings that make it fit."""
