"""The parser of a program that imports fairseq late, or not at all."""

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with the errors of `lamemo_fairseq.arguments`: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with a message in one line."""
        from lamemo_fairseq.arguments import end  # with fairseq, which takes seconds to import

        end(self, message)
