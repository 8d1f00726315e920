"""Replays compared with whole forwards in which a plain hook replaces the layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

from mmyolo_vis_hooks.network.graph import HeadKey, head_modules
from mmyolo_vis_hooks.network.nested import flatten_tensors, map_tensors
from mmyolo_vis_hooks.network.partial import Job, ReplayTarget
from mmyolo_vis_hooks.network.replay import Replay, ReplayEngine
from mmyolo_vis_hooks.network.state import frozen
from mmyolo_vis_hooks.network.trace import CallKey, ReplayError
from tests.families import build_family

TWO_STAGE = ("faster_rcnn", "cascade_rcnn")


# A family of each kind: path, number of the call, place in the output, and whether
# several values run in one batch. SiLU and ReLU after a norm work in place, as does
# `out += identity` after the last norm of a ResNet's block.
CASES: list[tuple[str, str, int, tuple, bool]] = [
    ("yolov5", "neck.bottom_up_layers.0", 0, (), True),
    ("yolov5", "backbone.stage3.1.blocks.0.conv2.bn", 0, (), True),
    ("yolox", "neck.out_layers.2", 0, (), True),
    ("yolov8", "neck", 0, (0,), True),
    ("yolov8", "bbox_head.head_module.reg_preds.1.0", 0, (), False),
    # Levels share the convolution, but not the norm.
    ("rtmdet", "bbox_head.head_module.cls_convs.0.0.conv", 1, (), True),
    ("retinanet", "backbone.layer3.1.bn2", 0, (), True),
    ("retinanet", "backbone.layer3.0.relu", 1, (), True),
    ("retinanet", "bbox_head.cls_convs.1.conv", 1, (), True),
    ("atss", "bbox_head.reg_convs.0.gn", 2, (), True),
    ("faster_rcnn", "neck", 0, (0,), False),
    ("cascade_rcnn", "backbone.layer4", 0, (), False),
    ("detr", "backbone.layer3.1.bn2", 0, (), False),
    ("detr", "encoder.layers.1.ffn", 0, (), True),
    ("detr", "decoder.post_norm", 1, (), True),
    ("deformable_detr", "neck", 0, (1,), False),
    ("deformable_detr", "bbox_head.cls_branches.0", 1, (), True),
    # Its queries choose where the second layer looks.
    ("dino", "decoder.layers.0", 0, (), False),
]


class Enough(Exception):
    """Ends a whole forward after the raw outputs."""


@dataclasses.dataclass
class Scene:
    """A detector with its image."""

    detector: nn.Module
    forward: Callable[[], Any]

    @property
    def heads(self) -> dict[str, nn.Module]:
        return head_modules(self.detector)


def scene_of(name: str, detector: nn.Module | None = None) -> Scene:
    family = build_family(name)
    detector = detector or family.detector

    def forward() -> Any:
        samples = copy.deepcopy(family.data_samples)
        return detector(family.inputs, samples, mode="predict")

    return Scene(detector, forward)


@contextlib.contextmanager
def held_choices(name: str, detector: Any, made: dict) -> Iterator[None]:
    """Let the network choose the regions and queries that it chose before."""
    with contextlib.ExitStack() as stack:

        def hold(owner: Any, attribute: str) -> None:
            original, count = getattr(owner, attribute), 0

            def again(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                key, count = (id(owner), attribute, count), count + 1
                if key not in made:
                    made[key] = original(*args, **kwargs)
                return made[key]

            stack.enter_context(mock.patch.object(owner, attribute, again))

        if name in TWO_STAGE:
            hold(detector.rpn_head, "predict")
        if name == "cascade_rcnn":
            for head in detector.roi_head.bbox_head:
                hold(head, "regress_by_class")
        if name == "dino":
            hold(torch, "topk")
        yield


def whole_forward(
    place: Scene, target: ReplayTarget, value: Tensor | None = None
) -> tuple[dict[HeadKey, Tensor], Tensor]:
    """Raw outputs, and what the target was, of a forward of everything."""
    outputs: dict[HeadKey, Tensor] = {}
    counts: Counter[str] = Counter()
    seen: list[Tensor] = []

    def replace_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        counts["target"] += 1
        if counts["target"] - 1 != target.call.call_index:
            return None
        seen.append(dict(flatten_tensors(output))[target.place].clone())
        if value is None:
            return None
        return map_tensors(output, lambda i, t: value * 1 if i == target.place else t)

    def collect(path: str) -> Callable:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call_index = counts[path]
            counts[path] += 1
            for index, tensor in flatten_tensors(output):
                outputs[HeadKey(path, call_index, index)] = tensor
            if counts.total() - counts["target"] == len(place.heads):
                raise Enough

        return hook

    module = place.detector.get_submodule(target.call.path)
    handles = [h.register_forward_hook(collect(p)) for p, h in place.heads.items()]
    handles.append(module.register_forward_hook(replace_output))
    try:
        with contextlib.suppress(Enough):
            place.forward()
    finally:
        for handle in handles:
            handle.remove()
    return outputs, seen[0]


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def engine_of(place: Scene) -> tuple[ReplayEngine, list[str]]:
    logger = logging.Logger("replay")
    listener = Listener()
    logger.addHandler(listener)
    return ReplayEngine(place.detector, logger), listener.messages


@functools.cache
def truth_of(name: str, target: ReplayTarget) -> tuple:
    """Raw outputs of whole forwards: the recorded ones, and those for other values."""
    place = scene_of(name)
    made: dict = {}
    with frozen(place.detector), torch.no_grad():
        with held_choices(name, place.detector, made):
            recorded, value = whole_forward(place, target)
        waves = [torch.arange(value.numel()).add(n).sin() for n in range(3)]
        others = [
            value + 0.1 * value.std() * wave.to(value).view_as(value) for wave in waves
        ]
        expected = []
        for other in others:
            with held_choices(name, place.detector, made):
                expected.append(whole_forward(place, target, other)[0])
    return made, recorded, value, others, expected


def wanted_of(name: str, recorded: dict, changed: dict) -> list[HeadKey]:
    """The raw outputs on which the target has an influence."""
    wanted = [
        key
        for key in recorded
        if not torch.equal(recorded[key], changed[key])
        # The regions of the next stage are made of the others.
        and (name != "cascade_rcnn" or key.output_index == (0,))
    ]
    assert wanted
    return wanted


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


def joined(rows: Sequence[Sequence[Tensor]], found: Sequence[Tensor]) -> list[Tensor]:
    """Single outputs along the axis in which the found ones have a batch."""
    return [
        torch.cat(values, list(batch.shape).index(len(rows)))
        for values, batch in zip(zip(*rows), found)
    ]


@pytest.mark.parametrize(
    ("name", "path", "call_index", "index", "batched"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_replay_equals_whole_forwards(name, path, call_index, index, batched):
    target = ReplayTarget(CallKey(path, call_index), index)
    place = scene_of(name)
    _, recorded, value, others, expected = truth_of(name, target)
    wanted = wanted_of(name, recorded, expected[0])
    rows = [[outputs[key] for key in wanted] for outputs in expected]
    before = [recorded[key] for key in wanted]
    engine, messages = engine_of(place)
    with frozen(place.detector), torch.no_grad():
        replay = replay_of(engine, place, target, wanted)
        for other, outputs in zip(others, rows):
            assert_near(replay.run(other), outputs)
        for _ in range(2):  # nothing that is recorded has changed
            assert_near(replay.run(value), before)
        if name in TWO_STAGE:
            with pytest.raises(ReplayError, match="no axis for several values"):
                replay.run(torch.cat(others))
        else:
            found = replay.run(torch.cat(others))
            assert_near(found, joined(rows, found))
    assert not messages
    assert (replay.batch_size() > 1) == batched
    # A wrong replay would be seen.
    for one, other in zip(rows[0], before):
        assert float((one - other).abs().max()) > 1e-3 * float(other.abs().max())


def test_a_batch_of_as_many_images_as_there_are_queries():
    target = ReplayTarget(CallKey("encoder", 0), ())
    place = scene_of("detr")
    _, _, _, others, expected = truth_of("detr", target)
    key = HeadKey("bbox_head", 0, (0,))
    engine, _ = engine_of(place)
    with frozen(place.detector), torch.no_grad():
        replay = replay_of(engine, place, target, [key])
        (found,) = replay.run(torch.cat([others[n % 3] for n in range(30)]))
        rows = [expected[n % 3][key] for n in range(30)]
        assert_near([found], [torch.cat(rows, list(found.shape).index(30))])


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "detr"])
def test_gradients_through_a_replay(name):
    target = ReplayTarget(CallKey("backbone.layer3.1.bn2", 0), ())
    made, recorded, _, others, expected = truth_of(name, target)
    wanted = wanted_of(name, recorded, expected[0])
    place = scene_of(name)
    engine, _ = engine_of(place)
    with frozen(place.detector), torch.enable_grad():
        leaf = others[0].clone().requires_grad_()
        found = replay_of(engine, place, target, wanted).run(leaf)
        with held_choices(name, place.detector, made):
            outputs, _ = whole_forward(place, target, leaf)
        gradients = []
        for raw in (found, [outputs[key] for key in wanted]):
            total = sum((output * output.detach().cos()).sum() for output in raw)
            gradients += torch.autograd.grad(total, leaf)
        assert float(gradients[1].abs().max()) > 0
        assert_near(gradients[:1], gradients[1:])


# What runs, and what it leaves behind.


@contextlib.contextmanager
def counted_calls(detector: nn.Module) -> Iterator[Counter[str]]:
    """Count the layers of torch that really compute: their classes' ``forward``."""
    paths = {id(module): path for path, module in detector.named_modules()}
    ran: Counter[str] = Counter()

    def counting(original: Callable) -> Callable:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ran[paths[id(self)]] += 1
            return original(self, *args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for kind in {type(m) for m in detector.modules()}:
            if kind.__module__.startswith("torch.nn.") and "forward" in vars(kind):
                stack.enter_context(
                    mock.patch.object(kind, "forward", counting(kind.forward))
                )
        yield ran


@pytest.mark.parametrize(
    ("name", "path", "index", "runs"),
    [
        ("yolov8", "backbone.stage4", (), ("neck.", "bbox_head.head_module.cls_preds")),
        ("retinanet", "neck", (1,), ("bbox_head.cls_convs", "bbox_head.retina_cls")),
    ],
)
def test_nothing_runs_before_the_layer_or_beside_what_is_wanted(
    name, path, index, runs
):
    place = scene_of(name)
    target = ReplayTarget(CallKey(path, 0), index)
    scores = [HeadKey("bbox_head", 0, (0, 1))]
    engine, _ = engine_of(place)
    detector: Any = place.detector
    with frozen(detector), torch.no_grad():
        replay = replay_of(engine, place, target, scores)
        _, value = whole_forward(place, target)
        with counted_calls(detector) as ran, contextlib.ExitStack() as stack:
            stack.enter_context(
                mock.patch.object(detector.bbox_head, "predict_by_feat", None)
            )
            replay.run(value)
    assert all(any(layer.startswith(own) for own in runs) for layer in ran)
    for own in runs:
        assert any(layer.startswith(own) for layer in ran)
    assert max(ran.values()) == 1  # no other level of a shared head


def state_of(detector: nn.Module) -> list:
    return [
        (path, dict(vars(module)).get("forward"), len(module._forward_hooks))
        for path, module in detector.named_modules()
    ]


def test_a_second_image_and_a_hook_that_changes_an_output():
    family = build_family("retinanet")
    detector: Any = copy.deepcopy(family.detector)
    detector.backbone.layer3[0].register_forward_hook(lambda m, a, output: output * 1.5)
    samples = copy.deepcopy(family.data_samples)
    first, second = (
        Scene(detector, functools.partial(detector, inputs, samples, "predict"))
        for inputs in (family.inputs, family.inputs.flip(-1))
    )
    target = ReplayTarget(CallKey("backbone.layer3.1.bn2", 0), ())
    engine, messages = engine_of(first)
    wanted = [HeadKey("bbox_head", 0, (0, 0))]
    with frozen(detector), torch.no_grad():
        replay_of(engine, first, target, wanted)
        expected, value = whole_forward(second, target)
        replay = replay_of(engine, second, target, wanted)
        for _ in range(2):
            assert_near(replay.run(value), [expected[key] for key in wanted])
    assert not messages


def test_no_patch_is_left():
    detector = copy.deepcopy(build_family("retinanet").detector)
    own_forward = detector.backbone.forward
    detector.backbone.forward = lambda *args: own_forward(*args)
    place = scene_of("retinanet", detector)
    before = state_of(detector)
    target = ReplayTarget(CallKey("backbone.layer4", 0), ())
    wanted = [HeadKey("bbox_head", 0, (0, 0))]
    engine, _ = engine_of(place)
    with frozen(detector), torch.no_grad():
        replay = replay_of(engine, place, target, wanted)
        assert state_of(detector) == before
        _, value = whole_forward(place, target)
        for error in (RuntimeError, KeyboardInterrupt):
            broken = type(detector.bbox_head)
            with mock.patch.object(broken, "forward", side_effect=error):
                with pytest.raises(error):
                    replay.run(value)
                with pytest.raises(error):
                    engine.trace(place.forward)
            assert state_of(detector) == before
    assert state_of(detector) == before


# Networks of all kinds in miniature.


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
RAW = [HeadKey("bbox_head", 0, (0,))]


def replay_of(
    engine: ReplayEngine, place: Scene, target: ReplayTarget, wanted: list[HeadKey]
) -> Replay:
    trace = engine.trace(place.forward)
    job = Job(engine.modules, place.forward, trace, target, tuple(wanted))
    return Replay(engine, job)


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


def test_operators_of_mmcv_in_batches():
    """They take no layout in memory but one, and say nothing."""
    detector: Any = copy.deepcopy(build_family("retinanet").detector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = ModulatedDeformConv2dPack(128, 128, 3, padding=1)
        nn.init.normal_(conv.conv_offset.weight, std=0.05)
    detector.backbone.layer2[1].conv2 = conv.eval().requires_grad_(False)
    place = scene_of("retinanet", detector)
    target = ReplayTarget(CallKey("backbone.layer2.1.conv1", 0), ())
    wanted = [HeadKey("bbox_head", 0, (0, 0))]
    engine, _ = engine_of(place)
    with frozen(detector), torch.no_grad():
        _, value = whole_forward(place, target)
        replay = replay_of(engine, place, target, wanted)
        assert replay.batch_size() > 1
        others = [value * factor for factor in (1.0, 0.8, 1.3)]
        rows = [whole_forward(place, target, v)[0][wanted[0]] for v in others]
        assert_near(replay.run(torch.cat(others)), [torch.cat(rows)])
