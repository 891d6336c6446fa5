"""Tests of the comparison: matrix, cells, report."""
