"""Benchmarks of the Triton kernels on one GPU."""
