"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeAlias, get_args, get_type_hints

from domainbed_sfp.core.errors import did_you_mean
from domainbed_sfp.runs.settings import SETTINGS, RunSettings

Command = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

BREAK_LOCK = "remove the locks that a dead machine has left, where the file system has no flock"


class Parser(argparse.ArgumentParser):
    """Names the nearest choice for what is mistyped, in the words of the command that it was given to."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        known: argparse.Namespace
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(known, "parser", self)
            hint = did_you_mean(unknown[0].split("=")[0], parser._option_string_actions)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known

    def error(self, message: str) -> NoReturn:
        mistyped = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if mistyped:
            message += did_you_mean(mistyped[1], re.findall(r"[\w-]+", mistyped[2]))
        super().error(message)


class Once(argparse.Action):
    """A flag whose second values would take the place of the first without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; give it once, with all that belongs to it")
        setattr(namespace, self.dest, values)


def add_command(commands: Commands, name: str, text: str, run: Command) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` computes."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_setting(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """The flag of a run's setting, with its own default, choices and help unless `options` say otherwise."""
    about, kinds = SETTINGS[name], get_args(hint := get_type_hints(RunSettings)[name]) or (hint,)
    flag: dict[str, Any] = {"help": about.help or None}
    if hint is bool:
        parser.add_argument(f"--{name}", **{"action": "store_true", **flag, **options})
        return
    flag["default"] = getattr(RunSettings(), name)
    if hint == list[int]:
        flag["nargs"] = "+"
    if name == "hparams":  # a second one would take the place of the first without a word
        flag["action"] = Once
    if kinds[0] is not str:
        flag["type"] = kinds[0]
    if about.choices:
        flag["choices"] = about.choices
    parser.add_argument(f"--{name}", **{**flag, **options})


def add_settings(parser: argparse.ArgumentParser, but: Collection[str] = ()) -> None:
    """The flags of all of a run's settings, in their order, but for some."""
    for name in SETTINGS:
        if name not in but:
            add_setting(parser, name)


def add_slots(parser: argparse.ArgumentParser) -> None:
    """How many runs this machine computes at the same time."""
    parser.add_argument(
        "--jobs", type=_slots, metavar="N", help="runs at the same time on this machine; auto (default): as fits it"
    )


def _slots(text: str) -> int | None:
    """The number of slots, None for auto."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}") from None


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """Where decoded images are kept, as for a run."""
    add_setting(parser, "cache_dir")
