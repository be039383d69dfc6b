"""Every virtual layer has one name, and every name finds its way back."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tl_looped.errors import LoopedError, OutOfRangeError, UnknownNameError
from tl_looped.schedule import Schedule, Site, is_pattern

HOOKS = ("hook_resid_pre", "attn.hook_z", "attn.q_norm.hook_scale", "mlp.hook_out")
ONE_STACK = Schedule(n_core=3, n_loops=4, n_prelude=2, n_coda=1)
TWO_STACKS = Schedule(n_core=2, n_loops=2, l_cycles=3)


@st.composite
def one_stack(draw: st.DrawFn) -> Schedule:
    sizes = [draw(st.integers(low, 5)) for low in (1, 1, 0, 0)]
    return Schedule(*sizes)


@st.composite
def two_stacks(draw: st.DrawFn) -> Schedule:
    return Schedule(n_core=draw(st.integers(1, 4)), n_loops=draw(st.integers(1, 4)), l_cycles=draw(st.integers(1, 4)))


schedules = st.one_of(one_stack(), two_stacks())
UNEVEN = Schedule.from_passes([("A", 2), ("B", 3), ("A", 2), ("A", 2), ("B", 3)], n_prelude=1, n_coda=2)


@st.composite
def any_order(draw: st.DrawFn) -> tuple[list[tuple[str, int]], int, int]:
    """Passes in any order, nested cycles among them, and the layers before and after them."""
    lengths = {stack: draw(st.integers(1, 3)) for stack in ("A", "B", "core")}
    order = draw(st.lists(st.sampled_from(list(lengths)), min_size=1, max_size=4))
    nested = (order * draw(st.integers(1, 2)) + draw(st.lists(st.sampled_from(order), max_size=2))) * draw(st.integers(1, 2))
    return [(stack, lengths[stack]) for stack in nested], draw(st.integers(0, 2)), draw(st.integers(0, 2))


def numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\.(\d+)\.", name.replace(".", "..") + ".")]


@given(schedules, st.sampled_from(HOOKS))
def test_every_virtual_index_round_trips_through_its_name(schedule: Schedule, hook: str) -> None:
    names = [schedule.name(i, hook) for i in range(schedule.n_layers)]
    assert len(set(names)) == schedule.n_layers
    for i, name in enumerate(names):
        assert schedule.names.expand(name) == [f"blocks.{i}.{hook}"]
        assert schedule.loop_name(f"blocks.{i}.{hook}") == name
        assert schedule.loop_name(name) == name
        assert schedule.virtual(schedule.site(i)) == i
        assert schedule.name(i - schedule.n_layers, hook) == name


@given(schedules)
def test_the_run_is_prelude_then_loops_then_coda(schedule: Schedule) -> None:
    """Names and physical layers against nested loops written out."""
    n_core = schedule.n_core
    order = [(f"prelude.blocks.{j}.x", j) for j in range(schedule.n_prelude)]
    core = schedule.n_prelude
    if schedule.l_cycles is None:
        order += [(f"loops.{t}.blocks.{j}.x", core + j) for t in range(schedule.n_loops) for j in range(n_core)]
        core += n_core
    else:
        step = 0
        for h in range(schedule.n_loops):
            for _ in range(schedule.l_cycles):
                order += [(f"L.loops.{step}.blocks.{j}.x", j) for j in range(n_core)]
                step += 1
            order += [(f"H.loops.{h}.blocks.{j}.x", n_core + j) for j in range(n_core)]
    order += [(f"coda.blocks.{j}.x", core + j) for j in range(schedule.n_coda)]
    assert [schedule.name(i, "x") for i in range(schedule.n_layers)] == [name for name, _ in order]
    assert list(schedule.physical) == [physical for _, physical in order]
    assert set(schedule.physical) == set(range(sum(schedule.stacks.values())))


@given(schedules)
def test_passes_tile_the_core(schedule: Schedule) -> None:
    tiles = [i for p in schedule.passes for i in p.layers]
    assert tiles == list(range(schedule.n_prelude, schedule.first_coda_layer))
    assert [p.index for p in schedule.passes] == list(range(len(schedule.passes)))
    for p in schedule.passes:
        assert [schedule.site(i) for i in p.layers] == [Site(p.stack, p.loop, j) for j in range(schedule.n_core)]
        assert all(schedule.pass_of_layer(i) is p for i in p.layers)
    for i in (*range(schedule.n_prelude), *range(schedule.first_coda_layer, schedule.n_layers)):
        assert schedule.pass_of_layer(i) is None


@given(schedules)
def test_loops_end_where_a_shorter_run_would(schedule: Schedule) -> None:
    for t in range(schedule.n_loops):
        shorter = Schedule(schedule.n_core, t + 1, schedule.n_prelude, schedule.n_coda, schedule.l_cycles)
        assert schedule.pass_of_loop(t) == shorter.passes[-1] == schedule.pass_of_loop(t - schedule.n_loops)
    assert [schedule.n_loops_of(s) for s in schedule.core_stacks] == [
        schedule.n_loops * (schedule.l_cycles or 1), schedule.n_loops
    ][-len(schedule.core_stacks) :]  # fmt: skip


@st.composite
def index_and_choice(draw: st.DrawFn, n: int) -> tuple[str, list[int]]:
    """An index as text, and what Python's own indexing says it selects."""
    kind = draw(st.sampled_from(["one", "all", "range"]))
    if kind == "all":
        return "*", list(range(n))
    ends = st.integers(-n, n)
    if kind == "range":
        start, stop = draw(st.none() | ends), draw(st.none() | ends)
        return f"{'' if start is None else start}:{'' if stop is None else stop}", list(range(n))[start:stop]
    i = draw(st.integers(-n, n - 1))
    return str(i), [list(range(n))[i]]


