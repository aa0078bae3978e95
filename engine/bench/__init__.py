"""Whole-engine benchmark against other implementations of the same model (`babelephant bench`)."""
