"""Verbs of the command line, one a module; `cli` registers them."""
