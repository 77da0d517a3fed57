"""Predictions beside measurements: rows of CSV files become works, errors become statistics and a report."""
