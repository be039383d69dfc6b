"""What a lens returns: its labels, targets, tables, texts, grids and parts."""

from __future__ import annotations

import html
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import with_words
from zoo import random_bridge, random_tokens, shared_bridge

from tl_looped import LoopedError
from tl_looped.errors import OutOfRangeError
from tl_looped.lenses import logit_lens
from tl_looped.schedule import Site

TOKENS = random_tokens()
pytestmark = pytest.mark.usefixtures("no_grad")


def test_labels_name_the_hooks_that_were_read() -> None:
    bridge = shared_bridge("parcae")
    result = logit_lens(bridge, TOKENS, targets=4)
    assert result.labels[:3] == ("prelude.blocks.0", "prelude.blocks.1", "loops.0.blocks.0")
    names = [bridge.expand_name(f"{label}.hook_resid_post") for label in result.labels]
    assert names == [[f"blocks.{i}.hook_resid_post"] for i in range(bridge.cfg.n_layers)]


def test_each_position_may_have_its_own_target() -> None:
    bridge = random_bridge("ouro")
    result = logit_lens(bridge, TOKENS[:, :-1], targets=TOKENS[:, 1:], positions=[1, 4])
    everything = logit_lens(bridge, TOKENS[:, :-1], targets=list(range(31)), positions=[1, 4])
    following = TOKENS[:, 1:][:, [1, 4], None]
    assert torch.equal(result.targets, following)
    assert torch.equal(result.ranks, everything.ranks.gather(-1, following.expand(len(result.layers), -1, -1, -1)))
    assert torch.equal(everything.ranks.sort(-1).values[0, 0, 0], torch.arange(31))
    with pytest.raises(LoopedError, match="own target"):
        result.rank_trajectory(3)


def test_shared_targets_in_every_spelling() -> None:
    bridge = with_words()
    whole = logit_lens(bridge, TOKENS, targets=[5, 9])
    for targets in (["t5", 9], torch.tensor([5, 9]), ["t5", "t9"]):
        assert torch.equal(logit_lens(bridge, TOKENS, targets=targets).ranks, whole.ranks)
    for target in (9, "t9", torch.tensor(9)):
        result = logit_lens(bridge, TOKENS, targets=target)
        assert torch.equal(result.rank_trajectory(), whole.rank_trajectory(9))
    named = logit_lens(bridge, TOKENS, targets=["t5", "t9"])
    assert torch.equal(named.rank_trajectory("t9"), whole.ranks[..., 1])
    assert torch.equal(named.rank_trajectory(5), whole.ranks[..., 0])
    for unclear in (None, "t7", 7):
        with pytest.raises(LoopedError, match="'t5', 't9'"):
            named.rank_trajectory(unclear)


def test_at_finds_the_row_of_a_site() -> None:
    result = logit_lens(shared_bridge("huginn"), TOKENS, targets=[1, 2], loops=[1, 2])
    for site, row in zip(result.sites, range(len(result.sites)), strict=True):
        cell = result.at(site.loop, site.layer)
        assert torch.equal(cell.ranks, result.ranks[row]) and torch.equal(cell.top_probs, result.top_probs[row])
    assert torch.equal(result.at(-1, -1).entropy, result.entropy[-1])
    with pytest.raises(LoopedError, match=r"loop=0, layer=2.*decoded loops\.1\.blocks\.0"):
        result.at(0, 2)
    with pytest.raises(OutOfRangeError, match="loop 7"):
        result.at(7, 0)
    with pytest.raises(LoopedError, match="'prelude' or 'coda'"):
        result.at(None, 0)
    hrm = logit_lens(shared_bridge("hrm_text"), TOKENS, targets=1)
    assert torch.equal(hrm.at(3, 1, stack="L").ranks, hrm.ranks[hrm.sites.index(Site("L", 3, 1))])
    with pytest.raises(LoopedError, match="'L' or 'H'"):
        hrm.at(1, 1)
    coda = logit_lens(shared_bridge("huginn"), TOKENS, targets=1)
    assert torch.equal(coda.at(None, 0, stack="coda").ranks, coda.ranks[-1])


