"""A self test of a machine with a GPU: what the tests on a CPU cannot see.

    make test-gpu

Needs no network and no data, some 20 GB of disk and 15 GB of GPU memory. Each test compares two things on this machine,
and prints what it measured. GPU_TESTS_ON_CPU=1 runs all of it on the CPU at a tiny size, which tests these tests.
"""
