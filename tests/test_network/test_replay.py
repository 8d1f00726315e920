"""Replays compared with whole forwards in which a plain hook replaces the layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import logging
import re
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

from mmyolo_vis_hooks.network.graph import HeadKey, head_modules
from mmyolo_vis_hooks.network.nested import flatten_tensors, map_tensors
from mmyolo_vis_hooks.network.replay import (
    CallKey,
    FullReplay,
    NoInfluenceError,
    ReplayEngine,
    ReplayError,
    ReplayTarget,
    SuffixReplay,
)
from mmyolo_vis_hooks.network.state import frozen
from tests.families import FAMILIES, build_family
from tests.families import map_tensors as map_values

TWO_STAGE = ("faster_rcnn", "cascade_rcnn", "mask_rcnn")
TRANSFORMERS = ("detr", "deformable_detr", "dino")
ONE_STAGE = tuple(n for n in FAMILIES if n not in (*TWO_STAGE, *TRANSFORMERS))

# Path, number of the call and place in the output. SiLU and ReLU after a norm work in
# place, as does `out += identity` after the last norm of a ResNet's block.
_RESNET = [
    ("backbone.layer4", 0, ()),
    ("backbone.layer3.0.bn1", 0, ()),
    ("backbone.layer3.1.bn2", 0, ()),
    ("backbone.layer3.0.relu", 1, ()),
    ("neck", 0, (0,)),
]
_SHORT = [_RESNET[0], _RESNET[2], ("neck", 0, (0,))]
_TARGETS: dict[str, list[tuple[str, int, tuple]]] = {
    "yolov5": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.blocks.0.conv2.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (1,)),
        ("bbox_head.head_module.convs_pred.1", 0, ()),
    ],
    "yolov6": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.0.0.rbr_dense.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (0,)),
        ("bbox_head.head_module.stems.1", 0, ()),
    ],
    "yolov7": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.short_conv.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (2,)),
        ("bbox_head.head_module.convs_pred.2.0", 0, ()),
    ],
    "yolov8": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.blocks.0.conv2.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (1,)),
        ("bbox_head.head_module.reg_preds.1.0", 0, ()),
    ],
    "yolox": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.short_conv.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (1,)),
        ("bbox_head.head_module.multi_level_reg_convs.0", 0, ()),
    ],
    "rtmdet": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.short_conv.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (1,)),
        # Levels share the convolution, but not the norm.
        ("bbox_head.head_module.cls_convs.0.0.conv", 1, ()),
    ],
    "ppyoloe": [
        ("backbone.stage3", 0, ()),
        ("backbone.stage2.0.blocks.0.conv1.bn", 0, ()),
        ("neck.bottom_up_layers.0", 0, ()),
        ("neck", 0, (0,)),
        ("bbox_head.head_module.cls_stems.1", 0, ()),
    ],
    "retinanet": [
        *_RESNET,
        ("neck.fpn_convs.1.conv", 0, ()),
        ("bbox_head.cls_convs.1.conv", 1, ()),
    ],
    "fcos": [*_SHORT, ("bbox_head.reg_convs.3", 3, ())],
    "atss": [*_SHORT, ("bbox_head.reg_convs.0.gn", 2, ())],
    "rtmdet_ins": [
        ("backbone.stage4", 0, ()),
        ("backbone.stage3.1.short_conv.bn", 0, ()),
        ("neck.bottom_up_blocks.0", 0, ()),
        ("neck", 0, (0,)),
        ("bbox_head.cls_convs.0.0.conv", 0, ()),
    ],
    "faster_rcnn": [
        *_SHORT,
        ("roi_head.bbox_roi_extractor", 0, ()),
        ("roi_head.bbox_roi_extractor.roi_layers.1", 0, ()),
        ("roi_head.bbox_head.relu", 1, ()),
    ],
    "cascade_rcnn": [
        *_SHORT,
        ("roi_head.bbox_roi_extractor.1", 0, ()),
        ("roi_head.bbox_head.2.shared_fcs.0", 0, ()),
    ],
    "mask_rcnn": [*_SHORT, ("roi_head.bbox_head.shared_fcs.1", 0, ())],
    "detr": [
        ("backbone.layer4", 0, ()),
        ("backbone.layer3.1.bn2", 0, ()),
        ("neck", 0, (0,)),
        ("encoder", 0, ()),
        ("encoder.layers.1.self_attn.attn", 0, (0,)),
        ("decoder.post_norm", 1, ()),
    ],
    "deformable_detr": [
        ("backbone.layer4", 0, ()),
        ("neck", 0, (1,)),
        ("encoder", 0, ()),
        ("encoder.layers.0.ffn", 0, ()),
        ("bbox_head.cls_branches.0", 1, ()),
    ],
    "dino": [
        ("backbone.layer4", 0, ()),
        ("neck", 0, (1,)),
        ("encoder", 0, ()),
        # Their queries choose where the second layer looks.
        ("decoder.layers.0", 0, ()),
        ("decoder.norm", 1, ()),
    ],
}
# Where the outputs, or what the network is given of the image, know one image only.
_ONE_BY_ONE = {
    ("yolov8", "bbox_head.head_module.reg_preds.1.0"),
    ("detr", "backbone.layer4"),
    ("detr", "backbone.layer3.1.bn2"),
    ("detr", "neck"),
    ("detr", "encoder.layers.1.self_attn.attn"),
    ("deformable_detr", "backbone.layer4"),
    ("dino", "backbone.layer4"),
}


def one_output(name: str) -> list[tuple[str, int, tuple]]:
    """For which targets a single raw output is asked for, too."""
    return [t for t in _TARGETS[name] if t in (_TARGETS[name][0], ("neck", 0, (0,)))]


CASES = [
    pytest.param(name, target, which, id=f"{name}-{target[0]}-{which}")
    for name in FAMILIES
    for target in _TARGETS[name]
    for which in ("one", "all")
    if which == "all" or target in one_output(name)
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


@functools.cache
def scene(name: str) -> Scene:
    """A family in float64, in which batches do not round otherwise.

    Masks of instances are pasted in float32 only.
    """
    family = build_family(name)
    detector, inputs = copy.deepcopy(family.detector), family.inputs
    if name not in TWO_STAGE:
        detector, inputs = detector.double(), inputs.double()

    return Scene(detector, forward_of(detector, inputs, family.data_samples))


def forward_of(detector: nn.Module, inputs: Tensor, samples: list) -> Callable:
    def forward() -> Any:
        with mock.patch.object(_NMS, "nms", nms_in_float):
            return detector(inputs, copy.deepcopy(samples), mode="predict")

    return forward


# `mmcv.ops.nms` as an attribute is the function of the same name.
_NMS = importlib.import_module("mmcv.ops.nms").ext_module
_nms = _NMS.nms


def nms_in_float(boxes: Tensor, scores: Tensor, **options: Any) -> Tensor:
    """The operator takes float32 only, and its choice does not depend on more."""
    return _nms(boxes.float(), scores.float(), **options)


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


@contextlib.contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_forward(
    place: Scene, target: ReplayTarget | None = None, value: Tensor | None = None
) -> tuple[dict[HeadKey, Tensor], Tensor | None]:
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

    handles = [h.register_forward_hook(collect(p)) for p, h in place.heads.items()]
    if target is not None:
        module = place.detector.get_submodule(target.call.path)
        handles.append(module.register_forward_hook(replace_output))
    with removed(handles), contextlib.suppress(Enough):
        place.forward()
    return outputs, seen[0] if seen else None


@dataclasses.dataclass
class Case:
    """One replay and what it must give."""

    name: str
    place: Scene
    target: ReplayTarget
    replay: Any
    wanted: list[HeadKey]
    value: Tensor
    recorded: list[Tensor]
    others: list[Tensor]
    expected: list[list[Tensor]]
    made: dict
    messages: list[str]


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
    return ReplayEngine(place.detector, place.heads, logger), listener.messages


@functools.cache
def truth_of(name: str, target: ReplayTarget) -> tuple:
    """Raw outputs of whole forwards: the recorded ones, and those for other values."""
    place = scene(name)
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


@functools.cache
def case_of(name: str, target_place: tuple[str, int, tuple], which: str) -> Case:
    place = scene(name)
    path, call_index, index = target_place
    target = ReplayTarget(CallKey(path, call_index), index)
    made, recorded, value, others, expected = truth_of(name, target)
    wanted = [
        key
        for key in recorded
        if not torch.equal(recorded[key], expected[0][key])
        # The regions of the next stage are made of the others.
        and (name != "cascade_rcnn" or key.output_index == (0,))
    ]
    assert wanted
    wanted = wanted[-1:] if which == "one" else wanted
    with frozen(place.detector), torch.no_grad():
        engine, messages = engine_of(place)
        replay = engine.replay(place.forward, target, wanted, {})
    return Case(
        name,
        place,
        target,
        replay,
        wanted,
        value,
        [recorded[key] for key in wanted],
        others,
        [[outputs[key] for key in wanted] for outputs in expected],
        made,
        messages,
    )


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def joined(rows: Sequence[Sequence[Tensor]], found: Sequence[Tensor]) -> list[Tensor]:
    """Single outputs along the axis in which the found ones have a batch."""
    outputs = []
    for values, batch in zip(zip(*rows), found):
        axes = [
            axis
            for axis, size in enumerate(values[0].shape)
            if size == 1 and batch.shape[axis] == len(rows)
        ]
        outputs.append(torch.cat(values, axes[0]))
    return outputs


@pytest.mark.parametrize(("name", "target", "which"), CASES)
def test_a_replay_equals_the_whole_forward(name, target, which):
    case = case_of(name, target, which)
    assert isinstance(case.replay, SuffixReplay)
    assert not case.messages
    with frozen(case.place.detector), torch.no_grad():
        for _ in range(2):  # the first must not change what was recorded
            assert_near(case.replay.run(case.value), case.recorded)
        for other, expected in zip(case.others, case.expected):
            assert_near(case.replay.run(other), expected)
        assert_near(case.replay.run(case.value), case.recorded)
    # A wrong replay would be seen.
    for one, other in zip(case.expected[0], case.recorded):
        assert float((one - other).abs().max()) > 1e-4 * float(other.abs().max())


@pytest.mark.parametrize(("name", "target", "which"), CASES)
def test_values_in_batches(name, target, which):
    case = case_of(name, target, which)
    batched = name not in TWO_STAGE and (name, target[0]) not in _ONE_BY_ONE
    assert case.replay.plan.batched == batched
    if case.value.shape[0] != 1:
        return
    with frozen(case.place.detector), torch.no_grad():
        batch = torch.cat(case.others)
        if name in TWO_STAGE:
            with pytest.raises(ReplayError, match="no axis for several values"):
                case.replay.run(batch)
            return
        found = case.replay.run(batch)
        assert_near(found, joined(case.expected, found))


def test_a_batch_of_as_many_images_as_there_are_queries():
    case = case_of("detr", ("encoder", 0, ()), "all")
    with frozen(case.place.detector), torch.no_grad():
        found = case.replay.run(torch.cat([case.others[n % 3] for n in range(30)]))
        rows = [case.expected[n % 3] for n in range(30)]
        assert_near(found, joined(rows, found))


@pytest.mark.parametrize(("name", "target", "which"), CASES)
def test_gradients_through_a_replay(name, target, which):
    case = case_of(name, target, which)
    detector = case.place.detector
    with frozen(detector), torch.enable_grad():
        leaf = case.others[0].clone().requires_grad_()
        found = case.replay.run(leaf)
        with held_choices(name, detector, case.made):
            outputs, _ = whole_forward(case.place, case.target, leaf)
        expected = [outputs[key] for key in case.wanted]
        gradients = []
        for raw in (found, expected):
            total = sum((output * output.detach().cos()).sum() for output in raw)
            gradients += torch.autograd.grad(total, leaf)
        assert float(gradients[1].abs().max()) > 0
        assert_near(gradients[:1], gradients[1:])
    assert all(parameter.grad is None for parameter in detector.parameters())


@contextlib.contextmanager
def counted_calls(detector: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Note which modules really compute: their classes' own ``forward``."""
    paths = {id(module): path for path, module in detector.named_modules()}
    events: list[tuple[str, str]] = []
    running: list[nn.Module] = []

    def counting(original: Callable) -> Callable:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if running and running[-1] is self:  # from a subclass
                return original(self, *args, **kwargs)
            events.append(("begin", paths[id(self)]))
            running.append(self)
            try:
                output = original(self, *args, **kwargs)
            finally:
                running.pop()
            events.append(("end", paths[id(self)]))
            return output

        return forward

    owners = {
        owner
        for module in detector.modules()
        for owner in type(module).__mro__
        if "forward" in vars(owner) and module is not detector
    }
    with contextlib.ExitStack() as stack:
        for owner in owners - {nn.Module}:
            stack.enter_context(
                mock.patch.object(owner, "forward", counting(owner.forward))
            )
        yield events


