"""The parser of this package's own commands: argparse's, with the nearest known name for a misspelt one."""

import argparse
import re
from typing import Any, NoReturn

from .core.names import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser. Its errors on unknown names have the nearest known ones."""

    def add_subparsers(self, **kwargs: Any) -> Any:
        """Add commands as argparse does. A command itself refuses options that it does not know."""
        return super().add_subparsers(**{"parser_class": _CommandParser, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Exit with a message in one line."""
        end(self, message)


class _CommandParser(ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def end(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Exit with an error of argparse in one line: the usage, which argparse prints before it, would hide it."""
    parser.exit(2, f"{parser.prog}: error: {in_words(parser, message)}\n")


def in_words(parser: argparse.ArgumentParser, message: str) -> str:
    """Return an error of argparse with a way on, such as the nearest known name."""
    hint = None
    if match := re.match(r"unrecognized arguments:.*? --([^\s=]+)", message, flags=re.DOTALL):
        options = [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]
        hint = did_you_mean(match[1], options, shown="--{}".format)
    elif match := re.match(r"argument \S+: invalid choice: '(.*)' \(choose from (.*)\)", message):
        hint = did_you_mean(match[1], re.findall(r"[^\s',]+", match[2]))
    elif message.startswith("the following arguments are required"):
        hint = "--help describes them"
    return message if hint is None else f"{message}: {hint}"
