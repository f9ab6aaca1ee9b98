"""The charts of a report. Each is None where there is nothing to draw."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moezip.report import drawing
from moezip.report.drawing import ACCENT, BLUE, LEVELS, LINE, MUTED, PAPER, SEQUENCE, drawn, fill, rectangles
from moezip.report.experts import Cell, ExpertMap
from moezip.report.measured import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A scale is logarithmic above LINEAR nats where the largest rise is CROWDED times the middle one.
LINEAR, CROWDED = 0.01, 6
# Where a number may stand beside its point, in pixels, the best first; and how far from others it should be.
_BESIDE = ((8, 8), (-8, 8), (8, -8), (-8, -8), (11, 0), (-11, 0), (0, 11), (0, -11), (20, 0), (-20, 0))
APART = 10.5
WIDE = 48  # experts in a row from which on cells are small and the map has a scroll bar on a phone


@dataclass(frozen=True, slots=True)
class Chart:
    """An SVG element, and what its colours mean: ``(level, text)``, the lowest first."""

    svg: str
    legend: tuple[tuple[int, str], ...] = ()


# -- experts ------------------------------------------------------------------------------------------------


def importance(found: ExpertMap) -> Chart:
    """Layers x experts, coloured by score, shaped by what became of each expert."""
    scores = sorted(cell.score for cell in found.every() if cell.score is not None)
    bounds = [scores[len(scores) * step // LEVELS] for step in range(1, LEVELS)] if scores else []

    def level(cell: Cell) -> int:
        return 3 if cell.score is None else bisect_right(bounds, cell.score)

    legend: tuple[tuple[int, str], ...] = ()
    if scores:
        edges = [scores[0], *bounds, scores[-1]]
        legend = tuple((step, f"{edges[step]:.2g} to {edges[step + 1]:.2g}") for step in range(LEVELS))
    counts = found.counts()
    told = ", ".join(f"{count} {fate}" for fate, count in counts.items())
    what = "coloured by score, seven classes of equal number" if scores else "the plan has no scores"
    words = f"{len(found.cells)} layers of up to {found.width} experts: {told}; {what}."
    return Chart(_map("importance", "Every expert of the source, and what became of it", words, found, level), legend)


def bits(found: ExpertMap) -> Chart | None:
    """Layers x experts, coloured by the mean bits of their codes."""
    if not found.packed:
        return None

    def level(cell: Cell) -> int:
        return -1 if cell.bits is None else max(0, min(LEVELS - 1, round(cell.bits) - 1))

    seen = sorted({round(cell.bits) for cell in found.every() if cell.bits is not None})
    legend = tuple((max(0, min(LEVELS - 1, each - 1)), f"{each} bit{'s' if each > 1 else ''}") for each in seen)
    values = [cell.bits for cell in found.every() if cell.bits is not None]
    words = f"From {min(values):.1f} to {max(values):.1f} bits per weight, {sum(values) / len(values):.2f} on average."
    return Chart(_map("bits", "Bits of every expert's codes, mean of its matrices", words, found, level), legend)


def _map(name: str, title: str, words: str, found: ExpertMap, level: object) -> str:
    wide = found.width > WIDE
    side = 12.5 if not wide else 8 if found.width <= 160 else 6
    rows = list(found.cells.items())
    size = (found.width * side + 78, len(rows) * max(side, 9) + 52)

    def draw(axes: Axes) -> None:
        whole: dict[int, list[tuple[float, float, float, float]]] = {}
        corners: dict[int, list[list[tuple[float, float]]]] = {}
        dots: dict[int, list[tuple[float, float, float, float]]] = {}
        behind, rings, notches = [], [], []
        for y, (_, row) in enumerate(rows):
            for cell in row:
                x, step = cell.expert, level(cell)  # type: ignore[operator]
                if step < 0 or cell.fate == "dropped" or (cell.fate == "kept" and cell.share == 0):
                    dots.setdefault(max(step, 0), []).append((x - 0.15, y - 0.15, 0.3, 0.3))
                elif cell.fate == "merged":
                    corners.setdefault(step, []).append(
                        [(x - 0.42, y + 0.42), (x + 0.42, y + 0.42), (x - 0.42, y - 0.42)]
                    )
                else:
                    high = 0.84 * (0.12 + 0.88 * cell.share if cell.share < 1 else 1)
                    if cell.share < 1:
                        behind.append((x - 0.42, y - 0.42, 0.84, 0.84))
                    whole.setdefault(step, []).append((x - 0.42, y + 0.42 - high, 0.84, high))
                    if cell.fate == "averaged":
                        notches.append((x - 0.14, y - 0.14, 0.28, 0.28))
                if cell.guarded:
                    rings.append((x - 0.46, y - 0.46, 0.92, 0.92))
        fill(axes, rectangles(behind), LINE)
        for step, each in sorted(whole.items()):
            fill(axes, rectangles(each), SEQUENCE[step])
        for step, triangles in sorted(corners.items()):
            fill(axes, drawing.shapes(triangles), SEQUENCE[step])
        for step, small in sorted(dots.items()):
            fill(axes, rectangles(small), SEQUENCE[step] if name == "importance" else MUTED)
        fill(axes, rectangles(notches), PAPER)
        fill(axes, rectangles(rings), "none", edgecolor=ACCENT, linewidth=1.8)
        axes.set(xlim=(-0.6, found.width - 0.4), ylim=(len(rows) - 0.4, -0.6), xlabel="expert of the source")
        step = max(1, -(-len(rows) // 24))
        axes.set_yticks(range(0, len(rows), step), [f"layer {layer}" for layer, _ in rows][::step])
        every = 4 if found.width <= WIDE else 16
        axes.set_xticks(range(0, found.width, every))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        left = [str(sum(cell.fate in ("kept", "averaged") for cell in row)) for _, row in rows]
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(range(0, len(rows), step), left[::step])
        beside.tick_params(length=0, labelcolor=MUTED)
        beside.set_ylabel("experts left")
        for spine in beside.spines.values():
            spine.set_visible(False)

    return drawn(name, title, words, size, draw, least=round(size[0]) if wide else 0)


def histogram(found: Mapping[str, Counter[int]]) -> Chart | None:
    """Matrices by bits, stacked by their role."""
    if not found:
        return None
    widths = sorted({width for row in found.values() for width in row})
    colours = dict(zip(found, (SEQUENCE[5], SEQUENCE[4], SEQUENCE[2], SEQUENCE[1], MUTED)))
    total = {width: sum(row[width] for row in found.values()) for width in widths}
    words = "; ".join(f"{count} matrices in {width} bits" for width, count in total.items()) + "."

    def draw(axes: Axes) -> None:
        below = dict.fromkeys(widths, 0)
        for role, row in found.items():
            axes.bar(range(len(widths)), [row[w] for w in widths], 0.72, bottom=list(below.values()), label=role,
                     color=colours[role])  # fmt: skip
            below = {width: below[width] + row[width] for width in widths}
        for place, width in enumerate(widths):
            axes.annotate(str(total[width]), (place, total[width]), (0, 3), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(widths)), [f"{width}" for width in widths])
        axes.set(xlabel="bits of the codes", ylabel="matrices", ylim=(0, 1.12 * max(total.values())))
        axes.tick_params(length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(found), handlelength=1, columnspacing=1.2)

    return Chart(drawn("histogram", "Matrices by the bits of their codes", words, (380, 240), draw))


# -- losses -------------------------------------------------------------------------------------------------


def losses(found: Measured, decided_on: Collection[str]) -> Chart | None:
    """The loss on every text, of the source and of the output."""
    rows = sorted((d for d in found.domains if d.rise is not None), key=lambda d: d.rise or 0.0)
    if not rows:
        return None
    words = "; ".join(f"{d.name} from {d.source:.3f} to {d.nll:.3f}" for d in rows) + ", in nats per token."

    def draw(axes: Axes) -> None:
        high = max(max(d.nll, d.source or 0.0) for d in rows)
        low = min(min(d.nll, d.source or 0.0) for d in rows)
        for y, d in enumerate(rows):
            assert d.source is not None and d.rise is not None
            axes.plot([d.source, d.nll], [y, y], color=ACCENT if d.rise > 0 else BLUE, linewidth=2.5, zorder=1,
                      solid_capstyle="round")  # fmt: skip
            axes.annotate(f"{d.rise:+.3f}", (1, y), (4, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", va="center", fontsize=10)  # fmt: skip
        places = range(len(rows))
        axes.scatter([d.source or 0.0 for d in rows], places, 34, facecolor=PAPER, edgecolor=MUTED, linewidth=1.6,
                     zorder=2, label="source")  # fmt: skip
        axes.scatter([d.nll for d in rows], places, 34, color=ACCENT, zorder=3, label="here")
        axes.set_yticks(places, [f"{d.name} ●" if d.name in decided_on else d.name for d in rows])
        pad = 0.06 * max(high - low, 0.1)
        axes.set(xlim=(low - pad, high + pad), ylim=(-0.6, len(rows) - 0.4), xlabel="loss, nats per token")
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handletextpad=0.2, columnspacing=1.2)

    return Chart(drawn("losses", "Loss by text, source and output", words, (380, 25 * len(rows) + 80), draw))


# -- several runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One run: its number in the table, its size, and its predicted and measured rise."""

    number: int
    name: str
    size: float
    predicted: float | None
    measured: float | None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of those that no other beats: none is both as small and as good, and better in one of both.

    >>> front([(1.0, 0.5), (2.0, 0.6), (3.0, 0.1), (1.0, 0.4)])
    [3, 2]
    """
    found: list[int] = []
    best = math.inf
    for place in sorted(range(len(points)), key=lambda each: points[each]):
        if points[place][1] < best:
            best = points[place][1]
            found.append(place)
    return found


def pareto(points: Sequence[Point]) -> Chart | None:
    """Size against the rise of the loss: measured where every run was, else predicted where all were."""
    measured = [p for p in points if p.measured is not None]
    predicted = [p for p in points if p.predicted is not None]
    shown = measured if len(measured) >= len(predicted) else predicted
    if len(shown) < 2:
        return None
    kind = "measured" if shown is measured else "predicted"
    places = [(p.size / 2**20, (p.measured if kind == "measured" else p.predicted) or 0.0) for p in shown]
    best = front(places)
    names = ", ".join(f"{shown[each].number} ({shown[each].name})" for each in best)
    left = "" if len(shown) == len(points) else f" {len(points) - len(shown)} runs are not {kind} and left out."
    words = f"Of {len(shown)} runs none is better and no larger than {names}.{left}"

    def draw(axes: Axes) -> None:
        corner = [places[each] for each in best]
        axes.step([x for x, _ in corner], [y for _, y in corner], where="post", color=BLUE, linewidth=1.6, zorder=1)
        for place, (x, y) in enumerate(places):
            good = place in best
            axes.scatter([x], [y], 46, facecolor=BLUE if good else PAPER, edgecolor=BLUE if good else MUTED,
                         linewidth=1.5, zorder=2 + good)  # fmt: skip
        axes.margins(0.1)
        _spread(axes, [y for _, y in places], "y")
        _numbered(axes, [(point.number, *place) for point, place in zip(shown, places)])
        axes.grid()
        axes.tick_params(length=0)
        axes.set(xlabel="size of the tensors, MiB", ylabel=f"{kind} rise, nats per token")

    return Chart(drawn("pareto", "Size against loss", words, (380, 300), draw))


def predictions(points: Sequence[Point]) -> Chart | None:
    """Predicted against measured rises."""
    both = [p for p in points if p.predicted is not None and p.measured is not None]
    if len(both) < 2:
        return None
    words = "; ".join(f"{p.name} predicted {p.predicted:+.3f}, measured {p.measured:+.3f}" for p in both) + "."

    def draw(axes: Axes) -> None:
        values = [v for p in both for v in (p.predicted, p.measured) if v is not None]
        ends = (min(0.0, *values), max(values))
        axes.plot(ends, ends, color=LINE, linewidth=1.6, zorder=1)
        axes.scatter([p.predicted or 0.0 for p in both], [p.measured or 0.0 for p in both], 46, facecolor=PAPER,
                     edgecolor=ACCENT, linewidth=1.5, zorder=2)  # fmt: skip
        axes.margins(0.1)
        for axis in "xy":
            _spread(axes, values, axis)
        _numbered(axes, [(p.number, p.predicted or 0.0, p.measured or 0.0) for p in both])
        axes.grid()
        axes.tick_params(length=0)
        axes.set(xlabel="predicted rise, nats per token", ylabel="measured rise")

    return Chart(drawn("predictions", "Predicted against measured rises of the loss", words, (380, 300), draw))


def _spread(axes: Axes, values: Sequence[float], axis: str) -> None:
    """A logarithmic scale, linear around 0, where most of the values would lie on each other at the bottom."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    top, half = max(values), sorted(values)[len(values) // 2]
    if top <= CROWDED * max(half, LINEAR):
        return
    low = min(0.0, *values)
    getattr(axes, f"set_{axis}scale")("symlog", linthresh=LINEAR, linscale=0.5)
    getattr(axes, f"set_{axis}lim")(low - 0.3 * LINEAR, top * 1.6)
    ticks = getattr(axes, f"{axis}axis")
    ticks.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR, subs=[2, 5]))
    ticks.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if abs(value) >= LINEAR else ""))
    axes.tick_params(axis=axis, which="minor", length=0, labelsize=9)  # type: ignore[arg-type]


