"""The page of `tl-looped explore`: one document that needs nothing else."""

from __future__ import annotations

import json
from functools import lru_cache
from html import escape
from pathlib import Path

from .._html import in_script

HERE = Path(__file__).parent


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


@lru_cache
def text(name: str) -> str:
    """A file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")
