"""The experiment matrix: plan it, run it cell by cell, and report it from what is stored."""
