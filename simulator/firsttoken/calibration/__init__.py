"""Fits few physical parameters of a target to measurements: what may change, what it predicts, the fit, its record."""
