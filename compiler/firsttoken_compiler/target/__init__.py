"""An NPU as data: units in the names, a grade and a source for every number."""
