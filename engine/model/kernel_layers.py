"""Building blocks of the kernel path: norms, linear maps and feed-forward layers as launches.

Legend: R rows (tokens or live hypotheses), D d_model, F feed-forward width, E experts, k = 1 or 2 active experts.
Everything here can be captured in a CUDA graph: no host synchronisation, shapes alone choose what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from engine.model.kernel_weights import KernelDense, KernelExperts, KernelLinear, is_folded, is_int8, stored_matrix
from engine.model.layers import LayerNorm
from kernels.add_layernorm import add_layernorm, add_layernorm_int8, add_slots
from kernels.expert_gemm import FfnTiles, expert_ffn, first_weights, select_tiles
from kernels.quantized_rows import QuantizedRows
from kernels.route import route, route_products, semaphores
from kernels.routing import empty_routing
from kernels.row_products import RowProducts
from kernels.row_statistics import RowStatistics
from kernels.small_linear import LinearScratch, linear_scratch, small_linear
from kernels.weights_ahead import WeightsAhead

# Rows from which int8 maps take their rows in int8, too (the output projection always does).
# Chains of decoder layers (H100, us a layer, 16 bits and int8 rows): 35.6 and 34.5 at 64 rows, 57.9 and 53.9 at 320.
INT8_ROWS_FROM = 64
# A map asks for no more than so many bytes in L2: of experts the first of them, of a dense feed-forward map all or nothing
# (that of d 1024). More push each other out (320 rows, H200: 8 MB of experts and these maps 898 -> 889 us; twice the
# experts' 893).
BYTES_AHEAD = 8 << 20


class Pending(NamedTuple):
    """Expert outputs [R, k, D] that the next layer norm is to add to the residual stream; expert_ids int32[R, k]."""

    outputs: Tensor
    expert_ids: Tensor


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """fixed_order: tiles by weight shape alone, so that a row's bits do not depend on its batch mates.
    int8_dense: the decoder's maps to queries, keys and values, its first dense feed-forward maps and the output projection
    have int8 weights, one scale an output channel; from a number of rows on they take int8 rows, one scale a row. With
    fixed_order a row must not see how many others there are: the maps never do, the projection always. The other maps lose
    at many rows what they gain at few (LOG.md), and encoder passes have many.
    """

    fixed_order: bool = False
    int8_dense: bool = False


class KernelLayers:
    """The launches that encoder and decoder share, with the scratch memory they need. One per stream.

    statistics: of the residual stream, where norms are folded into maps (`keep_statistics`; never in the fixed-order mode):
    whatever writes the stream leaves them, or clears them.
    """

    def __init__(
        self,
        shapes: set[tuple[int, int, bool]],
        max_rows: int,
        like: Tensor,
        options: KernelOptions,
        *,
        keep_statistics: bool = False,
    ) -> None:
        self._options = options
        self._max_rows = max_rows
        self._dtype = like.dtype
        self.scratch: LinearScratch = linear_scratch(
            sorted(shapes), max_rows, like.dtype, like.device, fixed=options.fixed_order
        )
        self._semaphores = semaphores(max_rows, like.device)
        self.statistics: RowStatistics | None = None
        if keep_statistics and not options.fixed_order:
            self.statistics = RowStatistics.allocate(max_rows, like.shape[1], like.device)

    def settle(self, x: Tensor, pending: Pending | None, norm: LayerNorm, linear: KernelLinear) -> Tensor | QuantizedRows:
        """What the linear map behind a norm reads: norm(x), or where the norm is folded into the map x itself, standardised
        if in int8. Expert outputs pending are added to x in place before."""
        to_int8 = is_int8(linear) and self.takes_int8(x.shape[0])
        if is_folded(linear) and not to_int8:
            if pending is not None:
                add_slots(x, pending.outputs, expert_ids=pending.expert_ids, statistics=self.statistics)
            return x
        if pending is not None and self.statistics is not None:
            self.statistics.valid = False
        return normed_int8(x, pending, norm, folded=is_folded(linear)) if to_int8 else normed(x, pending, norm)

    def takes_int8(self, rows: int) -> bool:
        """Whether int8 maps behind norms (but for the output projection) take that many rows in int8."""
        return not self._options.fixed_order and rows >= INT8_ROWS_FROM

    def linear(
        self,
        x: Tensor | QuantizedRows,
        linear: KernelLinear,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        products: RowProducts | None = None,
        ahead: WeightsAhead | None = None,
    ) -> Tensor:
        """x [R, K] -> relu(x W^T + b) [R, N], or that added in place to the residual stream; a folded norm comes first.
        products: of the new residual stream, left there if that costs no launch; ahead: what a later launch begins with."""
        return small_linear(
            x,
            linear.weight,
            linear.bias,
            relu=relu,
            residual=residual,
            fixed=self._options.fixed_order,
            scratch=self.scratch,
            dtype=self._dtype,
            statistics=self.statistics,
            products=products,
            ahead=ahead,
        )

    def ahead_of(self, layer: KernelDense | KernelExperts, rows: int) -> WeightsAhead | None:
        """What a feed-forward layer of so many rows begins with: the map before asks for it in L2."""
        if isinstance(layer, KernelDense):
            return WeightsAhead.whole(stored_matrix(layer.fc1), BYTES_AHEAD)
        return first_weights(layer.fc1, self._expert_tiles(layer, rows), BYTES_AHEAD)

    def products_for(self, layer: KernelDense | KernelExperts) -> RowProducts | None:
        """What the map that writes a feed-forward layer's rows may multiply them by for its router."""
        if isinstance(layer, KernelDense) or layer.folded is None or self.statistics is None:
            return None
        return RowProducts(layer.folded.thirds)

    def feed_forward(
        self,
        x: Tensor,
        norm: LayerNorm,
        layer: KernelDense | KernelExperts,
        active: Tensor | None,
        products: RowProducts | None = None,
    ) -> Pending | None:
        """x += FeedForward(norm(x)) in place; expert outputs come back instead, for the next `settle` or `normed` to add.
        products: from `products_for`, after the map that wrote x."""
        if isinstance(layer, KernelDense):
            ahead = WeightsAhead.whole(stored_matrix(layer.fc2), BYTES_AHEAD)
            hidden = self.linear(self.settle(x, None, norm, layer.fc1), layer.fc1, relu=True, ahead=ahead)
            self.linear(hidden, layer.fc2, residual=x)
            return None
        tiles = self._expert_tiles(layer, x.shape[0])
        num_experts, d_model = layer.router_weight.shape
        buffers = empty_routing(len(x), layer.top_k, num_experts, d_model, tiles.block_tokens, x.device)
        buffers = replace(buffers, tokens_per_expert=layer.tokens_per_expert)
        if products is not None and products.parts is not None and layer.folded is not None and self.statistics is not None:
            rows, routing = route_products(
                x,
                products,
                self.statistics,
                layer.folded,
                top_k=layer.top_k,
                block_tokens=tiles.block_tokens,
                active=active,
                gate_scale=layer.gate_scale,
                out=buffers,
            )
        else:
            rows = normed(x, None, norm)
            routing = route(
                rows,
                layer.router_weight,
                top_k=layer.top_k,
                block_tokens=tiles.block_tokens,
                semaphores=self._semaphores,
                router_bias=layer.router_bias,
                active=active,
                gate_scale=layer.gate_scale,
                out=buffers,
                fixed=self._options.fixed_order,
            )
        outputs = expert_ffn(rows, layer.fc1, layer.fc1_bias, layer.fc2, layer.fc2_bias, routing, tiles=tiles)
        return Pending(outputs, routing.expert_ids)

    def _expert_tiles(self, layer: KernelExperts, rows: int) -> FfnTiles:
        """Always those of the most rows there can be where the order of sums must not depend on the batch."""
        return select_tiles(layer.top_k * (self._max_rows if self._options.fixed_order else rows), layer.fc1)


def normed(x: Tensor, pending: Pending | None, norm: LayerNorm) -> Tensor:
    """norm(x) [R, D]; expert outputs pending are added to x in place before."""
    outputs, expert_ids = (None, None) if pending is None else pending
    return add_layernorm(x, outputs, norm.weight, norm.bias, eps=norm.eps, expert_ids=expert_ids)[1]


def normed_int8(x: Tensor, pending: Pending | None, norm: LayerNorm, *, folded: bool = False) -> QuantizedRows:
    """As `normed`, the result in int8. folded: for a map that holds the norm's weight and bias itself."""
    outputs, expert_ids = (None, None) if pending is None else pending
    weight, bias = (None, None) if folded else (norm.weight, norm.bias)
    return add_layernorm_int8(x, outputs, weight, bias, eps=norm.eps, expert_ids=expert_ids)
