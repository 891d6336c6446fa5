"""Rewards: losses, advantages, functions, tasks, rounds."""
