"""The NPU: a timing machine, a functional machine, energy and reports. Read `machine.py` first."""
