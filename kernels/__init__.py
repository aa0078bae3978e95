"""Triton kernels and their plain-torch twins. Knows tensors, not models."""
