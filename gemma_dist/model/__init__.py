"""Gemma 4 itself: loading it for training or evaluation, and a tiny real one for demos, tests and benchmarks."""
