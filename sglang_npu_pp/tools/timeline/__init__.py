"""Where the time of a pipeline went, from the traces of its ranks."""
