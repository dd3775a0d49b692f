"""Check the names of a table's options against those of fairseq's commands, before anything is trained."""

from pathlib import Path
from typing import Any, Mapping, NoReturn

from .folder import user_dir
from .validation import TableError

# Options whose values decide which other options there are.
_CHOICES = ("user-dir", "task", "arch", "criterion", "optimizer", "lr-scheduler", "bpe", "tokenizer")


class _Unreadable(Exception):
    """The parser cannot be made: the command itself will say what is wrong."""


def known(command: str, where: str, given: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Check that a command knows the options *given* in *where*.

    Args:
        command: fairseq-train or fairseq-eval-lm.
        where: the part of the table that gives them.
        given: all options of the command.
        changes: those of them from ``--set``.

    Raises:
        TableError: a name is not known; the message has the nearest known one.
    """
    from fairseq import options  # takes seconds to import

    import lamemo_fairseq
    from lamemo_fairseq.host.command_line import CommandLine

    chosen = {name: str(given[name]) for name in _CHOICES if given.get(name) not in (None, True, False)}
    if "user-dir" in chosen and Path(user_dir(chosen["user-dir"])).resolve() == Path(lamemo_fairseq.__file__).parent:
        del chosen["user-dir"]  # fairseq would log that it is imported already
    words = ["data", *(word for name, value in chosen.items() for word in (f"--{name}", value))]
    parser = options.get_training_parser() if command == "fairseq-train" else options.get_eval_lm_parser()
    parser.error = _unreadable
    try:
        with CommandLine.unchecked():
            options.parse_args_and_arch(parser, words, parse_known=True)
    except (_Unreadable, LookupError, RuntimeError, OSError, ImportError):
        return
    names = {"data", *(option.removeprefix("--") for option in parser._option_string_actions)}
    for name, value in given.items():
        if value not in (None, False) and name not in names:
            message = CommandLine(parser, words).unrecognized(f"--{name}")
            raise TableError(f"{'--set' if name in changes else where}: {message}")


def _unreadable(message: str) -> NoReturn:
    raise _Unreadable(message)
