"""Pieces of a self-contained HTML page: style, tables, and line plots as inline SVG (matplotlib, no display)."""

import html
import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 2000
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --card: #f5f6f8; --line: #d9dde2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --paper: #14171b; --card: #1e2329; --line: #343b44; }
  figure svg { filter: invert(0.9) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 1080px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p.lead { color: var(--soft); margin: 0 0 1rem; } p.warn { border-left: 4px solid #d08700; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { text-align: right; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; } figcaption { color: var(--soft); font-size: .9rem; }
pre { background: var(--card); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem; }
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
            is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
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


def line_plot(caption: str, curves: Mapping[str, Points], marks: bool = False) -> str:
    """Curves name -> (x, y) as an inline SVG with a caption; y values of None leave a gap. '' without any point."""
    curves = {name: points for name, points in curves.items() if any(_is_finite(y) for y in points[1])}
    if not curves:
        return ""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        step = max(1, math.ceil(len(x) / MAX_POINTS))
        values = [value if _is_finite(value) else math.nan for value in y[::step]]
        single = marks or len(values) == 1
        axes.plot(list(x[::step]), values, label=name, linewidth=1.3, marker="o" if single else None, markersize=3.5)
    axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(curves)))
    return _figure(figure, caption)


def bar_plot(caption: str, values: Mapping[str, float], lowest: float = 0.0) -> str:
    """Horizontal bars name -> value, with the value written at their ends."""
    figure = Figure(figsize=(5.2, 0.6 + 0.4 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], height=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_xlim(left=lowest, right=max(values.values()) * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, caption)


def _figure(figure: Figure, caption: str) -> str:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
