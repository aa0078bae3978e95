"""Tensor to packed data and scales, and the modules that hold packed experts."""
