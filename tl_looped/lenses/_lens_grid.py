"""The grid of a lens that everybody knows: virtual layer by position, the most probable token in every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..figures.token_grid import SHADES, check_colour, lines, token_grid
from ..figures.tokens_shown import visible
from ..panels import Panel, pass_lines

if TYPE_CHECKING:
    from ..schedule import Site
    from .lens_result import LogitLensResult, Target


def lens_grid(result: LogitLensResult, example: int, places: list[int], colour: str, target: Target | None) -> Panel:
    """The grid of `LogitLensResult.plot("tokens")`.

    Args:
        result: the lens.
        example: which row of the batch.
        places: which of the decoded positions.
        colour: as there.
        target: as there.
    """
    check_colour(colour, SHADES)
    top, probs = (part[:, example, places].tolist() for part in (result.top_tokens, result.top_probs))
    numbers = {"entropy": result.entropy, "kl": result.kl}
    if colour == "rank":
        numbers["rank"] = result.rank_trajectory(target)
    also = {name: part[:, example, places].tolist() for name, part in numbers.items()}
    z = [[cell[0] for cell in row] for row in probs] if colour == "prob" else also[colour]
    read = [result.text(token) for token in result.tokens[example, places].tolist()]
    names = [row_name(site) for site in result.sites]

    def said(r: int, c: int) -> str:
        found = [f"{names[r]}, position {result.positions[places[c]]} {visible(read[c])}"]
        found += lines([result.text(token) for token in top[r][c]], probs[r][c])
        found += [f"entropy {also['entropy'][r][c]:.3f} nats, KL to the last row {also['kl'][r][c]:.3f} nats"]
        return "\n".join(found + ([f"rank of the target {also['rank'][r][c]}"] if colour == "rank" else []))

    return token_grid(
        [[result.text(cell[0]) for cell in row] for row in top],
        [[float(number) for number in row] for row in z],
        [[said(r, c) for c in range(len(places))] for r in range(len(names))],
        colour,
        rows=names,
        columns=[visible(token) for token in read],
        titles=("the next token is predicted after", ""),
        title=f"Most probable next token, {result.lens} lens",
        marks=pass_lines(result.sites),
        top=True,
    )


def row_name(site: Site) -> str:
    """What a row is called, as in "loop 2, layer 0".

    Args:
        site: of the row.
    """
    return f"{site.where}, layer {site.layer}"
