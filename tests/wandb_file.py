"""Reads the ``.wandb`` file of an offline run: LevelDB's log format, protobufs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER = 7
_BLOCK = 32768
_RECORD_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history_rows(work_dir: Path) -> list[dict[str, Any]]:
    """Rows of history of the only run below a folder."""
    rows = []
    for record in _finished_records(work_dir):
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                row[key] = json.loads(item.value_json)
            rows.append(row)
    return rows


def boxes(file: Path, row: dict[str, Any], tag: str) -> dict[str, list[dict]]:
    """Boxes of an image of a row, by their groups; ``file`` is the run's."""
    found = {}
    for key, path in row.items():
        if key.startswith(f"{tag}.boxes.") and key.endswith(".path"):
            data = json.loads((file.parent / "files" / path).read_text())
            found[key.split(".")[-2]] = data["box_data"]
    return found


def tables(work_dir: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Tables of the only run below a folder in their order, with rows by column."""
    found = []
    for record in _finished_records(work_dir):
        for entry in record.artifact.manifest.contents:
            if entry.path.endswith(".table.json"):
                table = json.loads(Path(entry.local_path).read_text())
                rows = [dict(zip(table["columns"], row)) for row in table["data"]]
                found.append((entry.path.removesuffix(".table.json"), rows))
    return found


def _finished_records(work_dir: Path) -> list[Any]:
    """All records, once W&B's own process has written the last one."""
    deadline = time.monotonic() + 30
    while True:
        (path,) = work_dir.rglob("*.wandb")
        records = []
        for payload in _payloads(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            records.append(record)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} was never finished"
        time.sleep(0.1)


def images(row: dict[str, Any]) -> set[str]:
    """Names of the images of a row, whose properties are stored one by one."""
    mark = "._type"
    return {
        key[: -len(mark)]
        for key, value in row.items()
        if key.endswith(mark) and value == "image-file"
    }


def _payloads(data: bytes):
    position, parts = _HEADER, []
    while position + _RECORD_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        start = position + _RECORD_HEADER
        parts.append(data[start : start + length])
        position = start + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
