"""What ``featmap_vis_demo.py`` and ``boxam_vis_demo.py`` share."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from threadpoolctl import threadpool_limits
from torch import nn

from _common import (
    ToolError,
    add_cfg_options,
    check_checkpoint,
    config_mistakes,
    print_layers,
    read_merged,
    run_tool,
)
from _dataset import add_device
from mmyolo_vis_hooks.data.alignment import (
    PlacedImage,
    Placement,
    choose_alignment,
    first_loaded,
)
from mmyolo_vis_hooks.data.overlap import read_ahead, run_behind
from mmyolo_vis_hooks.data.pipeline import ImagePipeline, Loaded
from mmyolo_vis_hooks.data.sources import ImageSource, SourceImage
from mmyolo_vis_hooks.declare import Options, add_arguments, options_from
from mmyolo_vis_hooks.detector import (
    build_detector,
    build_pipeline,
    check_device,
    classes_and_palette,
    load_weights,
    read_dataset,
)
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.publish.files import (
    PICTURE_SUFFIXES,
    make_writable,
    write_image,
)
from mmyolo_vis_hooks.publish.html_page import HtmlPage, open_folder
from mmyolo_vis_hooks.publish.window import why_no_window
from mmyolo_vis_hooks.samples import SampleMaker, make_sample_maker

OUT_DIR = "./output"

logger = logging.getLogger("mmyolo_vis_hooks")


def make_demo_parser(description: str, kind: type[Options]) -> argparse.ArgumentParser:
    """Make a parser with what both tools take, and with options of what is drawn."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=_HelpFormatter
    )
    parser.add_argument(
        "img",
        nargs="+",
        help="images, videos, folders (with all folders in them) or addresses",
    )
    parser.add_argument(
        "config",
        help="config file of the detector, or mmyolo::FOLDER/FILE.py for one that "
        "MMYOLO brings (mmdet:: likewise)",
    )
    parser.add_argument("checkpoint", help="its weights, a path or an address")
    parser.add_argument(
        "--preview-model",
        action="store_true",
        help="list the layers with the shapes that the first image gives, and end",
    )
    parser.add_argument(
        "--out-dir",
        help="folder of the pictures and of index.html, a page to look through them "
        f"(default: {OUT_DIR}, unless --out-file or --show is given)",
    )
    parser.add_argument("--out-file", help="file of the picture, for a single image")
    parser.add_argument(
        "--show",
        action="store_true",
        help="show each picture in a window and wait for a key",
    )
    add_device(parser)
    add_cfg_options(parser)
    add_arguments(parser, kind)
    return parser


def run_demo(main: Callable[[], None]) -> None:
    """Run a tool as :func:`run_tool` does, with fewer words."""
    # What is loaded from where, as the log of a training says it.
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    run_tool(main)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "(default" in text or action.default in (None, False):
            return text
        return super()._get_help_string(action)


def look(
    args: argparse.Namespace,
    kind: type[Options],
    panel_kind: Any,
    *,
    title: str,
) -> None:
    """Do what both tools do, from the command line to the status of the process.

    The panel draws what the kind of options asks for; the page has the title.
    """
    demo = Demo(args, kind)
    detector = demo.build()
    if args.preview_model:
        print_layers(detector, demo.placement.pipeline, next(demo.first_images()))
        return
    # Two bars at once would overwrite each other.
    single = len(demo.source) == 1
    maker = make_sample_maker(
        detector, demo.options, demo.class_names, logger, show_progress=single
    )
    demo.try_on_first(maker)
    panel = panel_kind(demo.options, demo.class_names, demo.palette)
    sys.exit(demo.run(maker, panel, title=title))


