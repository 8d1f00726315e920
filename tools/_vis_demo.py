"""What ``featmap_vis_demo.py`` and ``boxam_vis_demo.py`` share."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
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
    merge_options,
    run_tool,
)
from _layers import print_layers
from mmyolo_vis_hooks.data.alignment import Placement, choose_alignment, network_input
from mmyolo_vis_hooks.data.overlap import read_ahead, run_behind
from mmyolo_vis_hooks.data.pipeline import ImagePipeline, Loaded
from mmyolo_vis_hooks.data.resize import network_divisor, network_stride
from mmyolo_vis_hooks.data.sources import ImageSource, SourceImage
from mmyolo_vis_hooks.detector import (
    DatasetInfo,
    build_detector,
    build_pipeline,
    check_device,
    classes_and_palette,
    load_weights,
    read_config,
    read_dataset,
)
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.publish.entries import page_entry
from mmyolo_vis_hooks.publish.files import (
    PICTURE_SUFFIXES,
    make_writable,
    write_image,
)
from mmyolo_vis_hooks.publish.html_page import HtmlPage, open_folder
from mmyolo_vis_hooks.publish.window import why_no_window
from mmyolo_vis_hooks.samples import SampleMaker

OUT_DIR = "./output"
_TIMEOUT = 60.0

logger = logging.getLogger("mmyolo_vis_hooks")


def make_demo_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with what both tools take, but for the options of pictures."""
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
    parser.add_argument(
        "--device",
        default="cuda:0" if torch.cuda.is_available() else "cpu",
        help="where the network runs: cuda:0 is the first GPU",
    )
    add_cfg_options(parser)
    return parser


def run_demo(main: Callable[[], None]) -> None:
    """Run a tool as :func:`run_tool` does; Ctrl-C ends it with one word."""
    # An address that never answers would hang for ever.
    socket.setdefaulttimeout(_TIMEOUT)
    # What is loaded from where, as the log of a training says it.
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    try:
        run_tool(main)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells report it


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "(default" in text or action.default in (None, False):
            return text
        return super()._get_help_string(action)


