"""What a terminal's escape sequences mean: the text without them, and the text in colours as HTML.

A pane has a dark ground in both themes, and each colour that a program asks for is drawn as the most similar one of
seven that can be read there. Backgrounds, underlines and all that moves the cursor are left out.
"""

import html
import itertools
import re
from collections.abc import Iterable

# control sequences (group 1: arguments, group 2: the letter that says what it is), strings such as links and titles,
# other sequences, and control characters but for the tab
ESCAPE = re.compile(
    r"\x1b\[([0-?]*)[ -/]*([@-~])|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]|[\x00-\x08\x0b-\x1f\x7f]"
)
# By the terminal's own numbers, which are sums of red (1), green (2) and blue (4). The contrast is at least 5:1.
COLOURS = {1: "#ff8f8f", 2: "#8fd694", 3: "#e8c66a", 4: "#8ab8ff", 5: "#dda0f0", 6: "#7fd6d6", 7: "#ffffff"}


def plain(line: str) -> str:
    """The line without escape sequences."""
    return ESCAPE.sub("", line)


def coloured(lines: Iterable[str]) -> str:
    """The lines as HTML, with their colours and what is bold in inline styles."""
    drawn, colour, bold = [], "", False
    for line in lines:
        at = 0
        for found in itertools.chain(ESCAPE.finditer(line), [None]):
            text = html.escape(line[at : found.start() if found else None])
            style = "font-weight:bold;" * bold + f"color:{colour};" * bool(colour)
            drawn.append(f'<span style="{style}">{text}</span>' if text and style else text)
            if found:
                at = found.end()
                if found[2] == "m":
                    colour, bold = _style(found[1], colour, bold)
        drawn.append("\n")
    return "".join(drawn)


def _style(arguments: str, colour: str, bold: bool) -> tuple[str, bool]:
    """The colour and the weight after one `ESC [ arguments m`."""
    numbers = iter([int(number or 0) for number in arguments.split(";") if number.isdecimal() or not number])
    for number in numbers:
        if number == 0:
            colour, bold = "", False
        elif number in (1, 22):
            bold = number == 1
        elif number in (38, 48):  # a colour of 256, or of all, follows
            given = list(itertools.islice(numbers, {5: 1, 2: 3}.get(next(numbers, 0), 0)))
            colour = _similar(given) if number == 38 else colour
        elif number // 10 in (3, 9):
            colour = COLOURS.get(number % 10, "")
    return colour, bold


def _similar(given: list[int]) -> str:
    """The colour for red, green and blue, or for a number: 16 of the terminal's, a cube with edges of 6, and greys."""
    if len(given) == 1:
        [number] = given
        if not 16 <= number < 232:
            return COLOURS.get(number % 8 if number < 16 else 7, "")
        given = [(number - 16) // 36, (number - 16) // 6 % 6, (number - 16) % 6]
    strongest = max(given, default=0)
    return COLOURS.get(sum((2 * part > strongest) << at for at, part in enumerate(given)), "")
