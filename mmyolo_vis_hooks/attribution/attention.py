"""What the query that made a box looked at: cross-attention of DETR-like decoders.

Sources: DETR (Carion 2020), whose queries weigh all cells of the encoder's map, and
Deformable DETR (Zhu 2021), whose queries sample a few places of each level, with
weights, between its cells.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..errors import VisConfigError, VisError
from ..geometry import cells_per_pixel
from ..network.maps import token_slices
from ..records import LayerMap
from .anchors import Anchor
from .methods import CamMethod, register_method, shaped

_NAME = "decoder attention"


@register_method(
    "attention",
    kind="attention",
    summary="Cross-attention: where the query that made the box looked, in all layers "
    "of the decoder.",
    formula="mean over layers and heads of the attention weights of the box's query",
    takes_eigen_smooth=False,
)
def attention(weights: torch.Tensor) -> torch.Tensor:
    return weights.mean(dim=0)


class Attention(Protocol):
    """What the queries of one layer of a decoder looked at, mean over its heads."""

    def maps(
        self, queries: Sequence[int], network_hw: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Weights ``(K, h, w)`` of the cells of each level; over all they add up to
        1, less what lies outside of the map."""


@dataclass(frozen=True)
class DenseAttention:
    """Weights ``(Q, N)`` of queries for all cells of a map, row by row."""

    weights: torch.Tensor

    def maps(
        self, queries: Sequence[int], network_hw: tuple[int, int]
    ) -> list[torch.Tensor]:
        own = self.weights[list(queries)]
        slices = token_slices(own.t(), network_hw, _NAME)
        return [own[:, s : s + h * w].reshape(-1, h, w) for s, h, w in slices]


@dataclass(frozen=True)
class SampledAttention:
    """Places that queries sample, and their weights.

    Attributes:
        places_xy: ``(Q, heads, levels, points, 2)``, shares of a level's width and
            height.
        weights: ``(Q, heads, levels, points)``, which add up to 1 for each head.
        levels_hw: Rows and columns of each level.
    """

    places_xy: torch.Tensor
    weights: torch.Tensor
    levels_hw: Sequence[tuple[int, int]]

    def maps(
        self, queries: Sequence[int], network_hw: tuple[int, int]
    ) -> list[torch.Tensor]:
        places, weights = self._of(queries)
        levels = zip(places.unbind(2), weights.unbind(2), self.levels_hw)
        return [_spread(p.flatten(1, 2), w.flatten(1), hw) for p, w, hw in levels]

    def points(
        self, queries: Sequence[int], network_hw: tuple[int, int]
    ) -> torch.Tensor:
        """``(K, n, 3)``: x and y in pixels of the network's input, and the weight."""
        places, weights = self._of(queries)
        sizes = []
        for hw in self.levels_hw:
            rows, columns = cells_per_pixel(hw, network_hw)
            sizes.append((hw[1] / columns, hw[0] / rows))
        places = places * places.new_tensor(sizes)[:, None]
        return torch.cat([places, weights[..., None]], dim=-1).flatten(1, 3)

    def _of(self, queries: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.weights[list(queries)]
        return self.places_xy[list(queries)], weights / weights.shape[1]


def _spread(
    places_xy: torch.Tensor, weights: torch.Tensor, hw: tuple[int, int]
) -> torch.Tensor:
    """Weights ``(K, n)`` over the cells ``(K, h, w)`` between which places lie, in
    the shares in which bilinear sampling takes its values from them."""
    height, width = hw
    cells = places_xy * places_xy.new_tensor([width, height]) - 0.5
    corner = cells.floor()
    share = cells - corner
    whole = weights.new_zeros(len(weights), height * width)
    for right in (0, 1):
        for below in (0, 1):
            x, y = (corner[..., 0] + right).long(), (corner[..., 1] + below).long()
            own = weights * (share[..., 0] if right else 1 - share[..., 0])
            own = own * (share[..., 1] if below else 1 - share[..., 1])
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = torch.where(inside, y * width + x, 0)
            whole.scatter_add_(1, index, torch.where(inside, own, 0))
    return whole.reshape(-1, height, width)


class DecoderAttention:
    """Records the cross-attention of a decoder's layers.

    Args:
        detector (nn.Module): The detector, without wrappers.

    Raises:
        VisConfigError: If it has no decoder whose attention can be read.
    """

    def __init__(self, detector: nn.Module) -> None:
        layers = getattr(getattr(detector, "decoder", None), "layers", None) or ()
        modules = [getattr(layer, "cross_attn", None) for layer in layers]
        attaching = [_recorder_of(module) for module in modules]
        self._attach = [attach for attach in attaching if attach is not None]
        if not modules or len(self._attach) < len(modules):
            raise VisConfigError(
                f"method='attention' cannot work with {type(detector).__name__}: it "
                "follows the query of a box through the layers of a 'decoder' with "
                "'cross_attn', as DETR, Deformable DETR and DINO have them; use "
                "another method"
            )

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Sequence[Attention]]:
        """A block that gives the attention of each layer in its last forward."""
        found: deque[Attention] = deque(maxlen=len(self._attach))
        with contextlib.ExitStack() as stack:
            for attach in self._attach:
                for handle in attach(found.append):
                    stack.callback(handle.remove)
            yield found


