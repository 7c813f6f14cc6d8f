"""Kernels for the CPU: written as LLVM IR from Python, compiled in the process, run on torch's own threads.

`compile` turns the text of a kernel into machine code and keeps it (`store` is the folder on disk); `launch` runs a
kernel over its tasks.  Importing this package imports neither llvmlite nor anything that compiles.
"""