def _numbered(axes: Axes, points: Sequence[tuple[int, float, float]]) -> None:
    """Numbers beside their points, each where it hides no other number and no other point, as far as there is room."""
    taken = [tuple(map(float, axes.transData.transform((x, y)))) for _, x, y in points]
    for place, (number, x, y) in enumerate(points):
        own = taken[place]
        others = [each for other, each in enumerate(taken) if other != place]

        def room(
            shift: tuple[int, int], own: Sequence[float] = own, others: Sequence[Sequence[float]] = others
        ) -> float:
            """From the number to what is nearest."""
            here = (own[0] + shift[0], own[1] + shift[1])
            return min((math.dist(here, other) for other in others), default=math.inf)

        best = next((shift for shift in _BESIDE if room(shift) >= APART), max(_BESIDE, key=room))
        axes.annotate(str(number), (x, y), best, textcoords="offset points", ha="center", va="center", fontsize=10)
        taken.append((own[0] + best[0], own[1] + best[1]))


def seconds(stages: Mapping[str, float]) -> Chart | None:
    """Where the time went."""
    rows = [(name, each) for name, each in stages.items() if each > 0][::-1]
    if len(rows) < 2:
        return None
    words = ", ".join(f"{name} {each:.1f} s" for name, each in stages.items()) + "."

    def draw(axes: Axes) -> None:
        axes.barh(range(len(rows)), [each for _, each in rows], 0.62, color=SEQUENCE[4])
        for y, (_, each) in enumerate(rows):
            axes.annotate(f"{each:.1f} s", (each, y), (4, 0), textcoords="offset points", va="center", fontsize=10)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set(xlim=(0, 1.16 * max(each for _, each in rows)), xlabel="seconds")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)

    return Chart(drawn("seconds", "Seconds by stage", words, (380, 25 * len(rows) + 54), draw))
