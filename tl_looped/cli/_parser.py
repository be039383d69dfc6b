"""Reading the command line, by the standard library alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Reads which command, or the options of one; a name that it does not know is answered with the nearest one."""

    def __init__(self, *, is_command: bool = True, **settings: Any):
        formatter = argparse.HelpFormatter if is_command else argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self._is_command = is_command

    def add_old(self, old: str, new: str) -> None:
        """Accept an option by the name it had before, with a note on stderr."""
        now = self._option_string_actions[new]
        same: dict[str, Any] = {"dest": now.dest, "type": now.type, "metavar": now.metavar}
        self.add_argument(old, action=_Old, const=new, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **same)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # the overloads of typeshed
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Read arguments, and refuse an unknown option before a missing one is complained of."""
        args = list(sys.argv[1:] if args is None else args)
        for argument in args:
            is_option = argument.startswith("-") and len(argument) > 1 and " " not in argument
            if argument == "--" or not (is_option or self._is_command):
                break
            name = argument.partition("=")[0]
            if is_option and name not in self._option_string_actions and not _is_number(argument):
                known = [
                    option
                    for option, action in self._option_string_actions.items()
                    if len(option) > 2 and action.help != argparse.SUPPRESS
                ]
                self.error(f"there is no option {name}{_nearest(name, known)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else f"choice {action.metavar or action.dest}"
            self.error(f"there is no {what} {value!r}{_nearest(str(value), known)}")

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and end."""
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else '.'} {self.prog} --help shows what there is.\n")


class Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it and end."""
        from .. import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


class _Old(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option_string: str | None = None
    ) -> None:
        print(f"tl-looped: {option_string} is now {self.const}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_command(commands: Commands, name: str, run: object, help: str, example: str) -> Parser:
    """A command of `tl-looped`, without options as yet; `run` is given the arguments."""
    added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"example: {example}")
    added.set_defaults(run=run)
    return added


def token_ids(text: str) -> list[int]:
    """Token ids from "5,17,3"."""
    try:
        ids = [int(token) for token in text.split(",")]
    except ValueError:
        ids = []
    if not ids or any(id.bit_length() > 63 for id in ids):  # which a tensor does not hold
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids such as 5,17,3")
    return ids


def _nearest(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
