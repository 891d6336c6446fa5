"""Tests of what several ranks agree on."""
