"""Images of files, folders, addresses and videos, whole and damaged."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.data.sources import (
    ImageReadError,
    ImageSource,
    SourceImage,
)
from mmyolo_vis_hooks.publish.files import OwnFiles

NUM_FRAMES = 12


def picture(value: int = 100, size_hw: tuple[int, int] = (12, 20)) -> np.ndarray:
    return np.full((*size_hw, 3), value, np.uint8)


def write(path: Path, value: int = 100) -> Path:
    """Write an image whose grey level tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, content = cv2.imencode(path.suffix, picture(value))
    path.write_bytes(content.tobytes())
    return path


def names(source: ImageSource) -> list[str]:
    return [image.name for image in source]


def file_names(source: ImageSource, folder: Path) -> list[str]:
    """Those that the pictures of a source get."""
    files = OwnFiles(folder, "assets")
    return [files.free_name(name) for name in names(source)]


def level(image: SourceImage) -> int:
    content = image.content
    if isinstance(content, str):
        content = cv2.imdecode(np.fromfile(os.fsencode(content), np.uint8), 1)
    assert content is not None, image.error
    return round(float(content.mean()))


def test_the_folder_of_the_results_is_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    write(tmp_path / "output" / "a.jpg")
    write(tmp_path / "output" / "deeper" / "a.jpg")
    write(tmp_path / "output2" / "a.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    expected = ["a", "output2_a"]
    assert names(ImageSource([str(tmp_path)], str(tmp_path / "output"))) == expected
    monkeypatch.chdir(tmp_path)
    assert names(ImageSource(["."], "./output/")) == expected
    assert names(ImageSource([str(tmp_path)], "output")) == expected
    assert len(ImageSource([str(tmp_path)], "not_there_yet")) == 4
    # Who names it means it.
    assert names(ImageSource(["output"], "output")) == ["a", "deeper_a"]
    (tmp_path / "linked").symlink_to("output")
    assert names(ImageSource(["."], "linked")) == expected
    (tmp_path / "notes").mkdir()
    for missing, message in (
        ("missing.png", r"there is no image.* missing\.png"),
        ("notes", r"holds no image .*\.jpg.*\.mp4"),
    ):
        with pytest.raises(ImageReadError, match=message):
            ImageSource(["a.png", missing])


def test_files_of_one_name_get_names_that_no_file_system_takes_for_the_same(tmp_path):
    for name in ("a.png", "A.png", "a.jpg", "x/a.png", "x_a.png", "a-2.png", "X/A.png"):
        write(tmp_path / name)
    paths = [str(tmp_path), str(tmp_path / "a.png")]

    def given() -> list[str]:
        return file_names(ImageSource(paths), tmp_path / "out")

    assert len({name.lower() for name in given()}) == 8
    assert given() == given()


HOSTILE = (
    "Grüße.png",
    "犬と猫.png",
    "a b\tc.png",
    "<script>alert(1)<script>.png",
    "'; rm -rf x.png",
    "100%.png",
    "a#b?c=d&e.png",
    "-rf.png",
)


def test_hostile_names_make_harmless_file_names(tmp_path):
    for i, name in enumerate(HOSTILE):
        write(tmp_path / name, 10 * i)
    found = list(ImageSource([str(tmp_path)]))
    assert len(found) == len({image.name for image in found}) == len(HOSTILE)
    for image in found:
        number = HOSTILE.index(os.path.basename(image.title))
        assert level(image) == 10 * number
        assert all(c.isalnum() or c in "_-" for c in image.name), image.name
    assert {"Grüße", "犬と猫", "100_"} <= {image.name for image in found}


def test_names_that_are_no_unicode(tmp_path):
    """Linux takes any bytes; what is printed or put into a page must be text."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    write(tmp_path / "cafe.png", 40).rename(os.fsdecode(path))
    (image,) = ImageSource([str(tmp_path)])
    assert image.name == "caf_"
    assert level(image) == 40
    image.title.encode()


def test_long_names_fit_file_systems(tmp_path):
    folder = "犬" * 66
    for name in ("a.png", "b.png"):
        write(tmp_path / folder / folder / name)
    found = names(ImageSource([str(tmp_path)]))
    assert [name[-2:] for name in found] == ["_a", "_b"]
    for name in found:
        # The number of a frame and the suffix come behind it.
        (tmp_path / f"{name}_000000.jpg.part").write_text("")


def test_addresses():
    paths = {
        "/folder/dog.png": "dog",
        "/dog.png?size=large&of=cat.jpg": "dog",
        "/a%20dog%2Bcat.png": "a_dog_cat",
        "/proxy.png?url=https://example.org/a.png": "proxy",
        "/no_suffix": "no_suffix",
        "": "example_org",
    }
    urls = [f"https://example.org{path}" for path in paths]
    images = list(ImageSource(urls))
    assert [image.name for image in images] == list(paths.values())
    assert [image.title for image in images] == urls
    assert [image.content for image in images] == urls  # loaders read them


CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mpg": "MPG2", ".wmv": "WMV2"}


def write_video(
    path: Path,
    num_frames: int = NUM_FRAMES,
    noise: int = 0,
    size_hw: tuple[int, int] = (48, 64),
) -> Path:
    """Write frames that get brighter, and are harder to pack with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix.lower()])
    video = cv2.VideoWriter(str(path), codec, 10, size_hw[::-1])
    if not video.isOpened():
        pytest.skip(f"this OpenCV writes no {path.suffix}")
    rng = np.random.default_rng(0)
    for i in range(num_frames):
        frame = picture((240 - noise) // num_frames * i, size_hw)
        video.write(frame + rng.integers(0, noise + 1, frame.shape, np.uint8))
    video.release()
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".AVI"])
def test_frames_come_in_their_order(tmp_path, suffix):
    path = write_video(tmp_path / f"clip{suffix}")
    source = ImageSource([str(path)])
    assert len(source) == NUM_FRAMES
    assert source.has_videos
    images = list(source)
    assert [image.name for image in images] == [
        f"clip_{i:06d}" for i in range(NUM_FRAMES)
    ]
    assert images[3].title == f"{path} frame 3"
    assert np.abs([level(im) - 20 * i for i, im in enumerate(images)]).max() <= 6
    assert images[0].content.shape == (48, 64, 3)


