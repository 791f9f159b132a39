"""CUDA C++ of the pipeline: sources, their launcher, and the functions that call them."""
