"""How the files of the package hang together: who imports whom, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tl_looped"
FILES = {path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
N_LINES = 450
TOOLS = (
    "activations",
    "analysis",
    "attribution",
    "figures",
    "interventions",
    "lenses",
    "metrics",
    "patching",
    "report",
    "results",
    "runs",
    "sites",
)


def imported(name: str, *, when_loaded: bool) -> Iterator[str]:
    """What a module imports, as absolute names: everything, or what runs when it is loaded."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(FILES[name].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        later = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not when_loaded or not (isinstance(node, later) or for_types):
            pending.extend(ast.iter_child_nodes(node))


def test_only_the_bridge_imports_transformer_lens() -> None:
    def does(name: str) -> bool:
        return any(f"{module}.".startswith("transformer_lens.") for module in imported(name, when_loaded=False))

    assert does("tl_looped.bridge.names")
    assert [name for name in FILES if does(name) and not name.startswith("tl_looped.bridge.")] == []


def test_numbers_know_panels_and_only_figures_know_plotly() -> None:
    of = {name: [*imported(name, when_loaded=False)] for name in FILES}
    plotly = [name for name, found in of.items() if any(f"{module}.".startswith("plotly.") for module in found)]
    assert plotly == ["tl_looped.figures.plotly"]
    assert [name for name in of if room(name) in ("results", "panels") and any(room(m) == "figures" for m in of[name])] == []


def room(name: str) -> str:
    """The package or module directly under `tl_looped` in which a module lies."""
    return ".".join(name.split(".")[1:2])


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    modules = {name.removesuffix(".__init__"): name for name in FILES}
    needs: dict[str, set[str]] = {}
    for name in FILES:
        found = {m if m in modules else m.rpartition(".")[0] for m in imported(name, when_loaded=True)} & modules.keys()
        needs.setdefault(room(name), set()).update({room(m) for m in found} - {room(name), ""})
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as circle:
        raise AssertionError(" <- ".join(circle.args[1])) from None
    assert order.index("schedule") < order.index("looped") < min(map(order.index, TOOLS))
    assert order.index("schedule") < order.index("model") < order.index("bridge")


def test_tools_import_neither_the_bridge_nor_the_model() -> None:
    inside = ("tl_looped.bridge", "tl_looped.model")
    found = {
        name: sorted(m for m in imported(name, when_loaded=False) if f"{m}.".startswith(tuple(f"{i}." for i in inside)))
        for name in FILES
        if room(name) in TOOLS
    }
    assert len(found) > 20 and {name: modules for name, modules in found.items() if modules} == {}


def test_no_file_is_long() -> None:
    """Of the package or of tests: one concept a file."""
    tests = {path.name: path for path in Path(__file__).parent.glob("test_*.py")}
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in (FILES | tests).items()}
    assert {name: n for name, n in lines.items() if n > N_LINES} == {}
