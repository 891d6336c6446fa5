"""The documentation: its blocks run, its generated pages are those of the code."""
