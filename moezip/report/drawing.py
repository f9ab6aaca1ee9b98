"""Charts as inline SVG: matplotlib draws them, the page's style sheet colours them.

matplotlib writes colours as numbers. Each colour here stands for a variable of the style sheet, and is replaced by it
in the finished text, so that one drawing serves light and dark pages. Text stays text, in the page's own font.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from moezip.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = 7
# What matplotlib is told, by the variable that it becomes: colours that no drawing has by accident.
INK, MUTED, LINE, PAPER, ACCENT, BLUE = (f"#0a0b{place:02x}" for place in range(6))
SEQUENCE = tuple(f"#0a0c{place:02x}" for place in range(LEVELS))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper", ACCENT: "--accent", BLUE: "--blue",
    **{colour: f"--s{place}" for place, colour in enumerate(SEQUENCE)},
}  # fmt: skip
DPI = 72  # matplotlib's points are then the page's pixels
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif", "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 1,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK, "text.color": INK,
    "grid.color": LINE, "grid.linewidth": 1, "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": DPI,
    "xtick.labelsize": 10, "ytick.labelsize": 11, "path.simplify": False,
}  # fmt: skip


def require() -> None:
    """Raises UsageError where what draws and lays out pages is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise UsageError(
            f"pages need {missing.name}, which is not installed", where="--html",
            next="pip install 'moezip[report]'; without --html, and with --json, a report needs nothing more",
        ) from missing  # fmt: skip


def drawn(
    name: str, title: str, words: str, size: tuple[float, float], draw: Callable[[Axes], None], least: int = 0
) -> str:
    """One chart as an SVG element.

    Args:
        name: unique on its page. title, words: what a screen reader says; ``words`` sums up what the eye would see.
        size: pixels at the width where it reads best; it scales with the page.
        least: pixels that it is never narrower than, so that the page gives it a scroll bar of its own.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), name, title, words, least)


def _inline(text: str, name: str, title: str, words: str, least: int) -> str:
    """An element for a page that has others like it: identifiers of its own, no style for the whole page."""
    from markupsafe import escape

    body = text[text.index("<svg") :]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None  # matplotlib always writes one
    rest = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"font(?:-family)?: [^;\"]*sans-serif[^;\"]*", _font, rest)
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag.group()), rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    style = f' style="min-width:{least}px"' if least else ""
    return (
        f'<svg viewBox="{box.group(1)}" role="img" aria-labelledby="{name}-title {name}-words"{style}>'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-words">{escape(words)}</desc>{rest}'
    )


def _font(found: re.Match[str]) -> str:
    """The size and weight of a text, in the page's own font."""
    size = re.search(r"[\d.]+px", found.group())
    return f"font-size: {size.group()}" if size and found.group().startswith("font:") else "font-family: inherit"


def rectangles(corners: Iterable[tuple[float, float, float, float]]) -> Any:
    """Many rectangles (x, y, width, height) as one path, so that a big map stays a small page."""
    return shapes([(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in corners)


def shapes(polygons: Iterable[Sequence[tuple[float, float]]]) -> Any:
    """Many closed polygons as one path."""
    from matplotlib.path import Path

    points: list[tuple[float, float]] = []
    codes: list[int] = []
    for polygon in polygons:
        points += [*polygon, polygon[0]]
        codes += [Path.MOVETO, *[Path.LINETO] * (len(polygon) - 1), Path.CLOSEPOLY]  # type: ignore[list-item]
    return Path(points or [(0, 0)], codes or [Path.MOVETO])  # type: ignore[arg-type]


def fill(axes: Axes, path: Any, colour: str, **more: Any) -> None:
    from matplotlib.patches import PathPatch

    axes.add_patch(PathPatch(path, **{"facecolor": colour, "linewidth": 0, "clip_on": False, **more}))
