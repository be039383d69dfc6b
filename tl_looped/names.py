"""What the activations of a run are called: TransformerLens's names, and those that carry the loop.

Every virtual layer has the name `blocks.{i}` in TransformerLens, and one such as `loops.2.blocks.5` here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ._indices import pick_one, span
from ._words import counted
from .errors import OutOfRangeError, UnknownNameError

if TYPE_CHECKING:
    from .schedule import Pass, Schedule

_INDEX = r"(\*|-?\d+|(?:-?\d+)?:(?:-?\d+)?)"
_BLOCK = re.compile(rf"blocks\.{_INDEX}\.(.+)")
_EDGE = re.compile(rf"(prelude|coda)\.blocks\.{_INDEX}\.(.+)")
_LOOP = re.compile(rf"(?:(\w+)\.)?loops\.{_INDEX}(?:\.blocks\.{_INDEX})?\.(.+)")
_UNITS = {"head": "H", "neuron": "N"}  # parts of a layer, in labels


def stack_prefix(stack: str, mark: str = ".") -> str:
    """What names of a stack begin with, as in "L."; nothing where it is the only one that loops, "core".

    Args:
        stack: its name.
        mark: what follows it.
    """
    return "" if stack == "core" else f"{stack}{mark}"


def in_any_loop(name: str) -> str:
    """A loop-indexed name as the pattern of its like in every loop.

    Args:
        name: a loop-indexed name; others come back unchanged.

    Example:
        >>> in_any_loop("L.loops.3.blocks.0.attn.hook_z")
        'L.loops.*.blocks.0.attn.hook_z'
    """
    return re.sub(r"\bloops\.\d+\.", "loops.*.", name)


class HookNames:
    """The names of the layers and passes of a run, and what a name or pattern stands for.

    Args:
        schedule: the run.

    Example:
        >>> from tl_looped import Schedule
        >>> names = HookNames(Schedule(n_core=3, n_loops=4, n_prelude=2, n_coda=1))
        >>> names.name(7, "attn.hook_z")
        'loops.1.blocks.2.attn.hook_z'
        >>> names.expand("loops.2:.blocks.0.hook_resid_pre")
        ['blocks.8.hook_resid_pre', 'blocks.11.hook_resid_pre']
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    @property
    def pass_word(self) -> str:
        """What a pass is called in sentences: a loop, if there is one stack."""
        return "loop" if len(self.schedule.core_stacks) == 1 else "pass"

    def pass_prefix(self, p: Pass) -> str:
        """The loop-indexed name of a pass, without a hook, such as "loops.2".

        Args:
            p: one of `passes`.
        """
        return f"{stack_prefix(p.stack)}loops.{p.loop}"

    def name(self, index: int, hook: str) -> str:
        """The loop-indexed name of hook point `hook` of virtual layer `index`.

        Args:
            index: a virtual layer; negative ones count from the end.
            hook: such as "attn.hook_z".

        Raises:
            OutOfRangeError: there is no such layer.
        """
        return f"{self.layer_name(index)}.{hook}"

    def layer_name(self, index: int) -> str:
        """The loop-indexed name of a virtual layer, such as "loops.2.blocks.5".

        Args:
            index: a virtual layer; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such layer.
        """
        site = self.schedule.site(index)
        loop = "" if site.loop is None else f"loops.{site.loop}."
        return f"{stack_prefix(site.stack)}{loop}blocks.{site.layer}"

    def loop_name(self, name: str) -> str:
        """The loop-indexed spelling of a TransformerLens hook name; other names come back as they are.

        Args:
            name: such as "blocks.3.hook_mlp_out".

        Raises:
            OutOfRangeError: there is no such layer.
        """
        match = _BLOCK.fullmatch(name)
        return self.name(int(match[1]), match[2]) if match and match[1].lstrip("-").isdigit() else name

    def loop_of(self, name: str) -> int | None:
        """The loop of its stack that a name is of; None for one of no loop.

        Args:
            name: in either spelling.

        Example:
            >>> from tl_looped import Schedule
            >>> HookNames(Schedule(n_core=3, n_loops=4, n_prelude=2)).loop_of("blocks.6.hook_mlp_out")
            1
        """
        match = _LOOP.fullmatch(self.loop_name(name))
        return int(match[2]) if match and match[2].isdigit() else None

    def of_pass(self, name: str) -> tuple[str, int, str] | None:
        """The stack, the loop and the hook of a name that belongs to a pass itself; None for others.

        Args:
            name: in loop-indexed spelling, with indices that are not negative.

        Example:
            >>> from tl_looped import Schedule
            >>> names = HookNames(Schedule(n_core=3, n_loops=4))
            >>> names.of_pass("loops.2.norm.hook_scale"), names.of_pass("loops.2.blocks.0.hook_mlp_out")
            (('core', 2, 'norm.hook_scale'), None)
        """
        match = _LOOP.fullmatch(name)
        if match is None or match[3] is not None or not match[2].isdigit():
            return None
        return match[1] or "core", int(match[2]), match[4]

    def tl_label(self, label: str) -> str:
        """TransformerLens's label of a component or stream, from the loop-indexed one; others come back unchanged.

        Args:
            label: such as "loops.2.blocks.1.mlp_out".

        Example:
            >>> from tl_looped import Schedule
            >>> names = HookNames(Schedule(n_core=3, n_loops=4))
            >>> [names.tl_label(f"loops.1.blocks.0.{part}") for part in ("attn_out", "head.2", "neuron.7", "resid_mid")]
            ['3_attn_out', 'L3H2', 'L3N7', '3_mid']
        """
        name = self.expand(label)[0]
        layer = virtual_layer(name)
        if layer is None:
            return "final_post" if label == "final" else label
        part, _, unit = name.split(".", 2)[2].partition(".")
        return f"L{layer}{_UNITS[part]}{unit}" if unit else f"{layer}_{part.removeprefix('resid_')}"

    def loop_label(self, label: str) -> str:
        """The loop-indexed label of a component or stream, from TransformerLens's; the inverse of `tl_label`.

        Args:
            label: such as "5_mlp_out", "L5H3", "L5N17", "5_pre" or "final_post".

        Example:
            >>> from tl_looped import Schedule
            >>> [HookNames(Schedule(n_core=3, n_loops=4)).loop_label(label) for label in ("3_attn_out", "L3H2", "embed")]
            ['loops.1.blocks.0.attn_out', 'loops.1.blocks.0.head.2', 'embed']
        """
        if match := re.fullmatch(r"L(\d+)([HN])(\d+)", label):
            kind = next(kind for kind, letter in _UNITS.items() if letter == match[2])
            return self.name(int(match[1]), f"{kind}.{match[3]}")
        if match := re.fullmatch(r"(\d+)_(attn_out|mlp_out|pre|mid)", label):
            return self.name(int(match[1]), match[2] if "out" in match[2] else f"resid_{match[2]}")
        return "final" if label == "final_post" else label

    def expand(self, name: str) -> list[str]:
        """All TransformerLens names that a name or pattern in either spelling stands for.

        Indices may be negative (from the end), `*` (all) or `a:b` (a half-open range). Names without an index come back
        unchanged; whether the hook itself exists is for the bridge to say.

        Raises:
            OutOfRangeError: an index outside the run.
            UnknownNameError: a stack that this model does not have.
        """
        if match := _BLOCK.fullmatch(name):
            at, hook = match.groups()
            return [f"blocks.{i}.{hook}" for i in _pick(at, self.schedule.n_layers, name, "virtual layers")]
        if match := _EDGE.fullmatch(name):
            stack, at, hook = match.groups()
            first = self.schedule.first_layer(stack, None)
            return [f"blocks.{first + j}.{hook}" for j in _pick(at, self.schedule.stacks[stack], name, f"{stack} layers")]
        if match := _LOOP.fullmatch(name):
            stack, loop, layer, hook = match.groups()
            stack = stack or "core"
            if stack not in self.schedule.core_stacks:
                exist = " and ".join(f"'{stack_prefix(s)}loops.'" for s in self.schedule.core_stacks)
                raise UnknownNameError(f"{name!r} was asked, but the looped names of this model begin with {exist}.")
            loops = _pick(loop, self.schedule.n_loops_of(stack), name, "loops", self.schedule.is_unrolled(stack))
            if layer is None:
                return [f"{stack_prefix(stack)}loops.{t}.{hook}" for t in loops]
            layers = _pick(layer, self.schedule.stacks[stack], name, "layers in a loop")
            return [f"blocks.{self.schedule.first_layer(stack, t) + j}.{hook}" for t in loops for j in layers]
        return [name]

    def describe(self) -> str:
        """One line: what runs in this model."""
        run = self.schedule
        if run.order is not None:
            each = (f"{s} ({run.n_loops_of(s)} x {counted(run.stacks[s], 'layer')})" for s in run.core_stacks)
            core = f"stacks {' and '.join(each)}"
        elif run.l_cycles is None:
            core = f"one stack of {counted(run.n_core, 'layer')}"
        else:
            core = f"stacks L ({run.l_cycles} x per loop) and H of {counted(run.n_core, 'layer')}"
        edges = f"{run.n_prelude} prelude and {counted(run.n_coda, 'coda layer')}"
        return f"{counted(run.n_loops, 'loop')} over {core}, {edges}: {counted(run.n_layers, 'virtual layer')}"


def virtual_layer(name: str) -> int | None:
    """The virtual index in a TransformerLens name, `blocks.{i}` or `blocks.{i}.{hook}`; None for names outside the layers."""
    match = re.match(r"blocks\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def is_pattern(name: str) -> bool:
    """Whether a name may stand for several hook points."""
    return "*" in name or ":" in name


def _pick(token: str, n: int, asked: str, what: str, more_loops: bool = False) -> list[int]:
    if token == "*":
        chosen = list(range(n))
    elif ":" in token:
        start, stop = (int(end) if end else None for end in token.split(":"))
        chosen = list(range(n)[start:stop])
    else:
        return [pick_one(int(token), n, asked, what, more_loops)]
    if not chosen:
        raise OutOfRangeError(f"{asked!r} selects nothing: there are {n} {what}{span(n)}.")
    return chosen
