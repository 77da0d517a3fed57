"""Tuning: schedules of kernels chosen by simulating them, each alone first, then all in the whole program."""