def test_the_first_frames_of_mpeg_come_too(tmp_path):
    """A seek to frame 0 leaves them out."""
    path = write_video(tmp_path / "clip.mpg", 24, noise=120, size_hw=(96, 128))
    levels = [level(image) - 60 for image in ImageSource([str(path)])]
    assert levels == pytest.approx([5 * i for i in range(24)], abs=6)


def test_videos_and_images_together(tmp_path):
    """Names that meet, marks of addresses, and files that are none."""
    for name in ("clip.avi", "a?b=c.png&d.avi", "sub/clip.avi", "later.avi"):
        write_video(tmp_path / name, 3)
    # Of one the image comes before the video of its name, of one behind it.
    for name in ("CLIP_000002.png", "later_000001.png", "a?b.mp4&c.png"):
        write(tmp_path / name)
    (tmp_path / "none.mp4").write_bytes(b"no video at all")
    broken = write_video(tmp_path / "z.avi")
    content = broken.read_bytes()
    start = content.index(b"movi") + 4
    broken.write_bytes(content[:start] + bytes(len(content) - start))
    found = list(ImageSource([str(tmp_path)]))
    given = file_names(ImageSource([str(tmp_path)]), tmp_path / "out")
    assert len({name.lower() for name in given}) == len(found) == 4 * 3 + 3 + 2
    errors = {image.name: str(image.error) for image in found if image.content is None}
    assert set(errors) == {"none", "z"}
    assert "none.mp4" in errors["none"]
    assert "holds no frame" in errors["z"]
    assert not ImageSource([str(tmp_path / "a?b.mp4&c.png")]).has_videos
    with pytest.raises(ImageReadError, match=r"none\.mp4 is no video"):
        ImageSource([str(tmp_path / "none.mp4")])


def cut(path: Path, share: float = 0.6) -> Path:
    """Leave the first part of a file only, as an interrupted copy does."""
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * share)])
    return path


def test_a_video_that_was_cut_short_says_where_it_ends(tmp_path):
    path = cut(write_video(tmp_path / "clip.avi", noise=120))
    *frames, last = ImageSource([str(path)])
    assert 4 <= len(frames) < NUM_FRAMES
    assert all(frame.content is not None for frame in frames)
    assert last.content is None
    until = f"ends with frame {len(frames) - 1}, after 0.{len(frames) - 1} of the 1.2 s"
    assert str(last.error).startswith(f"{path} {until}")


def test_the_header_of_a_cut_video_may_hold_nonsense(tmp_path):
    path = cut(write_video(tmp_path / "clip.wmv", noise=120))
    source = ImageSource([str(path)])
    assert len(source) == 1  # the number in the header is far below zero
    assert len(list(source)) > 1


def test_a_video_whose_name_is_no_unicode_is_refused(tmp_path):
    path = write_video(tmp_path / "clip.avi").rename(tmp_path / "cl\udcffip.avi")
    with pytest.raises(ImageReadError, match=r"cl.ip\.avi is no video"):
        ImageSource([str(path)])


def test_frames_are_not_kept_alive(tmp_path):
    write_video(tmp_path / "clip.avi")
    references = []
    for image in ImageSource([str(tmp_path)]):
        # The decoder's own buffer may hold the last one.
        assert sum(reference() is not None for reference in references) <= 1
        references.append(weakref.ref(image.content))
        del image
    assert len(references) == NUM_FRAMES