def begun(events: Sequence[tuple[str, str]]) -> Counter[str]:
    return Counter(path for kind, path in events if kind == "begin")


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_runs_before_the_layer_or_beside_what_is_wanted(name):
    place = scene(name)
    detector: Any = place.detector
    with frozen(detector), torch.no_grad(), counted_calls(detector) as whole:
        whole_forward(place)
    total = begun(whole)
    for target in _TARGETS[name]:
        which = "one" if target in one_output(name) else "all"
        case = case_of(name, target, which)
        path, call_index, _ = target
        with frozen(detector), torch.no_grad(), counted_calls(detector) as events:
            starts = [i for i, e in enumerate(whole) if e == ("begin", path)]
            start = starts[call_index]
            allowed = begun(whole[start + 1 :])
            open_calls = begun(whole[:start])
            open_calls.subtract(p for kind, p in whole[:start] if kind == "end")
            allowed.update(open_calls)  # those around it
            heads = [h for h in detector.modules() if hasattr(h, "predict_by_feat")]
            heads = [h for h in heads if h is not getattr(detector, "rpn_head", None)]
            with contextlib.ExitStack() as stack:
                for head in heads:
                    stack.enter_context(
                        mock.patch.object(head, "predict_by_feat", None)
                    )
                case.replay.run(case.others[0])
            ran = begun(events)
        below = [p for p in ran if p == path or p.startswith(path + ".")]
        assert all(ran[p] < total[p] for p in below)
        for ran_path, count in ran.items():
            assert count <= allowed[ran_path], (target, ran_path)
        if target[0].startswith(("neck", "backbone")):
            assert ran
        if name in ONE_STAGE and which == "one":
            num_levels = 5 if name in ("retinanet", "fcos", "atss") else 3
            in_head = [
                sum(n for p, n in counts.items() if p.startswith("bbox_head."))
                for counts in (ran, total)
            ]
            assert in_head[0] <= in_head[1] / num_levels + 1


