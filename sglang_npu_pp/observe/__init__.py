"""Passive observation of a rank: telemetry, metrics, trace, reporting, measuring."""
