"""State and rules of each unit; all that the hot loop calls takes integer arrays."""
