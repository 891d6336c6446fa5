"""Rows of text to token ids with an exact supervised mask, and from there to batches.

The way of a row: ``sources`` (where it lies) → ``formats`` and ``conversations`` (what it says) →
``templates`` and ``chat_template`` (how the model reads it) → ``tokenize`` (ids and mask) →
``store`` (on disk) → ``pack``/``batches``. ``prepare`` runs the first five and writes
the ledger. Try it: ``mlx-slim data preview RECIPE``.
"""
