"""Attention across loops."""

from __future__ import annotations

import torch

from ..._words import counted
from ...analysis import attention_distances, attention_stability
from ...analysis.attention_stability import AttentionStability
from ...figures.attention_viewer import AttentionViewer, attention_viewer
from ...results import Grid
from ..question import Question
from ..section import Figure, Numbers, Part, Reading, number
from ._common import left_out

ALIKE = 0.8  # a distance below this share of another one is said to be smaller
SHOWN_POSITIONS = 96  # of the prompt whose patterns are on the page
SHOWN_WEIGHTS = 200_000  # of attention on the page, a byte each


def _measure_distances(asked: Question) -> tuple[Numbers, Grid]:
    found = attention_distances(asked.model, asked.of_length(2), verbose=False)
    sites = asked.model.schedule.sites
    at = [k for k, site in enumerate(sites) if site.loop is not None]
    pairs = [(float(found.values[a, b]), sites[a][::2] == sites[b][::2]) for a in at for b in at if a < b]
    same, other = ([distance for distance, is_same in pairs if is_same == wanted] for wanted in (True, False))
    numbers: Numbers = {"distances": found}
    if same and other:
        numbers |= {"same_layer_other_loop": sum(same) / len(same), "other_layer": sum(other) / len(other)}
    return numbers, found


def _read_distances(asked: Question, numbers: Numbers, found: Grid) -> Reading:
    if "other_layer" not in numbers:
        return Reading()
    near, far = numbers["same_layer_other_loop"], numbers["other_layer"]
    how = "more than" if near < ALIKE * far else "less than" if far < ALIKE * near else "about as much as"
    return Reading([
        f"The patterns of one layer in two loops are {number(near)} apart on average, those of two layers "
        f"{number(far)} (Frobenius, per head and query): a layer resembles itself in other loops {how} it resembles "
        "other layers."
    ])  # fmt: skip


def _draw_distances(asked: Question, numbers: Numbers, found: Grid) -> list[Figure]:
    caption = "Distance between the attention patterns of any two executed layers (Frobenius, per head and query)."
    return [Figure(caption, found.panels(), 130 + 5 * len(asked.model.schedule.sites))]


def _measure_changes(asked: Question) -> tuple[Numbers, AttentionStability]:
    found = attention_stability(asked.deep, asked.of_length(2), stack=asked.last_stack, verbose=False)
    numbers = {"successive": found.successive, "mean_change_by_loop": found.successive.values.mean((1, 2))}
    return numbers | {"mean_over_heads": found.successive.values.mean(-1)}, found


def _read_changes(asked: Question, numbers: Numbers, found: AttentionStability) -> Reading:
    mean, first = numbers["mean_change_by_loop"], found.successive.labels["loop"][0]
    last = f", at the last of {counted(len(mean) + 1, 'loop')} by {number(mean[-1])}." if len(mean) > 1 else "."
    return Reading([f"From loop {int(first) - 1} to {first} a pattern changes by {number(mean[0])} on average{last}"])


def _draw_changes(asked: Question, numbers: Numbers, found: AttentionStability) -> list[Figure]:
    return [Figure("How far each pattern is from the one in the loop before, mean over heads.", found.panels())]


def _measure_heads(asked: Question) -> tuple[Numbers, AttentionViewer]:
    model, tokens = asked.model, asked.shown[:, :SHOWN_POSITIONS]
    asked.of_length(2)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("attn.hook_pattern"))
    view = attention_viewer(cache, asked.words(tokens[0]), max_bytes=SHOWN_WEIGHTS)
    layers = map(model.schedule.virtual, view.sites)
    patterns = {model.schedule.layer_name(i): cache["pattern", i][0].double().round(decimals=4) for i in layers}
    return {"patterns": patterns}, view


def _draw_heads(asked: Question, numbers: Numbers, view: AttentionViewer) -> list[Figure]:
    return [Figure("Where each head looks in the prompt that is shown.", view.html, is_wide=True)]


PARTS = (
    Part(_measure_distances, _read_distances, _draw_distances),
    Part(_measure_changes, _read_changes, _draw_changes),
    Part(_measure_heads, panels=_draw_heads),
    left_out(2),
)
