"""Replays of real detectors compared with whole forwards."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

from mmyolo_vis_hooks.network.nested import OutputKey
from mmyolo_vis_hooks.network.partial import ReplayTarget
from mmyolo_vis_hooks.network.state import frozen
from mmyolo_vis_hooks.network.trace import CallKey, ReplayError
from tests.families import build_family
from tests.test_network.replays import (
    Scene,
    assert_near,
    counted_calls,
    engine_of,
    replay_of,
    scene_of,
    whole_forward,
)

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


def wanted_of(name: str, recorded: dict, changed: dict) -> list[OutputKey]:
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
    key = OutputKey("bbox_head", 0, (0,))
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
    scores = [OutputKey("bbox_head", 0, (0, 1))]
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
    wanted = [OutputKey("bbox_head", 0, (0, 0))]
    with frozen(detector), torch.no_grad():
        replay_of(engine, first, target, wanted)
        expected, value = whole_forward(second, target)
        replay = replay_of(engine, second, target, wanted)
        for _ in range(2):
            assert_near(replay.run(value), [expected[key] for key in wanted])
    assert not messages


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
    wanted = [OutputKey("bbox_head", 0, (0, 0))]
    engine, _ = engine_of(place)
    with frozen(detector), torch.no_grad():
        _, value = whole_forward(place, target)
        replay = replay_of(engine, place, target, wanted)
        assert replay.batch_size() > 1
        others = [value * factor for factor in (1.0, 0.8, 1.3)]
        rows = [whole_forward(place, target, v)[0][wanted[0]] for v in others]
        assert_near(replay.run(torch.cat(others)), [torch.cat(rows)])
