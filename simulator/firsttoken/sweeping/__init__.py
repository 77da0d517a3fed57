"""Sweeps: a student under every combination of some settings, resumable, on one machine or a cluster."""
