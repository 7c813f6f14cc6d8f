"""The GPU engine: kernels written in Triton's Python, and how they are launched.

Triton is imported when the first kernel is asked for, never by importing plainconv.
"""
