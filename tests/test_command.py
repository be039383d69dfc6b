"""The command as a process, and what `import tl_looped` costs: started as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tl_looped
from tl_looped.cli import main, parser

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
COMMAND = [str(Path(sys.executable).parent / "tl-looped")]


def python(code: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **settings}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=100, check=False
    )


HEAVY = "assert not {'torch', 'transformer_lens', 'transformers', 'numpy', 'pandas', 'plotly'} & {*sys.modules}"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("--help", 0, "sweep-init"),
        ("report --help", 0, "--corrupted"),
        ("--version", 0, f"tl-looped {tl_looped.__version__}"),
        ("len", 2, "no command 'len'; did you mean lens?"),
        ("lens toy:hop --promt x", 2, "no option --promt; did you mean --prompt?"),
        ("info --revison=main toy:hop", 2, "no option --revison; did you mean --revision?"),
        ("lens toy:hop --tokens 5,a", 2, "'5,a' is no list of token ids such as 5,17,3"),
        ("report --banana", 2, "no option --banana; there are --help, --prompt"),
    ],
)
def test_what_needs_no_model_imports_none(arguments: str, status: int, says: str) -> None:
    code = f"import sys; from tl_looped.cli import main\ntry: sys.exit(main())\nfinally: {HEAVY}"
    ended = python(code, *arguments.split())
    assert ended.returncode == status and says in ended.stdout + ended.stderr, ended.stderr
    if status:
        assert len(ended.stderr.splitlines()) == 1 and not ended.stdout


def test_importing_the_package_is_cheap_and_everything_is_there() -> None:
    names = "analysis, attribution, interventions, patching, path_patching, plots, report, toys, results, checkpoints"
    code = f"""
import sys, tl_looped
{HEAVY}
assert {{*tl_looped.__all__}} <= {{*dir(tl_looped)}} and tl_looped.__version__[0].isdigit()
print(*(getattr(tl_looped, name).__name__ for name in "{names}".split(", ")))
assert tl_looped.analysis.fixed_points and tl_looped.toys.hop_prompts and tl_looped.report.report
from tl_looped import *
assert LoopedBridge is tl_looped.LoopedBridge is tl_looped.bridge.looped_bridge.LoopedBridge and Schedule and exits.KL
try: tl_looped.LoopedBrigde
except AttributeError as error: assert error.name == "LoopedBrigde" and error.obj is tl_looped
else: assert False
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [f"tl_looped.{name}" for name in names.split(", ")]


def test_the_names_for_type_checkers_are_those_that_can_be_imported() -> None:
    import ast

    (only_typed,) = (n for n in ast.parse(Path(tl_looped.__file__).read_text()).body if isinstance(n, ast.If))
    imported = [name.name for line in only_typed.body if isinstance(line, ast.ImportFrom) for name in line.names]
    assert sorted(imported) == sorted(tl_looped.__all__)
    assert all(getattr(tl_looped, name) is not None for name in imported)


@pytest.mark.parametrize("module", ["tl_looped", "tl_looped.cli"])
def test_the_command_is_a_module_too(module: str) -> None:
    ended = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("tl-looped ")


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("lens toy:hop --tokens 1", "--loops 3", "n_loops=3"),
        ("report", "--loops=3", "n_loops=3"),
        ("report", "--corrupt x", "corrupted='x'"),
        ("sweep-init", "--layers 3", "n_layers=3"),
        ("sweep-init", "--width 8", "d_model=8"),
    ],
)
def test_old_options_are_accepted_with_a_note(command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args([*command.split(), *old.split()])
    name = old.replace("=", " ").split()[0]
    assert new in repr(args)
    assert capsys.readouterr().err == f"tl-looped: {name} is now --{new.partition('=')[0].replace('_', '-')}\n"
    with pytest.raises(SystemExit):
        main([command.split()[0], "--help"])
    assert f"{name} " not in capsys.readouterr().out


INTERRUPTED = "tl-looped: interrupted\n"
SIGNAL = "import os, signal, time; ctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
WORK = SIGNAL + "import sys; from tl_looped import cli; import tl_looped.cli.info; sys.argv = ['tl-looped', 'info']\n"


def test_ctrl_c_during_imports_ends_in_one_line(tmp_path: Path) -> None:
    """Of a library that takes the exception for its own failure, as some do."""
    (tmp_path / "torch.py").write_text(SIGNAL + "try: ctrl_c(); time.sleep(60)\nexcept BaseException: raise ImportError")
    ended = subprocess.run(
        [*COMMAND, "info"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(tl_looped.__file__).parents[1]}"},
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, INTERRUPTED)


@pytest.mark.parametrize(
    "work",
    [
        "ctrl_c(); time.sleep(60)",
        "try: ctrl_c(); time.sleep(60)\n    except KeyboardInterrupt: ctrl_c(); time.sleep(60)",  # while it keeps what it has
        "class A:\n        def __del__(self): ctrl_c(); time.sleep(0)\n    A(); time.sleep(60)",  # which Python forgets
        "import atexit; atexit.register(ctrl_c); return 0",  # as Python ends
    ],
)
def test_ctrl_c_during_work_ends_in_one_line(work: str) -> None:
    ended = python(f"{WORK}def run(args):\n    {work}\ncli.info.run = run\nsys.exit(cli.main())")
    assert (ended.returncode, ended.stderr) == (130, INTERRUPTED)


def test_a_second_ctrl_c_ends_c_code_that_does_not_come_back() -> None:
    """It waits for a lock that it holds; Python runs no handler meanwhile."""
    code = f"""{WORK}
import ctypes, subprocess
def run(args):
    twice = f"sleep 0.3; kill -INT {{os.getpid()}}; sleep 0.3; kill -INT {{os.getpid()}}"
    subprocess.Popen(["sh", "-c", twice], start_new_session=True)
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
cli.info.run = run
sys.exit(cli.main())"""
    ended = python(code)
    assert (ended.returncode, ended.stderr) == (130, INTERRUPTED)


@pytest.mark.parametrize("arguments", ["--help", "info"])
def test_a_reader_that_goes_away_is_no_error(arguments: str, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    pages = "cli.info.run = lambda _: print('x' * 10**6) or 0"
    script.write_text(f"import sys\nfrom tl_looped import cli\nimport tl_looped.cli.info\n{pages}\nsys.exit(cli.main())")
    line = f"set -o pipefail; {sys.executable} {script} {arguments} | true"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=BUFFERED, check=False)
    assert ended.stderr == "" and ended.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False)
    assert ended.returncode == 1 and ended.stderr == "tl-looped: the output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("arguments", ["--help", "lens --help", "len"])
def test_nothing_is_coloured_where_no_colour_is_wanted(arguments: str) -> None:
    wanted = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"}
    ended = subprocess.run([*COMMAND, *arguments.split()], capture_output=True, text=True, env=wanted, check=False)
    assert "\x1b" not in ended.stdout + ended.stderr


def test_ctrl_c_is_a_signal_as_any_other_where_the_process_is_not_ours() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert main(["info"]) == 0 and signal.getsignal(signal.SIGINT) is before
