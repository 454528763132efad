"""What tests and scripts share: servers to start, ranks to run, answers to compare."""
