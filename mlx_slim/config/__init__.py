"""Recipes: one frozen schema, read from YAML and dotted overrides, every value with its origin."""
