"""Who was taken for whom, on one page: the faces side by side, with their cosines."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .page import data_uri, write_page


class Match(NamedTuple):
    """A face, and the face that it was compared with.

    Attributes:
        names: of the two images.
        faces: of both, (3, 112, 112) uint8 RGB.
        decision: who it is, or whether both are one person.
        cosine: what was compared with the threshold.
    """

    names: tuple[str, str]
    faces: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    decision: str
    cosine: float


def write_matches(
    file: Path, title: str, facts: Sequence[tuple[str, str]], matches: Sequence[Match]
) -> None:
    """Write a page that needs no other file and no network.

    Args:
        file: the page.
        title: its heading.
        facts: names and values in words, such as the threshold.
        matches: rows, in the order in which they are shown.
    """
    rows = [
        (match, [data_uri(Image.fromarray(face.transpose(1, 2, 0))) for face in match.faces])
        for match in matches
    ]
    write_page(file, "matches.html.jinja", title=title, facts=facts, rows=rows)
