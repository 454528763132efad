"""What watches a rank and never steers it: counters, metrics, traces, reports, measured times."""