def test_dataframe_has_one_row_per_site_batch_position_and_target() -> None:
    result = logit_lens(shared_bridge("huginn"), TOKENS, targets=[1, 2], positions=[2, -1])
    frame = result.to_dataframe()
    assert len(frame) == result.ranks.numel() == len(frame[["site", "batch", "pos", "target"]].drop_duplicates())
    for row, site in enumerate(result.sites):
        mine = frame[frame.site == result.labels[row]]
        assert set(mine["stack"]) == {site.stack} and set(mine.layer) == {site.layer}
        assert mine.loop.isna().all() if site.loop is None else set(mine.loop) == {site.loop}
        for batch, pos, target in ((0, 0, 1), (1, 1, 0)):
            cell = mine[(mine.batch == batch) & (mine.pos == (2, 6)[pos]) & (mine.target == (1, 2)[target])].iloc[0]
            place = (row, batch, pos)
            assert cell["rank"] == result.ranks[(*place, target)] and cell.top_token == result.top_tokens[(*place, 0)]
            assert math.isclose(cell.prob, result.probs[(*place, target)], rel_tol=1e-6)
            assert math.isclose(cell.log_prob, result.log_probs[(*place, target)], rel_tol=1e-6)
            assert math.isclose(cell.entropy, result.entropy[place], rel_tol=1e-6)
            assert math.isclose(cell.top_prob, result.top_probs[(*place, 0)], rel_tol=1e-6)


def test_dataframe_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    result = logit_lens(shared_bridge("ouro"), TOKENS, targets=1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_dataframe()


def test_text() -> None:
    bridge = with_words()
    tokens = bridge.to_tokens("t5 t17 t3")
    text = logit_lens(bridge, "t5 t17 t3", targets="t9")
    assert torch.equal(text.log_probs, logit_lens(bridge, tokens, targets=9).log_probs)
    assert torch.equal(text.log_probs, logit_lens(bridge, tokens[0], targets=9).log_probs)
    bridge.tokenizer.padding_side = "left"
    both = logit_lens(bridge, ["t5", "t5 t17 t3"], targets="t9", lens="native")
    alone = logit_lens(bridge, "t5", targets="t9", lens="native")
    torch.testing.assert_close(both.log_probs[:, :1, : alone.log_probs.shape[2]], alone.log_probs, atol=1e-4, rtol=0)


def test_text_needs_a_tokenizer() -> None:
    for tokens, target in (("t5", None), (TOKENS, "t5")):
        with pytest.raises(LoopedError, match=r"'t5'.*no tokenizer"):
            logit_lens(shared_bridge("huginn"), tokens, targets=target)


def test_the_grid_of_tokens() -> None:
    model = with_words()
    result = logit_lens(
        model,
        torch.tensor([[5, 17, 3], [5, 0, 0]]),
        targets=["t9", "t2"],
        lens="native",
        top_k=2,
        attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]),
    )
    figure = result.plot("tokens", colour="rank", target="t2")
    (cells,) = figure.data
    best = [[model.tokenizer.decode([i]) for i in row[0, :, 0].tolist()] for row in result.top_tokens]
    assert [[html.unescape(text) for text in row] for row in cells.text] == best
    assert list(figure.layout.xaxis.ticktext) == ["t5", "t17", "t3"]
    ranks = result.ranks[:, 0, :, 1].double()
    torch.testing.assert_close(10 ** torch.tensor(cells.z).double() - 1, ranks, atol=1e-4, rtol=1e-4)
    names = list(figure.layout.yaxis.ticktext)
    assert names[1:4] == ["prelude, layer 1", "loop 0, layer 0", "loop 0, layer 1"] and names[-1] == "coda, layer 0"
    lines = [(shape.y0, shape.line.width) for shape in figure.layout.shapes]
    assert {shape.line.color for shape in figure.layout.shapes if shape.line.width == 3} == {"#c44"}
    assert lines == [(1.5, 3), (4.5, 1.5), (7.5, 1.5), (10.5, 3)]  # prelude, between loops, coda
    said = cells.hovertext[2][1]
    assert said.startswith("loop 0, layer 0, position 1 t17<br>") and f"rank of the target {int(ranks[2, 1])}" in said
    for colour, right in (("prob", result.top_probs[..., 0]), ("entropy", result.entropy), ("kl", result.kl)):
        z = torch.tensor(result.plot("tokens", colour=colour, example=1).data[0].z)
        torch.testing.assert_close(z, right[:, 1, :1].double().to(z.dtype), atol=1e-6, rtol=1e-5)
    some = result.plot("tokens", positions=[-1, 0])
    assert list(some.layout.xaxis.ticktext) == ["t5", "t3"]
    assert [line.name for line in result.plot(positions=1).data] == ["t9", "t2"]


def test_tokens_that_plotly_would_eat() -> None:
    model = with_words()
    result = logit_lens(model, "t5 t3", top_k=1)
    odd = {**result.words, **dict.fromkeys((str(int(result.top_tokens[0, 0, 0, 0])),), "<b>\n$")}
    figure = replace(result, words=odd).plot("tokens")
    assert figure.data[0].text[0][0] == "&lt;b&gt;↵&#36;" and "&lt;b&gt;" in figure.data[0].hovertext[0][0]