@given(schedules, st.data())
def test_patterns_select_what_filtering_all_names_selects(schedule: Schedule, data: st.DataObject) -> None:
    every = {schedule.name(i, "hook_z"): f"blocks.{i}.hook_z" for i in range(schedule.n_layers)}
    stack = data.draw(st.sampled_from([s for s, n in schedule.stacks.items() if n]))
    layer, layers = data.draw(index_and_choice(schedule.stacks[stack]))
    if stack in ("prelude", "coda"):
        name = f"{stack}.blocks.{layer}.hook_z"
        wanted = [plain for full, plain in every.items() if full.startswith(stack) and numbers(full)[0] in layers]
    else:
        loop, loops = data.draw(index_and_choice(schedule.n_loops_of(stack)))
        prefix = "loops." if stack == "core" else f"{stack}.loops."
        name = f"{prefix}{loop}.blocks.{layer}.hook_z"
        own = {full: plain for full, plain in every.items() if full.startswith(prefix)}
        wanted = [plain for full, plain in own.items() if numbers(full)[0] in loops and numbers(full)[1] in layers]
        assert is_pattern(name) == any(sign in name for sign in "*:")
        if loops:
            of_pass = [f"{prefix}{t}.hook_state" for t in loops]
            assert schedule.names.expand(f"{prefix}{loop}.hook_state") == of_pass
    if wanted:
        assert schedule.names.expand(name) == wanted
    else:
        with pytest.raises(OutOfRangeError, match="selects nothing"):
            schedule.names.expand(name)


@given(schedules, st.data())
def test_plain_names_take_patterns_too(schedule: Schedule, data: st.DataObject) -> None:
    index, chosen = data.draw(index_and_choice(schedule.n_layers))
    assume(chosen)
    assert schedule.names.expand(f"blocks.{index}.mlp.hook_out") == [f"blocks.{i}.mlp.hook_out" for i in chosen]


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_normalized", "unembed.hook_out", "blocks", "loops", ""])
def test_names_without_an_index_are_left_alone(name: str) -> None:
    assert ONE_STACK.names.expand(name) == [name]
    assert ONE_STACK.loop_name(name) == name
    assert not is_pattern(name)


