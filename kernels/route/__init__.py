"""Router: fp32 gate GEMM, top-1 / top-2 with NLLB's renormalisation, stable expert order and tile list."""

from kernels.route.folded import FoldedRouter, fold_router
from kernels.route.launcher import route, route_products, semaphores
from kernels.route.reference import order_reference, route_reference
from kernels.route.tiles import FEW_TOKENS, GateTiles

__all__ = [
    "FEW_TOKENS",
    "FoldedRouter",
    "GateTiles",
    "fold_router",
    "order_reference",
    "route",
    "route_products",
    "route_reference",
    "semaphores",
]
