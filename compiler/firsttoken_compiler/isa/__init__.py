"""The instruction set: one class per instruction with its fields, encoding, text form, footprint and meaning."""
