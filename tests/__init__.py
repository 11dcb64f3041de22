"""Packages so that tests and benchmarks import what they share by one name, `tests.support`."""
