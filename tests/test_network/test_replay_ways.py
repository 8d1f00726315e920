"""Replays of networks of all kinds in miniature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmyolo_vis_hooks.network.nested import OutputKey
from mmyolo_vis_hooks.network.partial import ReplayTarget
from mmyolo_vis_hooks.network.replay import Replay
from mmyolo_vis_hooks.network.state import frozen
from mmyolo_vis_hooks.network.trace import CallKey, ReplayError
from tests.test_network.replays import (
    Scene,
    assert_near,
    counted_calls,
    engine_of,
    replay_of,
    whole_forward,
)


class Opaque:
    """Nothing can look into it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Wrap(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class ToyNet(nn.Module):
    """``stem`` -> ``body`` -> ``middle`` -> ``bbox_head``."""

    def __init__(self, middle: Callable, head: Callable | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.extra = nn.Conv2d(4, 4, 1)
        self.alias = self.extra
        self.empty = nn.Identity()
        self.two = Wrap(lambda x, y: x * y)
        self.middle = Wrap(functools.partial(middle, self))
        self.bbox_head = Wrap(head or (lambda x: (x * 2,)))
        self.times = 1

    def forward(self, inputs: Tensor) -> Any:
        return self.bbox_head(self.middle(self.body(self.stem(inputs))))


def toy(middle: Callable, head: Callable | None = None) -> Scene:
    net = ToyNet(middle, head).eval().requires_grad_(False)
    torch.manual_seed(1)
    inputs = torch.randn(1, 3, 8, 8)
    return Scene(net, lambda: net(inputs))


BODY = ReplayTarget(CallKey("body", 0), ())
RAW = [OutputKey("bbox_head", 0, (0,))]


def toy_replay(place: Scene, target: ReplayTarget = BODY) -> tuple[Replay, list[str]]:
    engine, messages = engine_of(place)
    with frozen(place.detector), torch.no_grad():
        return replay_of(engine, place, target, RAW), messages


def assert_right(place: Scene, replay: Replay) -> None:
    """The recorded, another and three values, each as in a whole forward."""
    with frozen(place.detector), torch.no_grad():
        _, value = whole_forward(place, BODY)
        others = [value * factor for factor in (1, 0.5, 3)]
        expected = [whole_forward(place, BODY, other)[0][RAW[0]] for other in others]
        for other, output in zip(others, expected):
            assert_near(replay.run(other), [output])
        assert_near(replay.run(torch.cat(others)), [torch.cat(expected)])


def copied(net: Any, x: Tensor) -> Tensor:
    board = torch.zeros(1, 4, 8, 8)
    board.copy_(x)
    return board


def in_place_after(net: Any, x: Tensor) -> Tensor:
    y = net.extra(x)
    y += x
    x.mul_(0.5)
    return y + net.empty(x)


def tokens(net: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    places = torch.arange(h * w, dtype=x.dtype).view(1, 1, -1)
    flat = x.flatten(2) + places
    return (flat.softmax(-1) * flat).view(b, c, h, w)


def beside(net: Any, x: Tensor) -> Tensor:
    """A map of one image meets what follows: in a list, in a module, in a sum."""
    early = net.empty(torch.ones(1, 4, 8, 8))
    both = torch.cat([x, early], dim=1)
    return net.two(x, early) + both[:, 4:] + net.extra(early)


FOLLOWED: dict[str, tuple[Callable, bool]] = {
    "keywords": (lambda net, x: net.extra(input=x), True),
    "shared": (lambda net, x: net.extra(x) + net.alias(net.extra(x)), True),
    "identity": (lambda net, x: net.empty(net.extra(net.empty(x))), True),
    "in place": (in_place_after, True),
    "tokens": (tokens, True),
    "beside": (beside, True),
    "written": (copied, False),
    "mixed": (lambda net, x: x - x.mean(), False),
    "opaque": (lambda net, x: Opaque(x * 2).value, True),
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_ways_that_are_followed(kind):
    middle, batched = FOLLOWED[kind]
    place = toy(middle)
    replay, messages = toy_replay(place)
    assert (replay.batch_size() > 1) == batched
    assert_right(place, replay)
    assert not messages
    with counted_calls(place.detector) as ran, torch.no_grad():
        replay.run(torch.ones(2, 4, 8, 8)[: replay.batch_size()])
    assert not any(path.startswith(("stem", "body")) for path in ran)


def test_a_branch_beside_the_way_is_written_into():
    """As DAB-DETR's head writes into boxes, which no score depends on."""

    def middle(net: Any, x: Tensor) -> Tensor:
        beside = net.extra(x)
        beside[..., :2] += x[..., :2]
        return x * x

    place = toy(middle)
    replay, messages = toy_replay(place)
    for count in (1, 3):
        values = torch.rand(count, 4, 8, 8, requires_grad=True)
        (found,) = replay.run(values)
        (slope,) = torch.autograd.grad(found.sum(), values)
        assert_near([slope], [4 * values.detach()])
    assert replay.batch_size() > 1
    assert not messages


def test_a_choice_stays_as_it_was_recorded():
    """What picks rows by their rank gives a score at the box's own row."""

    def middle(net: Any, x: Tensor) -> Tensor:
        rows = net.extra(x)[0].sum((1, 2)).detach().topk(2).indices
        return x[:, rows]

    place = toy(middle)
    replay, _ = toy_replay(place)
    net: Any = place.detector
    with frozen(net), torch.no_grad():
        _, value = whole_forward(place, BODY)
        rows = net.extra(value)[0].sum((1, 2)).topk(2).indices
        # Another order by the values of these.
        other = net.extra(value).flip(1)
        assert_near(replay.run(other), [other[:, rows] * 2])


def test_the_input_of_a_module_and_an_image_that_takes_another_way():
    """As regions of an image need not lie on all levels."""

    def middle(net: Any, x: Tensor) -> Tensor:
        for _ in range(net.times):
            x = net.extra(x)
        return x

    place = toy(middle)
    engine, messages = engine_of(place)
    side = ReplayTarget(CallKey("middle", 0), (0,), "input")
    with frozen(place.detector), torch.no_grad():
        for times in (1, 2, 1):
            place.detector.times = times
            assert_right(place, replay_of(engine, place, BODY, RAW))
        other = torch.rand(2, 4, 8, 8)
        (found,) = replay_of(engine, place, side, RAW).run(other)
        assert_near([found], [middle(place.detector, other) * 2])
    assert not messages


def threshold(net: Any, x: Tensor) -> Tensor:
    # Between the first value and the one of the trial.
    first = float(x[0, 0].max())
    net.__dict__.setdefault("limit", first * 0.95)
    for _ in range(1 if first > net.limit else 2):
        x = net.extra(x)
    return x


def hidden_state(net: Any, x: Tensor) -> Tensor:
    net.times += 1
    return net.extra(x) * net.times


@pytest.mark.parametrize(
    "middle", [threshold, hidden_state, lambda net, x: net.extra(x) + torch.rand(())]
)
def test_whole_forwards_where_nothing_else_is_right(middle):
    place = toy(middle)
    replay, (message,) = toy_replay(place)
    assert replay.batch_size() == 1
    assert message.startswith("Whole forwards are run for what depends on body")
    if middle is threshold:
        assert_right(place, replay)
    if middle is hidden_state:
        value = torch.rand(1, 4, 8, 8)
        place.detector.times = 6
        with torch.no_grad():
            (found,) = replay.run(value)
            assert_near([found], [place.detector.extra(value) * 14])


def test_calls_that_depend_on_the_values_later():
    """For values that are far from all those of the trials."""

    def middle(net: Any, x: Tensor) -> Tensor:
        return net.extra(net.extra(x) if float(x.max()) > 100 else x)

    place = toy(middle)
    replay, messages = toy_replay(place)
    assert replay.batch_size() == 1  # each value chooses for itself
    assert not messages
    with frozen(place.detector), torch.no_grad():
        for value in (torch.full((1, 4, 8, 8), n) for n in (200.0, 1.0, 200.0)):
            assert_near(replay.run(value), [middle(place.detector, value) * 2])
    (message,) = messages
    assert "had been recorded" in message


def test_no_influence():
    place = toy(lambda net, x: (net.extra(x), x + 1)[1])
    for call, place_in_output, message in (
        ("extra", (), "extra has no influence on bbox_head"),
        ("empty", (), "empty did not run"),
        ("body", (1,), "body has no tensor at"),
    ):
        with pytest.raises(ReplayError, match=message):
            toy_replay(place, ReplayTarget(CallKey(call, 0), place_in_output))
