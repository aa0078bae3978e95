"""Router: fp32 gate GEMM, top-1 / top-2 with NLLB's renormalisation, stable expert order and tile list."""

from kernels.route.launcher import route, semaphores
from kernels.route.reference import order_reference, route_reference
from kernels.route.tiles import FEW_TOKENS, GateTiles

__all__ = ["FEW_TOKENS", "GateTiles", "order_reference", "route", "route_reference", "semaphores"]
