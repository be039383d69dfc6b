"""A drawing of the order in which the layers of a model run."""

from __future__ import annotations

from html import escape

from ..facts import Order

_WIDTH, _BOX, _GAP = 380, 210, 26  # room for × 128 beside the box


def schedule_diagram(order: Order, n_loops: int) -> str:
    """An SVG: what runs from the token to the answer, from top to bottom, with the loop drawn as a loop.

    Its colours are CSS variables of the page: `--line`, `--text`, `--muted`, `--accent`, `--paper`.

    Args:
        order: what runs.
        n_loops: how often it loops.
    """
    drawing, found = _Drawing(), order
    for name, detail in found.before:
        drawing.box(name, detail)
    source = drawing.bottom - 12
    if found.begins:
        drawing.note(found.begins)
    first = drawing.bottom
    for name, detail in found.loop:
        drawing.box(name, detail, loop=True)
    drawing.arc(first, drawing.bottom - _GAP, f"× {n_loops}")
    if found.is_injected:
        drawing.injection(source, first + 18)
    for name, detail in found.after:
        drawing.box(name, detail, last=name == "answer")
    return drawing.svg()


class _Drawing:
    """Boxes below one another, with arrows between them."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.bottom = 8.0
        self.left = (_WIDTH - _BOX) / 2

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>')

    def box(self, name: str, detail: str, *, loop: bool = False, last: bool = False) -> None:
        y = self.bottom
        style = "loop" if loop else "plain"
        self.parts.append(f'<rect x="{self.left}" y="{y}" width="{_BOX}" height="40" rx="7" class="{style}"/>')
        self.text(_WIDTH / 2, y + 17, name, "name")
        self.text(_WIDTH / 2, y + 32, detail, "detail")
        if not last:
            self.arrow(_WIDTH / 2, y + 40, y + 40 + _GAP)
        self.bottom = y + 40 + (0 if last else _GAP)

    def note(self, words: str) -> None:
        self.text(_WIDTH / 2, self.bottom + 10, words, "detail")
        self.bottom += 20

    def arrow(self, x: float, start: float, end: float) -> None:
        self.parts.append(f'<path d="M{x} {start}V{end - 2}" class="arrow" marker-end="url(#tip)"/>')

    def arc(self, top: float, bottom: float, words: str) -> None:
        """From the bottom of the loop back to its top, on the right."""
        x, right = self.left + _BOX, self.left + _BOX + 26
        self.parts.append(
            f'<path d="M{x} {bottom - 10}H{right}V{top + 10}H{x + 3}" class="arrow strong" marker-end="url(#tip)"/>'
        )
        self.text(right + 6, (top + bottom) / 2 + 5, words, "times", "start")

    def injection(self, source: float, target: float) -> None:
        """From what precedes the loop into its first layer, on the left."""
        x, left = self.left, self.left - 26
        self.parts.append(
            f'<path d="M{_WIDTH / 2} {source}H{left}V{target}H{x - 3}" class="arrow strong" marker-end="url(#tip)"/>'
        )
        middle = (source + target) / 2
        self.parts.append(
            f'<text transform="translate({left - 7} {middle}) rotate(-90)" text-anchor="middle" class="detail">injection</text>'
        )

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>'
        )
        size = f'viewBox="0 0 {_WIDTH} {self.bottom + 8}" width="{_WIDTH}"'
        label = 'role="img" aria-label="the order in which the layers run"'
        return f'<svg class="diagram" {size} {label}>{tip}{"".join(self.parts)}</svg>'