def test_without_a_tokenizer_tokens_are_ids() -> None:
    result = logit_lens(shared_bridge("hrm_text"), TOKENS, top_k=1)
    figure = result.plot("tokens")
    assert list(figure.layout.xaxis.ticktext) == [str(i) for i in TOKENS[0].tolist()]
    assert figure.layout.yaxis.ticktext[0] == "L loop 0, layer 0"
    frame = result.to_dataframe()
    assert (frame.top_text == frame.top_token.astype(str)).all() and frame.token[1] == str(int(TOKENS[0, 1]))


def test_a_part_of_a_lens_is_selected_by_label_and_by_place() -> None:
    bridge = shared_bridge("huginn")  # a prelude, a core and a coda
    lens = logit_lens(bridge, TOKENS, targets=[3, 5])
    part = lens.sel(loop=[1, "coda"], layer=0, batch=-1, pos=slice(1, 3))
    assert part.labels == ("loops.1.blocks.0", "coda.blocks.0") and part.positions == (1, 2)
    rows = [lens.labels.index(label) for label in part.labels]
    assert torch.equal(part.ranks, lens.ranks[rows][:, [1], 1:3]) and torch.equal(part.kl, lens.kl[rows][:, [1], 1:3])
    assert torch.equal(part.tokens, lens.tokens[[1], 1:3]) and torch.equal(part.targets, lens.targets[[1], 1:3])
    assert torch.equal(part.at(1, 0).entropy, lens.at(1, 0).entropy[[1], 1:3])
    assert torch.equal(lens[-1, :, [-1]].top_tokens, lens.top_tokens[[-1]][:, :, [-1]])
    assert lens[..., 0].positions == (0,) and lens[1:3].labels == lens.labels[1:3]
    whole, some = (one.to_dataframe().drop(columns="batch") for one in (lens, part))
    assert len(some) == 8 and len(some.merge(whole, on=list(some.columns))) == 8
    for asked, says in (({"loop": 9}, "loop=9"), ({"pos": 7}, "pos=7"), ({"loop": "coda", "layer": 9}, "layer=9")):
        with pytest.raises(LoopedError, match=rf"^sel\({says.split('=')[0]}.*was asked"):
            lens.sel(**asked)
    with pytest.raises(LoopedError, match="no layer of this lens is so"):
        lens.sel(loop="coda", stack="core")


def test_lenses_of_two_batches_are_one_of_both() -> None:
    bridge = shared_bridge("ouro")
    whole = logit_lens(bridge, TOKENS)
    both: Any = sum(logit_lens(bridge, row[None]) for row in TOKENS)
    assert both.to_dataframe().drop(columns="batch").shape == whole.to_dataframe().drop(columns="batch").shape
    assert torch.equal(both.top_tokens, whole.top_tokens) and torch.equal(both.targets, whole.targets)
    torch.testing.assert_close(both.log_probs, whole.log_probs)
    for other in (
        logit_lens(bridge, TOKENS, lens="native"), logit_lens(bridge, TOKENS[:, :2]), logit_lens(bridge, TOKENS, top_k=2),
        logit_lens(bridge, TOKENS, loops=1), logit_lens(bridge, TOKENS, targets=3),
    ):  # fmt: skip
        with pytest.raises(LoopedError, match="was added to one with"):
            _ = whole + other


@pytest.mark.usefixtures("unchecked")
def test_figures_that_are_not_there() -> None:
    result: Any = logit_lens(shared_bridge("ouro"), TOKENS, targets=[1, 2])
    for asked, says in (
        ((0,), r"plot\(example=0\)"),
        (("heat",), "choose 'rank' or 'tokens'"),
    ):
        with pytest.raises(LoopedError, match=says):
            result.plot(*asked)
    for given, says in (
        ({"colour": "loud"}, "colour='loud' was asked; choose 'prob', 'entropy', 'rank', 'kl'"),
        ({"colour": "rank"}, r"target None was asked.*\[1, 2\]"),
        ({"positions": 9}, "out of range"),
        ({"example": 2}, "out of range"),
    ):
        with pytest.raises(LoopedError, match=says):
            result.plot("tokens", **given)
    with pytest.raises(LoopedError, match="are 2; ranks are drawn of one"):
        result.plot(positions=[0, 1])
    with pytest.warns(FutureWarning, match=r"\(pos=\) is now panels\(positions=\)"):
        result.plot(pos=0)
