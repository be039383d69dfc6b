"""`check_family`: green for every family, and red, in the right place, for models that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import CHECKPOINTS, GOLDEN, random_bridge, slow_but

import tl_looped
from tl_looped import LoopedBridge, LoopedCache, LoopedConfig, LoopedError
from tl_looped.model.norms import RMSNorm
from tl_looped.testing import FamilyError, check_family

FIXED = {"mor_token", "mor_expert"}  # whose number of loops cannot be chosen
NOT_GOLDEN = {"looped_qwen", "anchored"}
CHECKED_ELSEWHERE = {"inkling2_loop", "looped_nanochat"}  # with larger configurations, in files of their own
REFUSES = {
    "llama_rrt": {"sharing"},
    "mor_token": {"depth"},
    "mor_expert": {"kv cache", "sharing", "depth"},
}


@pytest.mark.parametrize("checkpoint", slow_but(set(CHECKPOINTS) - CHECKED_ELSEWHERE, CHECKPOINTS))
def test_every_golden_checkpoint_is_green(checkpoint: str) -> None:
    """With few loops, which is cheaper; what is refused is known."""
    few = {} if checkpoint in FIXED else {"n_loops": 2}
    report = check_family(LoopedBridge.from_pretrained(GOLDEN / checkpoint, device="cpu", **few))
    refused = {outcome.check for outcome in report.outcomes if outcome.status == "refused"}
    assert refused == {"parity"} | REFUSES.get(checkpoint, set())


@pytest.mark.parametrize("name", slow_but(NOT_GOLDEN))
def test_random_models_are_green(name: str) -> None:
    report = check_family(random_bridge(name, torch.float64, n_loops=2), reference=None)
    assert {o.check for o in report.outcomes if o.status != "passed"} == {"parity"}


def test_a_checkpoint_that_transformers_knows_is_compared_with_its_class() -> None:
    report = check_family(GOLDEN / "hrm_text", checks=["parity"])
    assert report["parity"].status == "passed" and "logits differ by" in report["parity"].detail


def test_a_traced_model_passes_what_it_does_not_refuse() -> None:
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(GOLDEN / "hrm_text").eval()
    model = LoopedBridge.trace(module, torch.tensor([[5, 17, 3, 60, 8]]))
    report = check_family(model, reference=lambda tokens: module(tokens).logits)
    status = {outcome.check: outcome.status for outcome in report.outcomes}
    refused = {"kv cache", "attribution", "sharing", "depth", "saving"}
    assert {check for check, found in status.items() if found == "refused"} == refused
    assert "of a traced module only calls are known" in report["attribution"].detail


def other_loops_too(model: LoopedBridge) -> None:
    """A hook of one pass fires in all, as where layers are told apart by their number alone."""
    right = model._expand_hooks

    def expand(hooks: Any) -> Any:
        found = []
        for name, function in right(hooks):
            loop_name = model.schedule.loop_name(name)
            head, _, tail = loop_name.partition("loops.")
            everywhere = model.expand_name(f"{head}loops.*.{tail.partition('.')[2]}") if tail else [name]
            found += [(one, function) for one in everywhere]
        return found

    model.__dict__["_expand_hooks"] = expand


def one_slot(model: LoopedBridge) -> None:
    """All passes keep their keys and values in the slots of the first."""
    schedule = model.schedule
    first = schedule.passes[0]
    for p in schedule.passes:
        for j in range(p.n_layers):
            layer: Any = model.plain.blocks[p.first + j]
            layer.attn.slot = first.first + j


def no_mask(model: LoopedBridge) -> None:
    """Padding is seen."""
    right = model.plain.forward
    model.plain.forward = lambda *args, **kwargs: right(*args, **{**kwargs, "attention_mask": None})  # type: ignore[method-assign]


def weights_of_one_pass(model: LoopedBridge) -> None:
    """A pass has weights of its own that were trained apart."""
    layer: Any = model.plain.blocks[model.schedule.passes[-1].first]
    layer.mlp.down.weight = nn.Parameter(layer.mlp.down.weight.detach() * 1.5)


def stray_hook(model: LoopedBridge) -> None:
    """A run leaves a hook that nobody asked for."""
    right = model.run_with_cache

    def run(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        model.hook_dict["hook_embed"].add_hook(lambda x, hook: x)
        return found

    model.run_with_cache = run  # type: ignore[method-assign]


BROKEN: dict[str, tuple[Callable[[LoopedBridge], None], set[str], str]] = {
    "a hook fires in all passes": (other_loops_too, {"own cache", "one pass"}, "fired 3 times in a run|put back in"),
    "a cache slot is shared": (one_slot, {"kv cache"}, "the cache that the model made is refused"),
    "padding is ignored": (no_mask, {"padding"}, "padded on the left"),
    "a pass has weights of its own": (weights_of_one_pass, {"sharing"}, "is another weight than"),
    "a hook is left": (stray_hook, {"left alone"}, "a hook is left at"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_fail_the_right_check(fault: str) -> None:
    breaks, expected, says = BROKEN[fault]
    model = random_bridge("ouro", torch.float64)
    breaks(model)
    with pytest.raises(FamilyError, match=says) as raised:
        check_family(model)
    failed = {outcome.check for outcome in raised.value.report.failed}
    assert expected <= failed, raised.value.report
    assert isinstance(raised.value, AssertionError) and all(name in str(raised.value) for name in failed)


def test_a_weight_forgotten_in_attribution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_bridge("ouro", torch.float64)
    monkeypatch.setattr(RMSNorm, "frozen", lambda self, x, scale: x / scale)
    with pytest.raises(FamilyError, match=r"the components of ln_final\.hook_in do not sum to it") as raised:
        check_family(model)
    assert [outcome.check for outcome in raised.value.report.failed] == ["attribution"]


def test_a_scale_forgotten_where_directions_are_pulled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_bridge("huginn", torch.float64)
    right = LoopedCache.attribute_logits

    def attribute(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = right(self, *args, **kwargs)
        found.values[0] /= model.looped_cfg.embed_scale  # the embedding comes first
        return found

    monkeypatch.setattr(LoopedCache, "attribute_logits", attribute)
    with pytest.raises(FamilyError, match="the sum over every component and the logit differ by") as raised:
        check_family(model, checks=["attribution", "names"])
    assert [outcome.check for outcome in raised.value.report.failed] == ["attribution"]


def test_another_reference_fails() -> None:
    model = random_bridge("ouro", torch.float64)
    right: Callable[[Tensor], Tensor] = lambda tokens: model.plain(tokens).logits  # noqa: E731
    assert check_family(model, reference=right, checks=["parity"])["parity"].status == "passed"
    with pytest.raises(FamilyError, match=r"logits differ by 0\.01"):
        check_family(model, reference=lambda tokens: right(tokens) + 0.01, checks=["parity"])
    with pytest.raises(FamilyError, match=r"have shape \[2, 6, 31\], not \[2, 7, 31\]"):
        check_family(model, reference=lambda tokens: right(tokens[:, 1:]), checks=["parity"])


def test_a_model_that_crashes_fails_and_the_other_checks_go_on() -> None:
    model = random_bridge("ouro")

    def crash(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such file")

    model.save_pretrained = crash  # type: ignore[method-assign]
    with pytest.raises(FamilyError, match="it raised RuntimeError: no such file") as raised:
        check_family(model)
    assert [outcome.check for outcome in raised.value.report.failed] == ["saving"]


def test_the_report_is_a_table() -> None:
    report = check_family(random_bridge("ouro"), checks=["names", "parity"])
    assert [outcome.check for outcome in report.outcomes] == ["parity", "names"] and report.failed == []
    lines = repr(report).splitlines()
    assert lines[0] == "ouro: 1 passed, 1 refused" and lines[1].startswith("refused  parity ")
    assert max(map(len, lines)) <= 100
    assert "<table" in report._repr_html_() and "no reference was given" in report._repr_html_()


def test_what_cannot_be_checked() -> None:
    with pytest.raises(LoopedError, match=r"there are parity, names, own cache"):
        check_family(random_bridge("ouro"), checks=["name"])
    with pytest.raises(LoopedError, match="pass a LoopedBridge"):
        check_family(3)  # type: ignore[arg-type]
    with pytest.raises(LoopedError, match="two rows of four tokens"):
        check_family(random_bridge("ouro"), tokens=torch.zeros(1, 9, dtype=torch.long))
    small = LoopedBridge.from_config(LoopedConfig(d_model=8, n_heads=2, d_vocab=3, n_core=1, n_loops=1, n_ctx=7))
    assert not check_family(small).failed


def test_no_pytest_is_needed() -> None:
    files = (Path(tl_looped.__file__).parent).rglob("*.py")
    assert [file.name for file in files if "import pytest" in file.read_text(encoding="utf-8")] == []
