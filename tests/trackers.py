"""Reads back what each tracker keeps, with its own reader or from its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from tests import wandb_file

Kept = Iterator[tuple[str, int, "Image.Image"]]
"""Tag, step and picture."""


def local(work_dir: Path) -> Kept:
    for path in work_dir.rglob("vis_image/*.png"):
        tag, _, step = path.stem.rpartition("_")
        yield tag.replace(".", "/"), int(step), Image.open(path)


def tensorboard(work_dir: Path) -> Kept:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in work_dir.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            for event in events.Images(tag):
                picture = Image.open(BytesIO(event.encoded_image_string))
                yield tag, event.step, picture


def wandb(work_dir: Path) -> Kept:
    for file in sorted(work_dir.rglob("*.wandb")):
        for row in wandb_file.history_rows(file.parent):
            for tag in wandb_file.images(row):
                name, step = row[f"{tag}.caption"].split(" @ ")
                assert name == tag
                picture = Image.open(file.parent / "files" / row[f"{tag}.path"])
                yield tag, int(step), picture


def dvclive(work_dir: Path) -> Kept:
    (root,) = work_dir.rglob("plots/images")
    for path in root.rglob("*.png"):
        tag = path.parent.relative_to(root).as_posix()
        yield tag, int(path.stem), Image.open(path)


def mlflow(work_dir: Path) -> Kept:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work_dir}/mlflow.db")
    (run,) = client.search_runs(["0"])
    for artifact in client.list_artifacts(run.info.run_id, "images"):
        found = re.match(r"images/(.+)\+step\+(\d+)\+.*\.png", artifact.path)
        if found:
            path = client.download_artifacts(run.info.run_id, artifact.path)
            yield found[1].replace("~", "/"), int(found[2]), Image.open(path)


def neptune(work_dir: Path) -> Kept:
    from neptune.internal.operation import LogImages
    from neptune.internal.utils import base64_decode

    for path in work_dir.rglob("data-*.log"):
        for line in path.read_text().splitlines():
            operation = json.loads(line)["obj"]
            if operation["type"] == "LogImages":
                kept = LogImages.from_dict(operation)
                for entry in kept.values:
                    picture = Image.open(BytesIO(base64_decode(entry.value.data)))
                    yield "/".join(kept.path), int(entry.step), picture


def clearml(work_dir: Path) -> Kept:
    for path in work_dir.rglob("metrics.jsonl"):
        for line in path.read_text().splitlines():
            for event in json.loads(line):
                if event["type"] == "training_debug_image":
                    tag = f"{event['metric']}/{event['variant']}"
                    yield tag, event["iter"], Image.open(event["url"])


def aim(work_dir: Path) -> Kept:
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager

    # Its queries see only indexed runs, and `aim up` is what indexes otherwise.
    manager = RepoIndexManager(Repo(str(work_dir)))
    for run_hash in manager.repo.list_all_runs():
        manager.index(run_hash)
    for run in Repo(str(work_dir)).query_images("").iter_runs():
        for sequence in run:
            for step, (picture, *_) in sequence.data.items():
                yield sequence.name, step, picture.to_pil_image()


def swanlab(work_dir: Path) -> Kept:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    for path in work_dir.rglob("*.swanlab"):
        reader = DataStoreReader()
        reader.open(path)
        for data in reader:
            media = Record.FromString(data).media
            for item in media.value.items:
                picture = Image.open(path.parent / "media" / "image" / item.filename)
                yield media.key, media.step, picture
