"""Chaos and soak tests on a fake multi-node Ray cluster of this machine: `pytest -m cluster tests/cluster`."""