# What a replay leaves behind.


def state_of(detector: nn.Module) -> list:
    return [
        (path, dict(vars(module)).get("forward"), len(module._forward_hooks))
        for path, module in detector.named_modules()
    ]


@pytest.mark.parametrize("name", ["yolov8", "retinanet", "dino"])
def test_no_patch_is_left(name):
    case = case_of(name, _TARGETS[name][0], "all")
    detector = copy.deepcopy(case.place.detector)
    own_forward = detector.backbone.forward
    detector.backbone.forward = lambda *args: own_forward(*args)
    patched = detector.backbone.forward
    family = build_family(name)
    forward = forward_of(detector, family.inputs.double(), family.data_samples)
    place = Scene(detector, forward)
    before = state_of(detector)
    engine, _ = engine_of(place)
    with frozen(detector), torch.no_grad():
        replay = engine.replay(forward, case.target, case.wanted, {})
        assert state_of(detector) == before
        assert_near(replay.run(case.value), case.recorded)
        assert detector.backbone.forward is patched
        broken = place.heads["bbox_head"]
        for error in (RuntimeError, KeyboardInterrupt):
            with mock.patch.object(type(broken), "forward", side_effect=error):
                before_error = state_of(detector)
                with pytest.raises(error):
                    replay.run(case.others[0])
                with pytest.raises(error):
                    engine.trace(forward)
                assert state_of(detector) == before_error
        assert_near(replay.run(case.value), case.recorded)
    assert state_of(detector) == before
    assert "forward" not in vars(detector.neck)


