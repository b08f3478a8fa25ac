"""What all pictures share: how configurations are told apart, and how a figure becomes files.

    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for name, style in styles(names).items():
        axes.plot(budgets, scores[name], **style.line())
    legend_below(figure, handles, names)
    save_figure(figure, folder, free_name("scores", taken))      # folder/scores.png and folder/scores.svg

Names of methods are data: none is ever read as mathematics, and long ones are broken.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from kvfactory.errors import UserError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Of Okabe and Ito, which most eyes can tell apart; the eighth, black, is for what others are compared with."""
BLACK = "#000000"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: tuple[Any, ...] = ("-", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
COLOUR_MAP = "viridis"
"""Of every picture whose colour is a number."""

DISTANCES = np.repeat([9, 20, 32, 48, 64, 84, 104], 16)[:, None]
"""How far from its point a label may stand, in points; nearer ones first."""
_ANGLES = np.radians([0, 180, 45, 135, -45, -135, 90, -90, 20, 160, -20, -160, 70, 110, -70, -110] * 7)
AWAY = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)])
"""And in which direction."""

MOST_NAMED = 40
"""Tokens of a prompt whose texts an axis has room for."""
KINDS = ("png", "svg")
DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Style:
    """How one configuration looks wherever it is drawn."""

    colour: str
    marker: str
    dashes: Any

    def points(self, hollow: bool = False) -> dict[str, Any]:
        """Arguments for its markers alone."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": "white" if hollow else self.colour,
            "markeredgecolor": self.colour if hollow else "#404040",
            "markeredgewidth": 1.5 if hollow else 0.5,
            "linestyle": "none",
        }

    def line(self) -> dict[str, Any]:
        """Arguments for its line and markers."""
        return self.points() | {"linestyle": self.dashes}


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, in their order: no two of 315 look the same, nor two of nine without colour."""
    return {
        name: Style(
            PALETTE[number % len(PALETTE)],
            MARKERS[number % len(MARKERS)],
            LINES[number // len(PALETTE) % len(LINES)],
        )
        for number, name in enumerate(dict.fromkeys(names))
    }


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, laid out so that nothing in it overlaps."""
    return Figure(figsize=(width, height), layout="constrained")


def legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str], font: float = 9.0) -> Legend:
    """A legend below the axes, in as many columns as the names leave room for; the figure grows by its height."""
    labels = [wrapped(name, 48) for name in names]
    widths = [font / 72 * (0.62 * max(map(len, label.split("\n"))) + 5) for label in labels]  # inches
    columns = max(
        count
        for count in range(1, len(labels) + 1)
        if count == 1 or sum(max(part) for part in np.array_split(widths, count)) < figure.get_figwidth()
    )
    lines = max(
        sum(label.count("\n") + 1 for label in part) for part in np.array_split(np.array(labels, object), columns)
    )
    figure.set_figheight(figure.get_figheight() + (lines + 1) * 1.5 * font / 72)
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=font, frameon=False)
    return plain(legend)


def plain(artist: Any) -> Any:
    """The artist, with every text in it taken literally; of a figure, titles and labels of its axes too."""
    for text in artist.findobj(Text):
        text.set_parse_math(False)
    return artist


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most so many characters, broken behind a colon, a comma or a blank where it has one."""
    lines = [""]
    for piece in re.findall(r"[^:, ]*[:, ]?", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """A token's text with its line ends and tabs to be seen, and nothing in it that cannot be drawn."""
    shown = text.replace("\n", "↵").replace("\t", "→")
    return "".join(each if each.isprintable() else "\ufffd" for each in shown)


def grid_of(panels: int) -> tuple[int, int]:
    """Lines and columns for so many panels: about square, with few places left empty."""
    root = math.ceil(math.sqrt(panels))
    columns = min(range(root, root + root // 2 + 1), key=lambda count: (-panels % count, count))
    return math.ceil(panels / columns), columns


def show_image(axes: Axes, values: Any, **look: Any) -> AxesImage:
    """Values [lines, columns] as an image: sharp cells where each has a pixel of a PNG, blended ones where they have none.

    `look` goes to `Axes.imshow`.
    """
    lines, columns = np.shape(values)
    page, scale = axes.get_window_extent(), DOTS_PER_INCH / axes.figure.dpi
    sharp = columns <= page.width * scale and lines <= page.height * scale
    return axes.imshow(values, interpolation="nearest" if sharp else "auto", **look)


def token_ticks(axis: Axis, texts: Sequence[str], rotation: float = 0.0) -> None:
    """Ticks of an axis that runs over tokens: what they say where they are few, else their positions."""
    if len(texts) > MOST_NAMED:
        axis.set_major_locator(MaxNLocator(6, integer=True))
        return
    labels = [printable(text).replace(" ", "·") for text in texts]
    axis.set_ticks(np.arange(len(texts)), labels, rotation=rotation, fontsize=6, parse_math=False)


@contextmanager
def _boxes_for_missing_glyphs() -> Iterator[None]:
    """Draws letters that the font does not have as boxes, which say as much as a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


@_boxes_for_missing_glyphs()
def label_points(
    axes: Axes, places: np.ndarray, texts: Sequence[str], points: np.ndarray, line: np.ndarray, font: float = 8.0
) -> None:
    """Write texts beside their places so that they cover none of the points, not the line and not each other.

    Places, points and the corners of the line are [number, 2] in data. Where there is no such room, a text goes to where it
    covers least. Nothing may be drawn afterwards that changes the axes' limits or place.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    plain(figure).draw_without_rendering()  # until then nobody knows where on the page anything is
    pixel = figure.dpi / 72  # a point in pixels
    corners, spots = axes.transData.transform(line), axes.transData.transform(points)
    ends = np.stack([corners[:-1], corners[1:]])
    taken = np.concatenate(
        [np.hstack([ends.min(0) - pixel, ends.max(0) + pixel]), np.hstack([spots - 5 * pixel, spots + 5 * pixel])]
    )
    for place, text in zip(places, texts, strict=True):
        note = axes.annotate(wrapped(text, 36), place, (0, 0), textcoords="offset points", parse_math=False)
        note.set(fontsize=font, zorder=2.5, in_layout=False)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        extent = note.get_window_extent()
        size, spot = np.array([extent.width, extent.height]), axes.transData.transform(place)
        low = spot + DISTANCES * pixel * AWAY + size * (AWAY - 1) / 2
        boxes = np.hstack([low - pixel, low + size + pixel])
        outside = (size + 2 * pixel).prod() - _shared(boxes, np.reshape(axes.bbox.extents, (1, 4)))[:, 0]
        cost = _shared(boxes, taken).sum(1) + 4 * outside
        best = int(cost.round(3).argmin())  # the nearest of those that are as good
        note.set_position(tuple((low[best] - spot) / pixel))
        if DISTANCES[best] > DISTANCES[0]:
            middle = (low[best] + size / 2 - spot) / pixel
            arrow = {"arrowstyle": "-", "linewidth": 0.6, "color": "grey"}
            axes.annotate(
                "", place, tuple(middle), textcoords="offset points", arrowprops=arrow, zorder=1.5
            ).set_in_layout(False)
        taken = np.vstack([taken, boxes[best]])


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each box shares with each other, [boxes, others]; a box is left, bottom, right, top."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(0).prod(-1)


def ink(colour: Any) -> str:
    """Black or white, whichever is read better on a colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return "black" if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.179 else "white"


def free_name(label: str, taken: Iterable[str]) -> str:
    """A label as a file name that no other label has, whatever characters they are told apart by."""
    name = stem = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:100].rstrip("_") or "figure"
    used = {each.lower() for each in taken}
    number = 1
    while name.lower() in used:
        number += 1
        name = f"{stem}-{number}"
    return name


@_boxes_for_missing_glyphs()
def drawn(figure: Figure, kind: str) -> bytes:
    """The figure as a file of the kind `png` or `svg`; the same figure gives the same bytes."""
    page = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "kvfactory"}):
        figure.savefig(page, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
    return page.getvalue()


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg into a folder, which is made if need be; return their paths.

    Raises UserError where they cannot be written.
    """
    paths = [Path(folder) / f"{name}.{kind}" for kind in KINDS]
    for path, kind in zip(paths, KINDS, strict=True):
        draft = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(drawn(figure, kind))
            draft.replace(path)
        except OSError as problem:
            raise UserError(f"{path}: cannot be written: {problem.strerror}") from None
    return paths
