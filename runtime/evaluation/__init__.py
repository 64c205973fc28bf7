"""Scores an engine with lm-evaluation-harness. Needs the extra `eval`."""