def test_what_is_recorded_during_another_forward():
    """The engine's hooks record on a second image what a known plan needs."""
    case = case_of("retinanet", ("backbone.layer3.1.bn2", 0, ()), "all")
    place = case.place
    # An own hook that changes an output runs in the replay, too.
    detector = copy.deepcopy(place.detector)
    detector.backbone.layer3[0].register_forward_hook(lambda m, a, output: output * 1.5)
    images = [build_family("retinanet").inputs.double()]
    images.append(images[0].flip(-1))

    samples = build_family("retinanet").data_samples
    place = Scene(detector, forward_of(detector, images[0], samples))
    engine, messages = engine_of(place)
    with frozen(detector), torch.no_grad():
        engine.replay(place.forward, case.target, case.wanted, {})
        second = Scene(detector, forward_of(detector, images[1], samples))
        recorded: dict = {}
        expected, value = whole_forward(second, case.target)
        handles = list(engine.attach_recording(recorded))
        with removed(handles):
            second.forward()
        with mock.patch.object(engine, "trace", None):  # nothing is missing
            replay = engine.replay(second.forward, case.target, case.wanted, recorded)
        for _ in range(2):
            assert_near(replay.run(value), [expected[key] for key in case.wanted])
        # Without the recording it is made up for.
        replay = engine.replay(second.forward, case.target, case.wanted, {})
        assert_near(replay.run(value), [expected[key] for key in case.wanted])
    assert isinstance(replay, SuffixReplay)
    assert not messages


