"""Does pipeline parallelism change what a model answers? Runs of lmms_eval, compared sample by sample."""
