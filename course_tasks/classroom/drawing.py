"""What charts and panes are drawn with: one palette, an axis with seconds, a picture's frame, and the dark pane.

A notebook that is not trusted yet loses scripts and style sheets. So a picture is an SVG file inside an `<img>`, with
both themes in its own style sheet, and a pane has inline styles only.
"""

import base64
import html
import math

WIDTH, LEFT, RIGHT = 760, 108, 14  # of a picture, of its column of names, and free at the right, in pixels
ROW, TITLE, AXIS = 20, 26, 26  # heights in pixels: a row, a title, the axis
TICKS = 5  # at most, on an axis
# The colours of notebooks/figures. A picture follows the system's theme, and so does the course's JupyterLab.
STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2430}.name{font-weight:700;font-size:13px}
.tick{text-anchor:middle}.grid{stroke:#4a5160;opacity:.3}.move{stroke:#4a5160;stroke-width:2}.row{fill:#e9f2ec}
.bar{fill:#8fd0a6;stroke:#2f7d4f}.wait{fill:#ffd27a;stroke:#9a5b00}.bad{fill:#ffb3ab;stroke:#a32020}
@media (prefers-color-scheme:dark){text{fill:#e8eaf0}.grid,.move{stroke:#aab2c2}.row{fill:#21382b}
.bar{fill:#2f7d4f;stroke:#63c08a}.wait{fill:#6b4a10;stroke:#ffc04d}.bad{fill:#7a2a2a;stroke:#ff8f8f}}
"""
# A pane is dark in both themes. Its colours have a contrast of at least 5:1 on its background.
BACKGROUND, FOREGROUND = "#1b1d23", "#e4e6eb"
PANE = f"background-color:{BACKGROUND};color:{FOREGROUND};"
DARK = "color-scheme:dark;"  # for the scrollbar
FONT = "font-size:var(--jp-code-font-size);"


def axis(longest: float, scale: float, bottom: float, left: float = LEFT, top: float = TITLE) -> list[str]:
    """An axis of time, as SVG elements.

    Args:
        longest: seconds from its left end to its right end.
        scale: pixels per second.
        bottom: where the rows end, in pixels; the labels are below.
        left: where it begins, in pixels.
        top: how far its thin vertical lines go up, in pixels.
    """
    step, drawn = 10.0 ** math.floor(math.log10(longest)), []
    step *= next(part for part in (0.2, 0.5, 1, 2, 5) if longest / (step * part) <= TICKS)
    for at in (number * step for number in range(int(longest / step) + 1)):
        x = left + at * scale
        drawn.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom + 4:.1f}"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}">{at:.6g} s</text>')
    return drawn


def framed(drawn: list[str], height: float) -> str:
    """The whole picture as SVG: the elements drawn, WIDTH pixels wide and `height` pixels high."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>{''.join(drawn)}</svg>"
    )


def image(alt: str, picture: str) -> str:
    """An SVG picture as HTML, with a text for those who don't see it."""
    data = base64.b64encode(picture.encode()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}" width="{WIDTH}">'


def pane(title: str, body: str, about: str, role: str = "log", style: str = "", box: str = "") -> str:
    """A dark pane as HTML: a title above preformatted text.

    Args:
        title: HTML.
        body: HTML, in lines.
        about: what a screen reader calls the text.
        role: the text's ARIA role; "log" for what grows, "status" for what changes.
        style: more CSS for the text.
        box: CSS for a box around the text that can be scrolled; none if empty.
    """
    named = f'aria-label="{html.escape(about)}"'
    inner = f'style="{PANE}margin:0;padding:4px 10px;{FONT}{style}">{body}</pre>'
    if box:
        # an `a`, for a `div` keeps no tabindex in a notebook that is not trusted yet, and could not be scrolled by keys
        inner = f'<a role="{role}" tabindex="0" {named} style="text-decoration:none;{box}"><pre {inner}</a>'
    else:
        inner = f'<pre role="{role}" {named} {inner}'
    return (
        f'<div style="{PANE}{DARK}border-radius:6px;padding-bottom:6px">'
        f'<div style="padding:4px 10px;font-weight:bold">{title}</div>{inner}</div>'
    )


def preformatted(text: str) -> str:
    """A text of several lines as HTML, as it stands, to go below a picture."""
    return f'<pre style="font-size:var(--jp-code-font-size);white-space:pre-wrap">{html.escape(text)}</pre>'