# Networks of all kinds in miniature.

Maps = namedtuple("Maps", "fine coarse")


@dataclasses.dataclass(frozen=True)
class Record:
    maps: list
    note: str = "kept"


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
        self.nest = Wrap(lambda x: {"maps": Maps(x, [x * 2])})
        self.middle = Wrap(functools.partial(middle, self))
        self.bbox_head = Wrap(head or (lambda x: (x * 2,)))

    def forward(self, inputs: Tensor) -> Any:
        return self.bbox_head(self.middle(self.body(self.stem(inputs))))


def toy(middle: Callable, head: Callable | None = None) -> Scene:
    net = ToyNet(middle, head).eval().requires_grad_(False)
    torch.manual_seed(1)
    inputs = torch.randn(1, 3, 8, 8)
    return Scene(net, lambda: net(inputs))


BODY = ReplayTarget(CallKey("body", 0), ())
RAW = [HeadKey("bbox_head", 0, (0,))]


def toy_replay(place: Scene, target: ReplayTarget = BODY) -> tuple[Any, list[str]]:
    engine, messages = engine_of(place)
    with frozen(place.detector), torch.no_grad():
        return engine.replay(place.forward, target, RAW, {}), messages


def assert_right(place: Scene, replay: Any, target: ReplayTarget = BODY) -> None:
    """The recorded, another and three values, each as in a whole forward."""
    with frozen(place.detector), torch.no_grad():
        _, value = whole_forward(place, target)
        others = [value * factor for factor in (1, 0.5, 3)]
        expected = [whole_forward(place, target, other)[0][RAW[0]] for other in others]
        for other, output in zip(others, expected):
            assert_near(replay.run(other), [output])
        assert_near(replay.run(torch.cat(others)), [torch.cat(expected)])


