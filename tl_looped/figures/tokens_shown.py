"""Tokens as text, and how a figure shows them."""

from __future__ import annotations

from html import escape
from typing import Any

from ..kinds import plain

_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}


def token_texts(tokenizer: Any, ids: Any) -> list[str]:
    """The text of every token by itself, with the space before a word; its id where there is no tokenizer.

    Args:
        tokenizer: the model's, or None.
        ids: token ids, a list or a tensor of one dimension.
    """
    listed: list[int] = plain(ids)
    if tokenizer is None:
        return [str(i) for i in listed]
    return [_text(tokenizer, i) for i in listed]


def _text(tokenizer: Any, token: int) -> str:
    text, raw = tokenizer.decode([token], clean_up_tokenization_spaces=False), tokenizer.convert_ids_to_tokens(token)
    if not isinstance(raw, str):  # an id of the model that the tokenizer does not have
        return text or f"[{token}]"
    if not text or "\ufffd" in text:  # a part of a character, which has no text of its own
        return raw
    return f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text


def visible(text: str) -> str:
    r"""A token in which nothing is invisible: spaces at its edges, new lines and other control characters are signs.

    Args:
        text: of the token.

    Example:
        >>> visible(" the"), visible("\n\n"), visible("a b"), visible("")
        ('␣the', '↵↵', 'a b', '(empty)')
    """
    start, end = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    inner = "".join(_SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text[start:end])
    spaces = len(text) - end if start < len(text) else 0
    return f"{'␣' * start}{inner}{'␣' * spaces}" or "(empty)"


def in_figure(text: str) -> str:
    """A text for plotly, which takes `<s>` for a tag and what is between dollars for a formula.

    Args:
        text: what is to be read there.

    Example:
        >>> in_figure("<s> $5")
        '&lt;s&gt; &#36;5'
    """
    return escape(text).replace("$", "&#36;")


def cut(text: str, most: int, *, end: bool = False) -> str:
    """A text of at most so many characters.

    Args:
        text: the text.
        most: how many.
        end: keep its end rather than its beginning.
    """
    if len(text) <= most:
        return text
    return f"…{text[1 - most :]}" if end else f"{text[: most - 1]}…"
