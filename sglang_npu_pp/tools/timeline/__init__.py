"""Analysis of traces: where the time of a pipeline went."""
