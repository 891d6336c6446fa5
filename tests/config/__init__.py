"""Tests of recipes: loading, layers, errors."""
