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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import VisConfigError, VisError
from ..geometry import cells_per_pixel
from ..network.maps import token_slices
from ..records import LayerMap
from .anchors import Anchor
from .methods import CamMethod, register_method, shaped
from .spots import Case

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


@dataclass(frozen=True)
class DenseAttention:
    """Weights ``(Q, N)`` of queries for all cells of a map, mean over the heads."""

    weights: torch.Tensor

    def maps(
        self, queries: Sequence[int], network_hw: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Weights ``(K, h, w)`` of the cells of each level; over all they add up to
        1, less what lies outside of the map."""
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
        """As of :class:`DenseAttention`."""
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
    """Weights ``(K, n)`` on the cells ``(K, h, w)`` that bilinear sampling reads."""
    cells = weights.new_zeros(len(weights), 1, *hw, requires_grad=True)
    with torch.enable_grad():
        taken = F.grid_sample(cells, 2 * places_xy[:, None] - 1, align_corners=False)
        (found,) = torch.autograd.grad((taken[:, 0, 0] * weights).sum(), cells)
    return found[:, 0]


Attention = DenseAttention | SampledAttention
"""What the queries of one layer of a decoder looked at."""


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
        self._attach = [(_recorder_of(module), module) for module in modules]
        if not modules or any(attach is None for attach, _ in self._attach):
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
            for attach, module in self._attach:
                for hook in attach(module, found.append):
                    stack.enter_context(hook)
            yield found


Store = Callable[[Attention], None]


def _recorder_of(module: Any) -> Any:
    """What hooks a module of cross-attention; None if that is of no known kind."""
    if all(hasattr(module, n) for n in ("sampling_offsets", "attention_weights")):
        return _hook_sampling
    if isinstance(getattr(module, "attn", None), nn.MultiheadAttention):
        return _hook_weights
    if isinstance(getattr(module, "attn_drop", None), nn.Module):
        return _hook_dropout
    return None


def _hook_weights(module: Any, store: Store) -> list[Any]:
    def keep(_: Any, args: Any, output: Any) -> None:
        if output[1] is None:
            raise VisError("the decoder gives no attention weights; use another method")
        store(DenseAttention(output[1][0].detach().float()))

    return [module.attn.register_forward_hook(keep)]


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


def _queries_of(anchors: Sequence[Anchor]) -> dict[int, int]:
    """The query of each box whose score is not saturated, by the number of the box."""
    found = {}
    for number, anchor in enumerate(anchors):
        places = [p for entries in anchor.entries for p in entries.places.tolist()]
        queries = {place[-2] for place in places}  # of raw outputs (..., Q, C)
        if len(queries) == 1:
            found[number] = queries.pop()
    return found


def looked_at(
    method: CamMethod, layers: Sequence[Attention], case: Case
) -> list[tuple[list[LayerMap], np.ndarray | None]]:
    """Maps and sampling points of boxes; without any where a score is saturated.

    Args:
        method (CamMethod): Makes one map of those of all layers.
        layers (Sequence[Attention]): Of each layer of the decoder.
        case (Case): The boxes.

    Returns:
        list: Of each box the maps of the levels, per area of a cell of the first
        level, so that they may be added up; and its points ``(n, 3)`` over all layers,
        x and y in pixels of the input and the weight, or None where it looks at cells.
    """
    known, network_hw = _queries_of(case.anchors or ()), case.graph.network_hw
    queries = list(known.values())
    of_layers = [layer.maps(queries, network_hw) for layer in layers]
    maps: list[list[LayerMap]] = [[] for _ in queries]
    first = of_layers[0][0].shape[-2:].numel()
    for level, tensors in enumerate(zip(*of_layers)):
        weights = torch.stack(tensors)
        made = method.function(weights)
        made = shaped(made, weights.shape[1:], f"method={method.name!r}")
        made = made * (made.shape[-2:].numel() / first)
        title = f"{_NAME}[{level}]" if len(of_layers[0]) > 1 else _NAME
        for own, values in zip(maps, made.float().cpu().numpy()):
            own.append(LayerMap(title, values))
    points: list[np.ndarray | None] = [None] * len(queries)
    sampled = [layer for layer in layers if isinstance(layer, SampledAttention)]
    if sampled:
        of_all = [layer.points(queries, network_hw) for layer in sampled]
        together = torch.cat(of_all, dim=1).float()
        together[..., 2] /= len(layers)
        points = list(together.cpu().numpy())
    found = dict(zip(known, zip(maps, points)))
    return [found.get(k, ([], None)) for k in range(len(case.boxes.indices))]
