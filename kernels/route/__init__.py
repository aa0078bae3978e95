"""Router: fp32 gate GEMM, top-1 / top-2 with NLLB's renormalisation, stable expert order and tile list."""

from kernels.route.launcher import route
from kernels.route.reference import order_reference, route_reference

__all__ = ["order_reference", "route", "route_reference"]
