"""Data in the scripts of a page."""

from __future__ import annotations


def in_script(data: str) -> str:
    r"""Escape JSON for a script, which a token such as `</script>` or `<!--` would end or swallow.

    Args:
        data: the JSON.

    Example:
        >>> in_script('["</script>"]')
        '["\\u003c/script>"]'
    """
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
