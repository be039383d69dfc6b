"""Loop kinds of one's own: what follows from them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.lenses import logit_lens
from tl_looped.model import Repeat, loops, register_loop
from tl_looped.model.inputs import masks_of
from tl_looped.model.layers import Inputs

SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 2, "d_vocab": 19, "n_core": 2, "n_prelude": 1, "n_coda": 1, "n_loops": 3}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Halfway(Repeat):
    def written(self, parts: Any, x: Tensor, entered: Tensor | None) -> Tensor:
        assert entered is not None
        return 0.5 * (x + entered)


class Misspelt(Repeat):
    def written(self, parts: Any, x: Tensor, entered: Tensor | None) -> Tensor:
        return parts("gaet", x)


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loops, "_KINDS", dict(loops._KINDS))
    register_loop("halfway", Halfway)
    yield


def halfway(**changes: Any) -> LoopedBridge:
    return LoopedBridge.from_config(LoopedConfig(**{**SIZES, "loop": "halfway", **changes}), seed=0).to(torch.float64)


def states_by_hand(bridge: LoopedBridge, n_loops: int, tokens: Tensor = TOKENS) -> tuple[list[Tensor], Tensor]:
    """The states before every pass and after the last, and the logits."""
    model, x = bridge.plain, bridge.plain.embed(tokens)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    inputs = Inputs(model.rotary(positions), masks_of(model.cfg, x, None, None, 0))
    states = [model.blocks[0](x, inputs)]
    for _ in range(n_loops):
        x = model.blocks[2](model.blocks[1](states[-1], inputs), inputs)  # the layers of every pass have one set of weights
        states.append((x + states[-1]) / 2)
    return states, model.unembed(model.ln_final(model.blocks[-1](states[-1], inputs)))


@torch.no_grad()
def test_every_way_through_the_loop_is_the_kinds() -> None:
    bridge = halfway()
    states, logits = states_by_hand(bridge, 3)
    found, cache = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(found, logits)
    for t in range(3):
        torch.testing.assert_close(cache[f"loops.{t}.hook_state"], states[t])
        torch.testing.assert_close(bridge.readout(TOKENS, loop=t), states_by_hand(bridge, t + 1)[1])
    parts = cache.attribute_logits(tokens=7)
    torch.testing.assert_close(parts.values.sum(0), logits[:, -1, 7])
    lens = logit_lens(bridge, TOKENS, targets=7, lens="native")
    last = bridge.schedule.pass_of_loop(1).layers[-1]
    expected = states_by_hand(bridge, 2)[1].log_softmax(-1)[..., 7]
    torch.testing.assert_close(lens.log_probs[lens.layers.index(last), ..., 0].double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_generation_under_an_exit_policy_reads_the_kinds_states() -> None:
    bridge, text = halfway(), TOKENS
    bridge.exit_policy = lambda history: torch.tensor([history.loop >= 1, history.loop >= 0])
    found = bridge.generate(TOKENS, 4, do_sample=False, verbose=False, stop_at_eos=False)
    for _ in range(4):  # the first row is read after two loops, the second after one
        logits = [states_by_hand(bridge, n_loops, text)[1][row, -1] for row, n_loops in ((0, 2), (1, 1))]
        text = torch.cat((text, torch.stack(logits).argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, text)


def test_what_is_no_running_sum_is_refused_without_a_word_of_the_kind() -> None:
    bridge = halfway()
    with pytest.raises(LoopedError, match=r"kind 'halfway' changes what its passes write"):
        bridge.all_composition_scores("Q")
    stream = bridge.run_with_cache(TOKENS)[1]["resid_pre", 2]
    with pytest.raises(LoopedError, match=r"kind 'halfway', whose state also needs what entered"):
        bridge(stream, start_at_layer=2)


def test_a_misspelt_part_is_an_error() -> None:
    register_loop("misspelt", Misspelt)
    with pytest.raises(LoopedError, match=r"Misspelt called the part 'gaet'.*pass_parts"):
        halfway(loop="misspelt")(TOKENS)


def test_names_of_kinds() -> None:
    with pytest.raises(LoopedError, match=r"'halfway' was registered .* choose another"):
        register_loop("halfway", Misspelt)
    with pytest.raises(LoopedError, match=r"loop='spiral' was asked.*known are"):
        halfway(loop="spiral")
    for changes in ({"strategy": "anchored"}, {"l_cycles": 2, "injection": "add", "initial_state": "learned"}):
        with pytest.raises(LoopedError, match="loop='halfway' goes with one stack"):
            LoopedConfig(
                **{**SIZES, "n_prelude": 0, "n_coda": 0, "loop": "halfway", "pass_norm": "l_cycles" in changes, **changes}
            )


def test_options_are_what_a_file_keeps() -> None:
    assert LoopedConfig(**SIZES, options={"rank": 3}).options == {"rank": 3}
    with pytest.raises(LoopedError, match=r"options=.*JSON"):
        LoopedConfig(**SIZES, options={"rank": torch.ones(2)})
    with pytest.raises(LoopedError, match="gate_rank=None"):
        halfway(loop="gated")


def test_an_epsilon_of_zero_is_zero() -> None:
    bridge = LoopedBridge.from_config(LoopedConfig(**SIZES, qk_norm="head", qk_norm_eps=0.0, norm_eps=0.5), seed=0)
    assert bridge.plain.blocks[0].attn.q_norm.eps == 0.0 and bridge.plain.ln_final.eps == 0.5
