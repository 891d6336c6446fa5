"""Preferences: losses, objectives, the reference, and whole runs."""