@pytest.mark.parametrize(
    ("schedule", "name", "message"),
    [
        (ONE_STACK, "loops.4.blocks.0.hook_z", r"index 4 .* 4 loops \(0\.\.3\).*model\.unroll\(5\)"),
        (ONE_STACK, "loops.-5.blocks.0.hook_z", r"index -5 .* 4 loops \(0\.\.3\)\.$"),
        (ONE_STACK, "loops.0.blocks.3.hook_z", r"index 3 .* 3 layers in a loop \(0\.\.2\)"),
        (ONE_STACK, "loops.9.hook_out", r"index 9 .* 4 loops"),
        (ONE_STACK, "blocks.15.hook_z", r"index 15 .* 15 virtual layers \(0\.\.14\)"),
        (ONE_STACK, "prelude.blocks.2.hook_z", r"index 2 .* 2 prelude layers \(0\.\.1\)"),
        (ONE_STACK, "coda.blocks.1.hook_z", r"index 1 .* 1 coda layers \(0\.\.0\)"),
        (ONE_STACK, "loops.3:3.blocks.0.hook_z", "selects nothing"),
        (TWO_STACKS, "L.loops.6.hook_out", r"index 6 .* 6 loops \(0\.\.5\)"),
        (TWO_STACKS, "coda.blocks.0.hook_z", r"index 0 .* 0 coda layers\."),
    ],
)
def test_out_of_range_names_say_what_exists(schedule: Schedule, name: str, message: str) -> None:
    with pytest.raises(OutOfRangeError, match=message) as caught:
        schedule.names.expand(name)
    assert isinstance(caught.value, IndexError)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "name", "exist"),
    [
        (ONE_STACK, "L.loops.0.blocks.0.hook_z", "'loops.'"),
        (TWO_STACKS, "loops.0.blocks.0.hook_z", "'L.loops.' and 'H.loops.'"),
        (TWO_STACKS, "M.loops.0.hook_out", "'L.loops.' and 'H.loops.'"),
    ],
)
def test_unknown_stacks_are_refused(schedule: Schedule, name: str, exist: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        schedule.names.expand(name)
    assert isinstance(caught.value, KeyError)
    assert name in str(caught.value) and str(caught.value).endswith(f"begin with {exist}.")


@pytest.mark.parametrize("field", ["n_core", "n_loops", "l_cycles"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3"])
def test_counts_must_be_positive_ints(field: str, value: object, unchecked: None) -> None:
    with pytest.raises(LoopedError, match=re.escape(f"{field}={value!r} was asked")):
        Schedule(**{"n_core": 2, "n_loops": 2, field: value})


@pytest.mark.parametrize("field", ["n_prelude", "n_coda"])
@pytest.mark.parametrize("value", [-1, False, 0.0, None])
def test_edges_may_be_empty_but_not_negative(field: str, value: object, unchecked: None) -> None:
    assert Schedule(2, 2, **{field: 0}).n_layers == 4
    with pytest.raises(LoopedError, match=re.escape(f"{field}={value!r} was asked")):
        Schedule(2, 2, **{field: value})


@pytest.mark.parametrize("index", [True, 1.0, "1", None])
def test_an_index_is_an_int(index: object, unchecked: None) -> None:
    for lookup in (ONE_STACK.layer, ONE_STACK.loop, ONE_STACK.site, ONE_STACK.pass_of_loop):
        with pytest.raises(LoopedError, match="an index is an int"):
            lookup(index)


def test_loops_and_layers_out_of_range() -> None:
    with pytest.raises(OutOfRangeError, match=r"n_loops= or use model\.unroll\(5\)"):
        ONE_STACK.loop(4)
    with pytest.raises(OutOfRangeError, match="15 virtual layers"):
        ONE_STACK.name(15, "hook_z")
    with pytest.raises(OutOfRangeError, match=r"loop 4 is out of range: there are 4 loops \(0\.\.3\)"):
        ONE_STACK.virtual(Site("core", 4, 0))
    with pytest.raises(OutOfRangeError, match=r"there are 3 layers in stack 'core' \(0\.\.2\)"):
        ONE_STACK.virtual(Site("core", 0, 3))
    with pytest.raises(OutOfRangeError, match="this run has 4 loops over one stack of 3 layers"):
        ONE_STACK.virtual(Site("core", None, 0))
    assert ONE_STACK.virtual(Site("core", -1, -1)) == 13
    assert ONE_STACK.loop(-1) == 3 and ONE_STACK.layer(-15) == 0


def test_description_counts_everything() -> None:
    assert ONE_STACK.describe() == "4 loops over one stack of 3 layers, 2 prelude and 1 coda layer: 15 virtual layers"
    assert TWO_STACKS.describe().startswith("2 loops over stacks L (3 x per loop) and H of 2 layers")
    assert TWO_STACKS.n_layers == 2 * (3 + 1) * 2


def test_loop_selectors() -> None:
    schedule = Schedule(n_core=2, n_loops=3, l_cycles=2)
    assert schedule.select_loops("all", "L") == [0, 1, 2, 3, 4, 5] and schedule.select_loops("last", "L") == [5]
    assert schedule.select_loops(-2, "H") == [1] and schedule.select_loops((2, 0), "H") == [2, 0]
    assert [p.index for p in schedule.passes_of(slice(1, 4), "L")] == [1, 3, 4]
    with pytest.raises(LoopedError, match="pass stack='L' or stack='H'"):
        schedule.select_loops("all")
    for wrong in ([], slice(3, None)):
        with pytest.raises(OutOfRangeError, match="selects nothing"):
            schedule.select_loops(wrong, "H")
    with pytest.raises(OutOfRangeError, match="loop 3 is out of range"):
        schedule.select_loops([0, 3], "H")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["first", 1.5, [True], ["a"], None])
def test_what_is_no_loop_selector_is_refused(wrong: object) -> None:
    with pytest.raises(LoopedError, match="was asked"):
        Schedule(n_core=2, n_loops=3).select_loops(wrong)


def test_an_index_of_a_layer_may_be_negative_and_must_exist() -> None:
    assert ONE_STACK.pass_of_layer(-2) is ONE_STACK.passes[-1] and ONE_STACK.pass_of_layer(-1) is None
    with pytest.raises(OutOfRangeError, match="layer 99"):
        ONE_STACK.pass_of_layer(99)
    assert ONE_STACK.layer_name(-2) == "loops.3.blocks.2" and Schedule(1, 1).describe() == (
        "1 loop over one stack of 1 layer, 0 prelude and 0 coda layers: 1 virtual layer"
    )


def test_an_order_that_no_family_has() -> None:
    names = "prelude.blocks.0 A.loops.0.blocks.0 A.loops.0.blocks.1 B.loops.0.blocks.0 B.loops.0.blocks.1 B.loops.0.blocks.2 "
    names += "A.loops.1.blocks.0 A.loops.1.blocks.1 A.loops.2.blocks.0 A.loops.2.blocks.1 "
    names += "B.loops.1.blocks.0 B.loops.1.blocks.1 B.loops.1.blocks.2 coda.blocks.0 coda.blocks.1"
    assert [UNEVEN.layer_name(i) for i in range(UNEVEN.n_layers)] == names.split()
    assert UNEVEN.stacks == {"prelude": 1, "A": 2, "B": 3, "coda": 2} and UNEVEN.core_stacks == ("A", "B")
    assert UNEVEN.physical == (0, 1, 2, 3, 4, 5, 1, 2, 1, 2, 3, 4, 5, 6, 7)
    assert (UNEVEN.n_loops, UNEVEN.n_loops_of("A"), UNEVEN.n_passes, UNEVEN.first_coda_layer) == (2, 3, 5, 13)
    assert [UNEVEN.pass_of_loop(t).index for t in range(2)] == [1, 4] and UNEVEN.is_last(UNEVEN.passes[4])
    assert UNEVEN.names.expand("A.loops.1:.blocks.-1.x") == ["blocks.7.x", "blocks.9.x"]
    assert UNEVEN.names.expand("B.loops.*.hook_out") == ["B.loops.0.hook_out", "B.loops.1.hook_out"]
    assert UNEVEN.describe() == (
        "2 loops over stacks A (3 x 2 layers) and B (2 x 3 layers), 1 prelude and 2 coda layers: 15 virtual layers"
    )
    with pytest.raises(OutOfRangeError, match=r"there are 2 loops \(0\.\.1\)\.$"):  # unroll knows no more of this order
        UNEVEN.loop(2)
    with pytest.raises(LoopedError, match="stacks A and B; pass stack='A' or stack='B'"):
        UNEVEN.looped_stack()
    assert eval(repr(UNEVEN), {"Schedule": Schedule}) == UNEVEN


def test_the_stack_that_runs_last_ends_the_loops() -> None:
    schedule = Schedule.from_passes([("A", 1), ("B", 2), ("A", 1)])
    assert schedule.core_stacks == ("B", "A") and schedule.n_loops == 2
    assert [schedule.pass_of_loop(t).index for t in (0, 1)] == [0, 2]


@given(any_order())
def test_any_order_of_passes_has_names_that_find_back(made: tuple[list[tuple[str, int]], int, int]) -> None:
    passes, schedule = made[0], Schedule.from_passes(*made)
    assert [(p.stack, p.n_layers) for p in schedule.passes] == passes
    seen: dict[str, int] = {}
    layer = schedule.n_prelude
    for p in schedule.passes:
        assert (p.loop, p.first) == (seen.get(p.stack, 0), layer)
        seen[p.stack], layer = p.loop + 1, layer + p.n_layers
    assert layer == schedule.first_coda_layer and {s: schedule.n_loops_of(s) for s in seen} == seen
    names = [schedule.name(i, "hook_z") for i in range(schedule.n_layers)]
    assert len(set(names)) == len(names)
    for i, name in enumerate(names):
        assert schedule.names.expand(name) == [f"blocks.{i}.hook_z"] and schedule.virtual(schedule.site(i)) == i
        assert schedule.loop_name(f"blocks.{i}.hook_z") == name
        assert schedule.pass_of_layer(i) is next((p for p in schedule.passes if i in p.layers), None)


@given(schedules)
def test_the_passes_of_a_formula_are_that_formula(schedule: Schedule) -> None:
    passes = [(p.stack, p.n_layers) for p in schedule.passes]
    assert Schedule.from_passes(passes, schedule.n_prelude, schedule.n_coda) == schedule


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "no passes"),
        ([("A", 2), ("A", 3)], r"'A' runs with \[2, 3\] layers"),
        ([("A", 0)], "layers of 'A'=0 was asked"),
        ([("coda", 1)], "a stack 'coda' was asked"),
        ([("A.b", 1)], "a stack 'A.b' was asked"),
    ],
)
def test_passes_that_are_no_schedule_are_refused(passes: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(LoopedError, match=message):
        Schedule.from_passes(passes)


@given(any_order())
def test_the_loop_of_a_pass_is_the_one_that_has_it(made: tuple[list[tuple[str, int]], int, int]) -> None:
    passes, n_prelude, n_coda = made
    schedule = Schedule.from_passes(passes, n_prelude, n_coda)
    ends, loop, seen = passes[-1][0], 0, dict.fromkeys((stack for stack, _ in passes), 0)
    for p, (stack, _) in zip(schedule.passes, passes, strict=True):
        assert schedule.in_loop(p) == (loop, seen[stack])
        seen[stack] += 1
        if stack == ends:  # a loop ends when the stack that runs last has run
            loop, seen = loop + 1, dict.fromkeys(seen, 0)
