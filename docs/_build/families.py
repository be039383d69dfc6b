"""Write the table of families (`tl_looped.families.TABLE`) into the README and the documentation.

`python docs/_build/families.py`; a test compares what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tl_looped.families import TABLE
from tl_looped.info import lacking_in, refused, since

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/families.md")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" if row else f"|{'---|' * len(head)}" for row in (head, (), *others))


def overview() -> str:
    """Every family with its checkpoints, its loop and its version."""
    return _markdown(
        [("family", "checkpoints", "loop", "since"), *((r.title, r.checkpoints, r.loop, since(r)) for r in TABLE)]
    )


def limits() -> str:
    """What every family lacks and refuses; of a row of which it depends on the model, that."""
    rows = [("family", "lacks", "refuses in config.json")]
    for row in TABLE:
        lacks = "depends on the model" if row.small is None else ", ".join(lacking_in(row)) or "nothing"
        rows.append((row.title, lacks, f"`{refused(row).removeprefix('refuses ')}`" if row.refused else ""))
    return _markdown(rows)


TABLES: dict[str, Callable[[], str]] = {"overview": overview, "limits": limits}
_MARKED = re.compile(r"(<!-- families: (\w+), written by docs/_build/families.py -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """A page with its tables as they are now.

    Args:
        page: its text.
    """
    return _MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], page)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