def canvas(net: Any, x: Tensor) -> Tensor:
    board = x.new_zeros(1, 4, 8, 8).expand(len(x), -1, -1, -1).clone()
    board[:, :, ::2] = x[:, :, ::2]
    return board


def copied(net: Any, x: Tensor) -> Tensor:
    board = torch.zeros(1, 4, 8, 8)
    board.copy_(x)
    return board


def summed_into(net: Any, x: Tensor) -> Tensor:
    board = torch.ones(1, 4, 8, 8)
    board.add_(x)
    return board


def written_out(net: Any, x: Tensor) -> Tensor:
    return torch.mul(x, 3, out=torch.empty_like(x))


def in_place_after(net: Any, x: Tensor) -> Tensor:
    y = net.extra(x)
    y += x
    x.mul_(0.5)
    return y + net.empty(x)


def nested(net: Any, x: Tensor) -> Tensor:
    maps = net.nest(x)
    return maps["maps"].fine + maps["maps"].coarse[0]


def tokens(net: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    places = torch.arange(h * w, dtype=x.dtype).reshape(1, h * w).view(1, 1, -1)
    flat = x.flatten(2) + places.view(1, 1, h * w)
    return (flat.softmax(-1) * flat).view(b, c, h, w)


FOLLOWED: dict[str, Callable] = {
    "plain": lambda net, x: net.extra(x),
    "keywords": lambda net, x: net.extra(input=x),
    "shared module": lambda net, x: net.extra(x) + net.alias(net.extra(x)),
    "identity": lambda net, x: net.empty(net.extra(net.empty(x))),
    "nested": nested,
    "canvas": canvas,
    "in place": in_place_after,
    "tokens": tokens,
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_ways_that_are_followed(kind):
    place = toy(FOLLOWED[kind])
    replay, messages = toy_replay(place)
    assert isinstance(replay, SuffixReplay)
    assert replay.plan.batched
    assert_right(place, replay)
    assert not messages
    with counted_calls(place.detector) as events, torch.no_grad():
        replay.run(torch.ones(2, 4, 8, 8))
    assert not any(path.startswith(("stem", "body")) for _, path in events)


@pytest.mark.parametrize("middle", [copied, summed_into])
def test_statements_that_write_into_one_image(middle):
    place = toy(middle)
    replay, messages = toy_replay(place)
    assert isinstance(replay, SuffixReplay)
    assert not replay.plan.batched
    assert_right(place, replay)
    assert not messages


def test_records_between_modules():
    place = toy(lambda net, x: Record([x, x * 2]), lambda r: (r.maps[0] + r.maps[1],))
    replay, messages = toy_replay(place)
    assert isinstance(replay, SuffixReplay)
    assert_right(place, replay)
    assert not messages


def test_images_that_are_mixed_run_one_by_one():
    place = toy(lambda net, x: x - x.mean())
    replay, messages = toy_replay(place)
    assert isinstance(replay, SuffixReplay)
    assert not replay.plan.batched
    assert_right(place, replay)
    assert not messages


def test_the_input_of_a_module():
    place = toy(in_place_after)
    target = ReplayTarget(CallKey("middle", 0), (0,), "input")
    replay, messages = toy_replay(place, target)
    assert isinstance(replay, SuffixReplay)
    with torch.no_grad():
        for other in (torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8) + 1):
            expected = in_place_after(place.detector, other.clone()) * 2
            assert_near(replay.run(other), [expected])
    assert not messages


def detour(net: Any, x: Tensor) -> Tensor:
    """One way can be followed, and another cannot."""
    return net.extra(x) + torch.from_numpy(net.extra(x).detach().cpu().numpy())


def threshold(net: Any, x: Tensor) -> Tensor:
    # Between the first value and the one of the trial.
    first = float(x[0, 0].max())
    net.__dict__.setdefault("limit", first * 0.95)
    for _ in range(1 if first > net.limit else 2):
        x = net.extra(x)
    return x


UNFOLLOWED: dict[str, tuple[Callable, Callable | None, str]] = {
    "detour": (detour, None, "numpy"),
    "written out": (written_out, None, "out=|automatic differentiation"),
    "opaque": (
        lambda net, x: Opaque(x),
        lambda o: (o.value * 2,),
        "cannot be followed",
    ),
    "data": (threshold, None, "had been recorded"),
}


@pytest.mark.parametrize("kind", UNFOLLOWED)
def test_ways_that_cannot_be_followed(kind):
    middle, head, reason = UNFOLLOWED[kind]
    place = toy(middle, head)
    replay, messages = toy_replay(place)
    assert isinstance(replay, FullReplay)
    assert_right(place, replay)
    (message,) = messages
    assert message.startswith("Whole forwards are run for what depends on body")
    assert re.search(reason, message)


def test_a_hidden_state():
    def middle(net: Any, x: Tensor) -> Tensor:
        net.__dict__["calls"] = net.__dict__.get("calls", 0) + 1
        return net.extra(x) * net.calls

    place = toy(middle)
    replay, messages = toy_replay(place)
    assert isinstance(replay, FullReplay)
    assert len(messages) == 1
    with torch.no_grad():
        value = torch.rand(1, 4, 8, 8)
        vars(place.detector)["calls"] = 6
        (found,) = replay.run(value)
        assert_near([found], [place.detector.extra(value) * 14])


def test_randomness():
    place = toy(lambda net, x: net.extra(x) + torch.rand(()))
    replay, messages = toy_replay(place)
    assert isinstance(replay, FullReplay)
    assert len(messages) == 1


@pytest.mark.parametrize("beside", [False, True])
def test_calls_that_depend_on_the_values_later(beside):
    """For values that are far from all those of the trials."""

    def middle(net: Any, x: Tensor) -> Tensor:
        # What does not depend on the layer keeps the module from running as a whole.
        offset = net.empty(net.const) if beside else 0.0
        for _ in range(2 if float(x.max()) > 100 else 1):
            x = net.extra(x)
        return x + offset

    place = toy(middle)
    net: Any = place.detector
    net.const = torch.ones(1, 4, 1, 1)
    engine, messages = engine_of(place)
    with frozen(net), torch.no_grad():
        replay = engine.replay(place.forward, BODY, RAW, {})
        assert isinstance(replay, SuffixReplay)
        assert not replay.plan.batched  # each value chooses for itself
        assert not messages
        high = torch.full((1, 4, 8, 8), 200.0)
        expected = [
            (net.extra(net.extra(high)) + beside) * 2,
            (net.extra(high / 200) + beside) * 2,
        ]
        for _ in range(2):
            assert_near(replay.run(high), expected[:1])
        assert_near(replay.run(high / 200), expected[1:])
        assert_near(replay.run(torch.cat([high, high / 200])), [torch.cat(expected)])
        again = engine.replay(place.forward, BODY, RAW, {})
        if beside:
            (message,) = messages
            assert "depends on the values" in message
            assert isinstance(again, FullReplay)
        else:
            assert not messages
            assert isinstance(again, SuffixReplay)


def test_an_image_that_takes_another_way():
    """As regions of an image need not lie on all levels."""

    def middle(net: Any, x: Tensor) -> Tensor:
        for _ in range(net.times):
            x = net.extra(x)
        return x

    place = toy(middle)
    engine, messages = engine_of(place)
    with frozen(place.detector), torch.no_grad():
        for times in (1, 2, 1):
            vars(place.detector)["times"] = times
            recorded: dict = {}
            with removed(list(engine.attach_recording(recorded))):
                place.forward()
            replay = engine.replay(place.forward, BODY, RAW, recorded)
            assert isinstance(replay, SuffixReplay)
            assert_right(place, replay)
        assert not messages


def test_what_comes_after_the_raw_outputs_may_differ():
    place = toy(lambda net, x: net.extra(x))
    net = place.detector
    masks = 0

    def forward() -> None:
        inner()
        for _ in range(masks):
            net.alias(torch.zeros(1, 4, 1, 1))

    inner, place.forward = place.forward, forward
    engine, messages = engine_of(place)
    with frozen(net), torch.no_grad():
        engine.replay(forward, BODY, RAW, {})
        masks = 3
        trial = mock.patch.object(engine, "_plan", None)
        with trial:
            replay = engine.replay(forward, BODY, RAW, {})
        assert isinstance(replay, SuffixReplay)
    assert_right(place, replay)
    assert not messages


def test_no_influence():
    place = toy(lambda net, x: (net.extra(x), x + 1)[1])
    for path in ("extra", "empty"):
        with pytest.raises(ReplayError, match=path):
            toy_replay(place, ReplayTarget(CallKey(path, 0), ()))
    with pytest.raises(NoInfluenceError, match="extra has no influence on bbox_head"):
        toy_replay(place, ReplayTarget(CallKey("extra", 0), ()))
    with pytest.raises(ReplayError, match="no tensor at"):
        toy_replay(place, ReplayTarget(CallKey("body", 0), (1,)))


def test_half_precision_and_channels_last():
    family = build_family("yolov8")
    for dtype, layout in (
        (torch.bfloat16, torch.contiguous_format),
        (torch.float16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ):
        detector = copy.deepcopy(family.detector).to(dtype, memory_format=layout)
        inputs = family.inputs.to(dtype, memory_format=layout)

        place = Scene(detector, forward_of(detector, inputs, family.data_samples))
        target = ReplayTarget(CallKey("neck.bottom_up_layers.0", 0), ())
        engine, messages = engine_of(place)
        with frozen(detector), torch.no_grad():
            recorded, value = whole_forward(place, target)
            wanted = list(recorded)
            replay = engine.replay(place.forward, target, wanted, {})
            assert isinstance(replay, SuffixReplay)
            assert replay.plan.batched
            assert_near(replay.run(value), list(recorded.values()))
        assert not messages


@pytest.mark.parametrize("layer", ["backbone.layer1", "backbone.layer2.1.conv1"])
def test_operators_of_mmcv_in_batches(layer):
    """They take no layout in memory but one, and say nothing."""
    family = build_family("retinanet")
    detector: Any = copy.deepcopy(family.detector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = ModulatedDeformConv2dPack(128, 128, 3, padding=1)
        nn.init.normal_(conv.conv_offset.weight, std=0.05)
    detector.backbone.layer2[1].conv2 = conv.eval().requires_grad_(False)
    place = Scene(detector, forward_of(detector, family.inputs, family.data_samples))
    target = ReplayTarget(CallKey(layer, 0), ())
    engine, messages = engine_of(place)
    with frozen(detector), torch.no_grad():
        recorded, value = whole_forward(place, target)
        wanted = list(recorded)
        replay = engine.replay(place.forward, target, wanted, {})
        assert isinstance(replay, SuffixReplay)
        assert replay.plan.batched
        others = [value * factor for factor in (1.0, 0.8, 1.3)]
        found = replay.run(torch.cat(others))
        rows = [whole_forward(place, target, other)[0].values() for other in others]
        for output, values in zip(found, zip(*rows)):
            expected = torch.cat(values)
            difference = float((output - expected).abs().max())
            assert difference <= 1e-4 * float(expected.abs().max())
    assert not messages


def test_values_are_mapped_alike():
    """The tests' own helper and the package's agree on plain containers."""
    nest = {"a": [torch.ones(1), (torch.zeros(2),)]}
    one = map_values(nest, lambda t: t + 1)
    other = map_tensors(nest, lambda _, t: t + 1)
    assert str(one) == str(other)
