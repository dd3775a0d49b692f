"""The parser of a program that imports fairseq late, or not at all."""

import argparse
from typing import Callable, Collection, NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with the errors of `lamemo_fairseq.arguments`: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with a message in one line."""
        from lamemo_fairseq.arguments import end  # with fairseq, which takes seconds to import

        end(self, message)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Return a type for arguments that are these names.

    ``choices`` would do, but for a positional argument with a list as its default: argparse refuses that.
    """

    def known(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"invalid choice: '{name}' (choose from {', '.join(names)})")
        return name

    return known