Store = Callable[[Attention], None]


def _recorder_of(module: Any) -> Callable[[Store], list[Any]] | None:
    """What hooks a module of cross-attention; None if that is of no known kind."""
    if all(hasattr(module, n) for n in ("sampling_offsets", "attention_weights")):
        return lambda store: _hook_sampling(module, store)
    if isinstance(getattr(module, "attn", None), nn.MultiheadAttention):
        return lambda store: _hook_weights(module.attn, store)
    if isinstance(getattr(module, "attn_drop", None), nn.Module):
        return lambda store: _hook_dropout(module, store)
    return None


def _hook_weights(attn: nn.MultiheadAttention, store: Store) -> list[Any]:
    def keep(_: Any, args: Any, output: Any) -> None:
        if output[1] is None:
            raise VisError("the decoder gives no attention weights; use another method")
        store(DenseAttention(output[1][0].detach().float()))

    return [attn.register_forward_hook(keep)]


def _hook_dropout(module: Any, store: Store) -> list[Any]:
    """Of Conditional and DAB-DETR, whose weights go through a dropout only."""

    def keep(_: Any, args: Any, output: torch.Tensor) -> None:
        # (heads, Q, N), of one image.
        store(DenseAttention(output.detach().float().mean(dim=0)))

    return [module.attn_drop.register_forward_hook(keep)]


def _hook_sampling(module: Any, store: Store) -> list[Any]:
    """Of Deformable DETR, whose operation tells neither places nor weights."""
    given: dict[str, Any] = {}

    def enter(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, output: given.update({name: output.detach().float()})

    def leave(*_: Any) -> None:
        shape = -1, module.num_heads, module.num_levels, module.num_points
        offsets = given["offsets"][0].reshape(*shape, 2)
        weights = given["weights"].unflatten(-1, (module.num_heads, -1))
        shapes = given["spatial_shapes"]
        reference = given["reference_points"][0, :, None, :, None].detach().float()
        if reference.shape[-1] == 2:  # equation 2 of the paper: in cells of a level
            moved = offsets / shapes.flip(-1)[:, None]
        else:  # a box with its width and height, appendix A.4
            moved = offsets / module.num_points * reference[..., 2:] / 2
        store(
            SampledAttention(
                reference[..., :2] + moved,
                weights[0].softmax(dim=-1).reshape(shape),
                [(int(h), int(w)) for h, w in shapes.tolist()],
            )
        )
        given.clear()

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.sampling_offsets.register_forward_hook(keep("offsets")),
        module.attention_weights.register_forward_hook(keep("weights")),
        module.register_forward_hook(leave),
    ]


def queries_of(anchors: Sequence[Anchor]) -> dict[int, int]:
    """The query of each box, by the number of the box; saturated scores have none.

    The raw outputs ``(..., Q, C)`` that decided a box say which.
    """
    found = {}
    for number, anchor in enumerate(anchors):
        places = [p for entries in anchor.entries for p in entries.places.tolist()]
        queries = {place[-2] for place in places}
        if len(queries) == 1:
            found[number] = queries.pop()
    return found


def looked_at(
    method: CamMethod,
    layers: Sequence[Attention],
    queries: Sequence[int],
    network_hw: tuple[int, int],
) -> tuple[list[list[LayerMap]], list[np.ndarray | None]]:
    """Maps and sampling points of queries.

    Args:
        method (CamMethod): Makes one map of those of all layers.
        layers (Sequence[Attention]): Of each layer of the decoder.
        queries (Sequence[int]): Which queries.
        network_hw (tuple[int, int]): Size of the network's input.

    Returns:
        tuple: Of each query the maps of the levels, per area of a cell of the first
        level, so that they may be added up; and its points ``(n, 3)`` over all layers,
        x and y in pixels of the input and the weight, or None where it looks at cells.
    """
    of_layers = [layer.maps(queries, network_hw) for layer in layers]
    maps: list[list[LayerMap]] = [[] for _ in queries]
    first = of_layers[0][0].shape[-2:].numel()
    for level, tensors in enumerate(zip(*of_layers)):
        weights = torch.stack(tensors)
        found = method.function(weights)
        found = shaped(found, weights.shape[1:], f"method={method.name!r}")
        found = found * (found.shape[-2:].numel() / first)
        title = f"{_NAME}[{level}]" if len(of_layers[0]) > 1 else _NAME
        for own, values in zip(maps, found.float().cpu().numpy()):
            own.append(LayerMap(title, values))
    sampled = [layer for layer in layers if isinstance(layer, SampledAttention)]
    if not sampled:
        return maps, [None] * len(queries)
    points = [layer.points(queries, network_hw) for layer in sampled]
    together = torch.cat(points, dim=1).float()
    together[..., 2] /= len(layers)
    return maps, list(together.cpu().numpy())