@dataclass
class Demo:
    """One run of a tool, from checked arguments to a network that is ready.

    Attributes:
        args: The command line.
        config: The detector's config, with the settings of the command line.
        source: The images.
        dataset: What the config says of the test data.
        device: Where the network runs.
        pipeline: The config's test pipeline.
        placement: How the images are drawn, and what they go through.
        class_names: Of the weights, or else of the config.
        palette: Colours of the classes.
        failures: Images that could not be drawn, and why.
    """

    args: argparse.Namespace
    config: Config
    source: ImageSource
    dataset: DatasetInfo
    device: torch.device
    pipeline: ImagePipeline
    placement: Any = None
    class_names: tuple[str, ...] = ()
    palette: Any = None
    failures: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Demo:
        """Check everything that needs no network.

        Raises:
            ToolError, VisError: With what is wrong and the remedy.
        """
        if args.out_dir is None and args.out_file is None and not args.show:
            args.out_dir = OUT_DIR
        source = ImageSource(args.img, exclude=args.out_dir)
        if args.out_file is not None:
            _check_out_file(args.out_file, source, args.img)
        problem = why_no_window() if args.show else None
        if problem:
            raise ToolError(
                f"--show opens windows, and {problem}; leave it out and look at the "
                "files in --out-dir"
            )
        config = read_config(args.config)
        merge_options(config, args.cfg_options)
        with config_mistakes(args.config):
            dataset = read_dataset(config)
            pipeline = build_pipeline(config, dataset, channels=args.image_channels)
        device = check_device(args.device)
        demo = cls(args, config, source, dataset, device, pipeline)
        next(demo._first_images())  # or there is nothing to build a network for
        if not args.preview_model:
            check_checkpoint(args.checkpoint, "checkpoint")
            if args.out_dir is not None:
                _check_inputs_stay(args.img, args.out_dir)
                open_folder(args.out_dir)
            if args.out_file is not None:
                make_writable(Path(args.out_file).parent)
        return demo

    def build(self) -> nn.Module:
        """Build the detector, check the layers, and load the weights.

        Raises:
            VisError: If a layer is unknown, or the weights do not fit.
            ToolError: If the weights cannot be read.
        """
        with config_mistakes(self.args.config):
            detector = build_detector(self.config, self.device)
            self.placement = self._place(detector)
        if not self.args.preview_model:
            resolve_layers(detector, self.args.target_layers or ())
        metainfo: Any = {}
        if not self.args.preview_model:
            checkpoint = self.args.checkpoint
            try:
                metainfo = load_weights(detector, checkpoint)
            except OSError as error:  # those of addresses derive from it, too
                raise ToolError(
                    f"the checkpoint {checkpoint} cannot be read: {error}"
                ) from error
        self.class_names, self.palette = classes_and_palette(
            metainfo, self.dataset.metainfo
        )
        return detector

    def preview(self, detector: nn.Module) -> None:
        """Print the layers, with the shapes for the first image."""
        print_layers(detector, self.placement.pipeline, next(self._first_images()))

    def try_on_first(self, maker: SampleMaker, detector: nn.Module) -> None:
        """Let what can never work fail before the first picture.

        Raises:
            VisError: With the reason.
        """
        try:
            data = self.placement.pipeline.pack(next(self._first_images()))
            maker.prepare(*network_input(detector, data))
        except VisError:
            raise
        except Exception as error:
            # Perhaps it is this image only; each says for itself what fails.
            logger.debug(f"the trial before the first image: {error}")

    def _place(self, detector: nn.Module) -> Placement:
        placement = choose_alignment(
            self.args.alignment,
            self.pipeline,
            self._first_images(),
            detector,
            divisor=network_divisor(detector),
            stride=network_stride(detector, self.dataset),
        )
        if placement.reason:
            print(
                "note: the pictures show the network's own input, as with --alignment "
                f"network: {placement.reason}",
                file=sys.stderr,
            )
        return placement

    def _first_images(self) -> Iterator[Loaded]:
        """Images that can be read, one after the other; the error if none can."""
        error: Exception | None = None
        num_loaded = 0
        for number, image in enumerate(self.source):
            try:
                yield load_image(self.pipeline, number, image)
                num_loaded += 1
            except VisConfigError:
                raise
            except VisError as failure:
                error = error or failure
        if error is not None and not num_loaded:
            raise error

    def run(self, maker: SampleMaker, panel: Any) -> int:
        """Make a picture of every image.

        Args:
            maker: Makes the samples that the panel draws.
            panel: Has ``overlay_maps`` and can be called.

        Returns:
            int: Status of the process: 1 if an image failed.

        Raises:
            KeyboardInterrupt: At Ctrl-C, once what was finished is on the page.
        """
        page = None
        if self.args.out_dir is not None:
            page = HtmlPage(
                self.args.out_dir,
                title=f"{self.args.title} · {os.path.basename(self.args.config)}",
                colormap=panel.options.colormap,
                fade=self.args.fade,
                alpha=panel.options.alpha,
            )
        done = 0
        interrupted = False
        try:
            # The threads of NumPy's small products wait for each other while the
            # network has the cores.
            with (
                _progress(len(self.source)) as advance,
                threadpool_limits(limits=1, user_api="blas"),
                closing(self._pictures(maker, panel, page)) as pictures,
            ):
                for picture in pictures:
                    advance()
                    done += picture is not None
                    if self.args.show and picture is not None:
                        Visualizer().show(picture.image_rgb, win_name=picture.name)
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

    def _pictures(
        self, maker: SampleMaker, panel: Any, page: HtmlPage | None
    ) -> Generator[_Picture | None, None, None]:
        """Finished pictures, in the order of the images; None for one that failed."""

        def loaded() -> Iterator[tuple[int, SourceImage, Any]]:
            for number, image in enumerate(self.source):
                try:
                    yield number, image, load_image(self.pipeline, number, image)
                except Exception as error:  # of a step of the pipeline
                    yield number, image, error

        def work() -> Iterator[Callable[[], tuple[SourceImage, Any]]]:
            for number, image, result in read_ahead(loaded()):
                if not isinstance(result, Exception):
                    try:
                        name = image.name
                        if page is not None:
                            name = page.files.free_name(name)
                        result = maker.run(name, result, self.placement)
                    except Exception as error:
                        result = error
                yield partial(self._finish, number, image, result, panel, page)

        any_drawn = False
        for image, result in run_behind(work()):
            if isinstance(result, Exception):
                mistakes = (VisConfigError, FeatureShapeError)
                if isinstance(result, mistakes) and not any_drawn:
                    raise result  # it will be the same for every image
                self._failed(image, result)
                yield None
            else:
                any_drawn = True
                yield result

    def _finish(
        self,
        number: int,
        image: SourceImage,
        sample: Any,
        panel: Any,
        page: HtmlPage | None,
    ) -> tuple[SourceImage, _Picture | Exception]:
        """Draw, encode and write one picture; runs beside the network."""
        if isinstance(sample, Exception):
            return image, sample
        try:
            picture_rgb = panel(sample)
            file = self.args.out_file
            if file is not None:
                write_image(file, picture_rgb)
            elif page is not None:
                file = str(page.write_picture(sample.image_id, picture_rgb))
            if page is not None:
                picture = os.path.relpath(file, self.args.out_dir)
                entry = page_entry(
                    sample, panel, self.class_names, picture, number, image.title
                )
                page.add(entry)
        except Exception as error:
            return image, error
        # Windows are opened by the main thread.
        return image, _Picture(image.title, picture_rgb if self.args.show else None)

    def _failed(self, image: SourceImage, error: Exception) -> None:
        logger.debug(f"{image.title} failed", exc_info=error)
        message = str(error) or type(error).__name__
        if not isinstance(error, (VisError, OSError)):
            message = f"{type(error).__name__}: {message}"
        self.failures.append((image.title, message.splitlines()[0]))

    def _report(self, done: int) -> int:
        console = Console(stderr=True)
        count = "1 picture" if done == 1 else f"{done} pictures"
        text = ""
        if done and self.args.out_dir is not None:
            page = os.path.join(self.args.out_dir, "index.html")
            text = f"{count} in {self.args.out_file or self.args.out_dir}; open {page}"
        elif done and self.args.out_file is not None:
            text = f"{count}: {self.args.out_file}"
        if text:
            console.print(text, highlight=False, soft_wrap=True, markup=False)
        for title, message in self.failures:
            text = message if title in message else f"{title}: {message}"
            print(f"error: {text}", file=sys.stderr)
        if self.failures:
            print(
                f"error: {len(self.failures)} of {done + len(self.failures)} images "
                "could not be drawn",
                file=sys.stderr,
            )
        return 1 if self.failures else 0


@dataclass(frozen=True)
class _Picture:
    name: str
    image_rgb: Any


def load_image(pipeline: ImagePipeline, number: int, image: SourceImage) -> Loaded:
    """Load an image of a source through the steps that load.

    Raises:
        VisError: If it cannot be read.
    """
    if image.content is None:
        raise image.error or VisError(f"there is no image {image.title}")
    return pipeline.load(image.content, img_id=number, img_path=image.title)


class _progress:
    """A bar for more than one image; gives the function that moves it on."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=total < 2,
        )

    def __enter__(self) -> Callable[[], None]:
        self._bar.start()
        task = self._bar.add_task("images", total=self._total)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            # The header of a video may promise too few frames.
            self._bar.update(task, completed=done, total=max(done, self._total))

        return advance

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()


def _check_out_file(file: str, source: ImageSource, images: Sequence[str]) -> None:
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
    if os.path.realpath(file) in map(os.path.realpath, images):
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