class Demo:
    """One run of a tool; checks at first everything that needs no network."""

    options: Any
    placement: Any
    class_names: tuple[str, ...]
    palette: Any

    def __init__(self, args: argparse.Namespace, kind: type[Options]) -> None:
        if args.out_dir is None and args.out_file is None and not args.show:
            args.out_dir = OUT_DIR
        self.args = args
        self.config = read_merged(args.config, args)
        # Not before: what the config imports may register a method or a target.
        self.options = options_from(args, kind)
        self.source = ImageSource(args.img, exclude=args.out_dir)
        if args.out_file is not None:
            _check_out_file(args.out_file, self.source)
        problem = why_no_window() if args.show else None
        if problem:
            raise ToolError(
                f"--show opens windows, and {problem}; leave it out and look at the "
                "files in --out-dir"
            )
        channels = self.options.image_channels
        with config_mistakes(args.config):
            self.dataset = read_dataset(self.config)
            self.pipeline = build_pipeline(self.config, self.dataset, channels=channels)
        self._device = check_device(args.device)
        self._failures: list[str] = []
        next(self.first_images())  # or there is nothing to build a network for
        if args.preview_model:
            return
        check_checkpoint(args.checkpoint, "checkpoint")
        if args.out_dir is not None:
            _check_inputs_stay(args.img, args.out_dir)
            open_folder(args.out_dir)
        if args.out_file is not None:
            make_writable(Path(args.out_file).parent)

    def build(self) -> nn.Module:
        """Build the detector, check the layers, and load the weights."""
        with config_mistakes(self.args.config):
            detector = build_detector(self.config, self._device)
            self.placement = self._place(detector)
        metainfo: Any = {}
        if not self.args.preview_model:
            resolve_layers(detector, self.options.target_layers or ())
            metainfo = load_weights(detector, self.args.checkpoint)
        self.class_names, self.palette = classes_and_palette(
            metainfo, self.dataset.metainfo
        )
        return detector

    def _place(self, detector: nn.Module) -> Placement:
        placement = choose_alignment(
            self.options.alignment,
            self.pipeline,
            self.first_images(),
            detector,
            self.dataset,
        )
        if placement.reason:
            print(
                "note: the pictures show the network's own input, as with --alignment "
                f"network: {placement.reason}",
                file=sys.stderr,
            )
        return placement

    def first_images(self) -> Iterator[Loaded]:
        """Images that can be read, one after the other; the error if none can."""
        return first_loaded(
            partial(load_image, self.pipeline, number, image)
            for number, image in enumerate(self.source)
        )

    def try_on_first(self, maker: SampleMaker) -> None:
        """Let what can never work fail before the first picture."""
        try:
            maker.prepare(
                PlacedImage("trial", next(self.first_images()), self.placement)
            )
        except VisError:
            raise
        except Exception as error:
            # Perhaps it is this image only; each says for itself what fails.
            logger.debug(f"the trial before the first image: {error}")

    def run(self, maker: SampleMaker, panel: Any, *, title: str) -> int:
        """Make a picture of every image; gives the status of the process."""
        page = None
        if self.args.out_dir is not None:
            page = HtmlPage(
                self.args.out_dir,
                title=f"{title} · {os.path.basename(self.args.config)}",
                colormap=panel.colormap,
                fade=panel.fades,
                alpha=self.options.alpha,
            )
        done, interrupted = 0, False
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=len(self.source) < 2,
        )
        task = bar.add_task("images", total=len(self.source))
        try:
            # The threads of NumPy's small products wait for each other while the
            # network has the cores.
            with (
                bar,
                threadpool_limits(limits=1, user_api="blas"),
                closing(run_behind(self._work(maker, panel, page))) as pictures,
            ):
                for number, (image, picture_rgb) in enumerate(pictures, start=1):
                    # The header of a video may promise too few frames.
                    total = max(number, len(self.source))
                    bar.update(task, completed=number, total=total)
                    if isinstance(picture_rgb, Exception):
                        hopeless = (VisConfigError, FeatureShapeError)
                        if isinstance(picture_rgb, hopeless) and not done:
                            raise picture_rgb  # it will be the same for every image
                        self._failed(image, picture_rgb)
                        continue
                    done += 1
                    if self.args.show:  # windows are opened by the main thread
                        Visualizer().show(picture_rgb, win_name=image.title)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # What is there can be looked at, also after Ctrl-C.
            if page is not None and len(page):
                page.write()
        # Some may be written that the loop has not come to.
        status = self._report(done if page is None else len(page))
        if interrupted:
            raise KeyboardInterrupt
        return status

    def _work(
        self, maker: SampleMaker, panel: Any, page: HtmlPage | None
    ) -> Iterator[Callable[[], tuple[SourceImage, Any]]]:
        """What is left to do once the network has seen an image, image by image.

        An error takes the place of what failed: no image stops another.
        """

        def loaded() -> Iterator[tuple[int, SourceImage, Any]]:
            for number, image in enumerate(self.source):
                yield number, image, _attempt(load_image, self.pipeline, number, image)

        def run(name: str, content: Loaded) -> Any:
            return maker.run(PlacedImage(name, content, self.placement))

        def draw(number: int, image: SourceImage, sample: Any) -> Any:
            picture_rgb = panel(sample)
            file = self.args.out_file
            if file is not None:
                write_image(file, picture_rgb)
            elif page is not None:
                file = page.write_picture(sample.image_id, picture_rgb)
            if page is not None:
                path = os.path.relpath(file, self.args.out_dir)
                texts = dict(name=sample.image_id, title=image.title, picture=path)
                page.add(sample, panel, order=number, **texts)
            return picture_rgb if self.args.show else None

        def finish(
            number: int, image: SourceImage, sample: Any
        ) -> tuple[SourceImage, Any]:
            return image, _attempt(draw, number, image, sample)

        for number, image, content in read_ahead(loaded()):
            name = image.name if page is None else page.files.free_name(image.name)
            sample = _attempt(run, name, content)
            yield partial(finish, number, image, sample)

    def _failed(self, image: SourceImage, error: Exception) -> None:
        logger.debug(f"{image.title} failed", exc_info=error)
        text = str(error) or type(error).__name__
        if not isinstance(error, (VisError, OSError)):
            text = f"{type(error).__name__}: {text}"
        text = text.splitlines()[0]
        self._failures.append(text if image.title in text else f"{image.title}: {text}")

    def _report(self, done: int) -> int:
        count = "1 picture" if done == 1 else f"{done} pictures"
        folder, file = self.args.out_dir, self.args.out_file
        lines = []
        if done and folder is not None:
            page = os.path.join(folder, "index.html")
            lines = [f"{count} in {file or folder}; open {page}"]
        elif done and file is not None:
            lines = [f"{count}: {file}"]
        lines += [f"error: {text}" for text in self._failures]
        if failed := len(self._failures):
            lines.append(
                f"error: {failed} of {done + failed} images could not be drawn"
            )
        for line in lines:
            print(line, file=sys.stderr)
        return 1 if self._failures else 0


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, or what it raises; an error among its arguments too."""
    for value in args:
        if isinstance(value, Exception):
            return value
    try:
        return function(*args)
    except Exception as error:  # of a step of the pipeline, of a detector, of a disk
        return error


def load_image(pipeline: ImagePipeline, number: int, image: SourceImage) -> Loaded:
    """Load an image of a source through the steps that load."""
    return pipeline.load(image.read(), img_id=number, img_path=image.title)


def _check_out_file(file: str, source: ImageSource) -> None:
    if len(source) > 1 or source.has_videos:
        raise ToolError(
            f"--out-file {file} is for one image, and there are {len(source)}; use "
            "--out-dir, where each has a file of its own"
        )
    if os.path.splitext(file)[1].lower() not in PICTURE_SUFFIXES:
        raise ToolError(
            f"--out-file {file}: its suffix must say the format, one of "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )
    if os.path.isdir(file):
        raise ToolError(f"--out-file {file} is a folder; use --out-dir for one")
    (image,) = (str(image.content) for image in source)
    if all(map(os.path.isfile, (file, image))) and os.path.samefile(file, image):
        raise ToolError(f"--out-file {file} is the image itself; give another file")


def _check_inputs_stay(images: Sequence[str], folder: str) -> None:
    """Make sure that no picture gets the name of an image that is still needed."""
    target = os.path.realpath(folder)
    for image in images:
        path = os.path.realpath(image)
        is_there = os.path.dirname(path) == target and path.lower().endswith(".jpg")
        if path == target or (os.path.isfile(path) and is_there):
            raise ToolError(
                f"--out-dir {folder} is where {image} lies, which a picture might "
                "overwrite; give another folder"
            )
