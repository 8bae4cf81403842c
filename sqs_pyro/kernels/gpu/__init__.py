"""GPU kernels for packed weights: Triton for every width and form, CUDA C++ for the smallest products.

Importing this package imports neither Triton nor a GPU: the first packed product on a GPU does.
"""
