"""Kernels: nothing but functions that Triton compiles, an idea a file."""
