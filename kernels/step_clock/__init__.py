"""Stamps of the device's own clock around the work of a stream, which a captured step can hold."""

from kernels.step_clock.launcher import stamp

__all__ = ["stamp"]
