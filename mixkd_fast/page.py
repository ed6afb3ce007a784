"""Pieces of a self-contained HTML page: style, tables, and line plots as inline SVG (matplotlib, no display)."""

import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 2000
"""Points that a curve keeps at most."""
_LARGEST = 1e30  # beyond it the arithmetic of the axes overflows
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --card: #f5f6f8; --line: #d9dde2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --paper: #14171b; --card: #1e2329; --line: #343b44; }
  figure svg { filter: invert(0.9) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 1080px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
p.lead { color: var(--soft); margin: 0 0 1rem; overflow-wrap: anywhere; }
p.warn { border-left: 4px solid #d08700; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; } figcaption { color: var(--soft); font-size: .9rem; }
details { margin-top: 2rem; } summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; }
pre { background: var(--card); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }
.sample { border-top: 1px solid var(--line); padding-top: .5rem; } .sample dt { color: var(--soft); font-size: .9rem; }
.sample dd { margin: 0; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .6rem; }
"""

Points = tuple[Sequence[float], Sequence[float | None]]


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """A whole document. Args: title and lead are plain text; body holds HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; numbers are set right."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            text = number(cell)
            is_number = cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))
            cells.append(f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def facts(values: Mapping[str, object]) -> str:
    """A two-column table of names and values; None is left out."""
    return table(["", ""], [[name.replace("_", " "), number(v)] for name, v in values.items() if v is not None])


def number(value: object) -> str:
    """A value as a person reads it: 4 decimals below 10, thousands separators above."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def line_plot(
    caption: str,
    curves: Mapping[str, Points],
    marks: bool = False,
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
    smooth: bool = True,
) -> str:
    """Curves name -> (x, y) as an inline SVG with a caption; '' without any point.

    Args: y values that are None, not finite or beyond 1e30 leave a gap; marks draws the points; levels are dashed
    lines, name -> height, in the colour of the curve of the same place. Without marks, curves of 50 points or more
    are (if smooth) drawn as running means over a fiftieth of them, a single one over its pale self.
    """
    curves = {name: points for name, points in curves.items() if any(_is_finite(y) for y in points[1])}
    if not curves:
        return ""
    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    lines = []
    for place, (x, y) in enumerate(curves.values()):
        kept = downsample(y)
        values = [math.nan if (height := y[i]) is None or not _is_finite(height) else height for i in kept]
        single = marks or len(values) == 1
        steps, color = [x[index] for index in kept], f"C{place % 10}"
        if smooth and not marks and len(y) >= 50:
            if len(curves) == 1:
                axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=color)
            lines += axes.plot(*running_mean(x, y), linewidth=1.6, color=color)
        else:
            lines += axes.plot(
                steps, values, linewidth=1.3, marker="o" if single else None, markersize=3.5, color=color
            )
    names = list(curves)
    for place, (name, height) in enumerate((levels or {}).items()):
        if _is_finite(height):
            lines.append(axes.axhline(height, color=f"C{place % 10}", linewidth=1.1, linestyle="--"))
            names.append(name)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        # A leading underscore would keep a name out of the legend, hence the invisible word joiner before it.
        shown = [f"\u2060{name}" if name.startswith("_") else name for name in names]
        columns = 5 if max(map(len, names)) < 12 else 2 if max(map(len, names)) < 32 else 1
        axes.legend(
            lines, shown, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns
        )
    return _figure(figure, caption)


def scatter_plot(
    caption: str,
    x: Sequence[float],
    y: Sequence[float | None],
    spread: Sequence[float | None],
    label: str,
    logarithmic: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Points with a bar of +- spread each, as an inline SVG with a caption; '' without any point.

    Args: y that is None, not finite or beyond 1e30 is left out; label stands under the x axis; level is a dashed line
    (name, height).
    """
    points = [(a, b, c or 0.0) for a, b, c in zip(x, y, spread, strict=True) if b is not None and _is_finite(b)]
    if not points:
        return ""
    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    across, heights, spreads = zip(*points, strict=True)
    axes.errorbar(across, heights, yerr=spreads, fmt="o", markersize=4.5, capsize=2, elinewidth=0.9, alpha=0.8)
    if logarithmic:
        axes.set_xscale("log")
    else:
        # Few enough that long numbers do not run into each other.
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if level is not None and _is_finite(level[1]):
        axes.axhline(level[1], color="C1", linewidth=1.1, linestyle="--", label=level[0])
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.grid(alpha=0.25)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, caption)


def downsample(y: Sequence[float | None], max_points: int = MAX_POINTS) -> list[int]:
    """Indices of at most `max_points` points: the smallest and largest of equal stretches, so that no spike is lost."""
    if len(y) <= max_points:
        return list(range(len(y)))
    kept: set[int] = set()
    num_stretches = max_points // 2
    for stretch in range(num_stretches):
        indices = range(stretch * len(y) // num_stretches, (stretch + 1) * len(y) // num_stretches)
        heights = [(height, i) for i in indices if (height := y[i]) is not None and _is_finite(height)]
        kept |= {min(heights)[1], max(heights)[1]} if heights else {indices[0]}
    return sorted(kept)


def running_mean(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Centred mean over a fiftieth of the points that can be drawn, at no more than `MAX_POINTS` places."""
    points = [(step, height) for step, height in zip(x, y, strict=True) if height is not None and _is_finite(height)]
    half = max(1, len(points) // 100)
    places = range(0, len(points), max(1, math.ceil(len(points) / MAX_POINTS)))
    heights = [height for _, height in points]
    means = [statistics.fmean(heights[max(0, place - half) : place + half + 1]) for place in places]
    return [points[place][0] for place in places], means


def bar_plot(caption: str, values: Mapping[str, float]) -> str:
    """Horizontal bars name -> value, with the value written at their ends."""
    figure = Figure(figsize=(4.5, 0.6 + 0.4 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    names = list(values)[::-1]
    bars = axes.barh(range(len(names)), [values[name] for name in names], height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    low, high = min(0.0, *values.values()), max(0.0, *values.values())
    room = 0.15 * (high - low) or 1.0
    axes.set_xlim(low - room if low < 0 else 0.0, high + room)
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, caption)


def _figure(figure: Figure, caption: str) -> str:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    # Names are the user's: a dollar sign starts no formula. The salt makes the same figure the same text.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "svg.hashsalt": caption}):
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def _is_finite(value: float | None) -> bool:
    return value is not None and abs(value) < _LARGEST
