"""Draws inline SVG with matplotlib; the same data give the same bytes.

Colours are CSS variables that the page defines, so one drawing serves light and dark pages. Text stays text
(`svg.fonttype: none`), in the page's font. Labels are drawn without math parsing: names from data may contain "$".
"""

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
LINES = ("-", "--", ":")
"""How lines of arms are drawn: the first six arms solid, and so on."""

# Placeholders that matplotlib accepts as colours; `_svg` replaces them by CSS variables.
_ARM_COLOURS = [f"#0a0b{i:02x}" for i in range(len(MARKERS))]
INK, FAINT, GROUND = "#0a0c01", "#0a0c02", "#0a0c03"
_VARIABLES = {colour: f"var(--arm-{i})" for i, colour in enumerate(_ARM_COLOURS)} | {
    INK: "var(--soft)",
    FAINT: "var(--line)",
    GROUND: "var(--card)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def colour(arm: int) -> str:
    """Returns the colour of an arm by its place, which later arms share with earlier ones."""
    return _ARM_COLOURS[arm % len(MARKERS)]


def marker(arm: int) -> str:
    return MARKERS[arm % len(MARKERS)]


def line(arm: int) -> str:
    return LINES[arm // len(MARKERS) % len(LINES)]


def draw_value(axes: "Axes", y: float, value: tuple[float, float, float], arm: int) -> None:
    """Draws a point with its interval from (value, low, high), in the colour of an arm."""
    middle, low, high = value
    axes.plot([low, high], [y, y], color=colour(arm), linewidth=1.6, solid_capstyle="round")
    axes.plot([middle], [y], marker(arm), color=colour(arm), markersize=7, markeredgecolor=GROUND, markeredgewidth=1)


def svg(name: str, size: tuple[float, float], draw: Callable[["Figure"], Any]) -> "Markup":
    """Returns what `draw` draws on a figure of `size` inches, as an <svg> element with ids unique in a page."""
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes
        settings: Any = matplotlib.rcParams  # typed by a Literal of its 300 keys
        settings.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=no_metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # numbered ids that nothing refers to
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # use the page's font
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(name)}"', text, count=1)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return Markup(text)


def standalone(drawing: "Markup", palette: Mapping[str, str], font: str) -> str:
    """Returns a drawing as a separate SVG file; `palette` gives the values of the page's CSS variables."""
    text = str(drawing)
    for name, value in palette.items():
        text = text.replace(f"var({name})", value)
    ground = f'<rect width="100%" height="100%" fill="{palette["--card"]}"/>'
    head, rest = text.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head} font-family="{font}">{ground}{rest}\n'
