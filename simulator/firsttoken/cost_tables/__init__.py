"""Costs of students out of a table of measured operators: the space, its probes, the lookup, the file, its error."""
