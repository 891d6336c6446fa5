"""Ranks of ``mx.distributed``: what they exchange, and what they do when one of them is missing."""
