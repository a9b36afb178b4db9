"""Triton kernels. Nothing is imported here: the modules need the package ``triton``, which a CPU may lack."""
