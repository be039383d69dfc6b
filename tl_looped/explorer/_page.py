"""The page of `tl-looped explore`: one document that needs nothing else."""

from __future__ import annotations

import json
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from .._html import in_script

HERE = Path(__file__).parent
PLACE = '<div class="tlx-host"></div>'  # which `drawing_parts` fills


def page(name: str, token: str, nonce: str) -> str:
    """The HTML of the page, with its script and style inside.

    Args:
        name: of the model.
        token: what questions must carry.
        nonce: what the policy of the page allows to run.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} – tl-looped explore</title>
<link rel="icon" href="data:,">
<style>html {{ color-scheme: light dark; }} body {{ margin: 0; background: light-dark(#ffffff, #161a20); }}
{text("explorer.css")}</style>
</head>
<body>
<main id="explorer"></main>
<script type="module" nonce="{nonce}">
{text("explorer.js")}
mount(document.getElementById("explorer"), overHttp("ask", {in_script(json.dumps(token))}));
</script>
</body>
</html>
"""


def frozen(name: str, data: dict[str, Any]) -> str:
    """A page that shows what was computed before, without Python.

    Args:
        name: of the model.
        data: the replies that it gives: {"describe", "grid", "state"}.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} – what every loop says</title>
<link rel="icon" href="data:,">
<style>html {{ color-scheme: light dark; }} body {{ margin: 0; background: light-dark(#ffffff, #161a20); }}</style>
</head>
<body>
{frozen_part(data)}
{drawing_parts()}
</body>
</html>
"""


def frozen_part(data: dict[str, Any]) -> str:
    """A place for what `frozen` shows, or for `cells`, in a page that ends with `drawing_parts`.

    Args:
        data: as there.
    """
    inside = in_script(json.dumps(data, allow_nan=False))
    return f'<div>{PLACE}<script class="tlx-data" type="application/json">{inside}</script></div>'


def drawing_parts() -> str:
    """The style and the script that fill every `frozen_part` of a page; once in a page, after them."""
    return f"""<style>{text("explorer.css")}</style>
<script type="module">
{text("explorer.js")}
mountAll();
</script>"""


@lru_cache
def text(name: str) -> str:
    """A file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")
