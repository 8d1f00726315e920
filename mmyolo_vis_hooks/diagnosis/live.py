"""One image, asked again and again: its candidates are computed once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from logging import Logger

from torch import nn

from ..data.alignment import PlacedImage
from ..errors import VisError
from ..options import BoxAMOptions, DiagnosisOptions
from .candidates import Closing
from .diagnose import Diagnoser
from .look import Look
from .maps import ErrorMap, ErrorMapper
from .matching import GroundTruth


class LiveDetector:
    """Looks at images, and explains any candidate by any method.

    It may be asked by several threads: one is served at a time.

    Args:
        detector (nn.Module): The detector, without wrappers.
        class_names (Sequence[str]): Names of the classes.
        logger (Logger): Told what a user should know.
    """

    def __init__(
        self, detector: nn.Module, class_names: Sequence[str], logger: Logger
    ) -> None:
        self._closing = Closing.of(detector)
        quick = DiagnosisOptions(topk=0)
        self._diagnoser = Diagnoser(detector, quick, class_names, logger)
        names = tuple(class_names)
        self._mapper = cache(partial(ErrorMapper, detector, logger, class_names=names))
        self._lock = threading.Lock()

    def look(self, image: PlacedImage, truth: GroundTruth | None = None) -> Look:
        """Run the detector on an image, closed and opened.

        Arguments are those of :meth:`~.diagnose.Diagnoser.look`; ``truth`` is None
        where the objects are not known.
        """
        with self._lock:
            look = self._diagnoser.look(image, truth)
        return replace(look, closing=self._closing)

    def explain(
        self, look: Look, candidate: int, options: BoxAMOptions
    ) -> ErrorMap | None:
        """Explain a candidate; None where nothing has any influence on it.

        Args:
            look (Look): Of :meth:`look`.
            candidate (int): Index of a candidate.
            options (BoxAMOptions): Method, target and layers.

        Raises:
            VisError: If it cannot be explained.
        """
        if look.no_maps:
            raise VisError(look.no_maps)
        with self._lock:
            wanted = look.candidates.take([candidate])
            return self._mapper(options).maps(look, wanted, candidates=True).get(0)
