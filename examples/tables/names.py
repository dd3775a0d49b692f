"""Check the names of a table's options against those of fairseq's commands, before anything is trained."""

from pathlib import Path
from typing import Any, Dict, Mapping, NoReturn

from .folder import user_dir
from .table import Table
from .validation import TableError

# Options whose values decide which other options there are.
_CHOICES = ("user-dir", "task", "arch", "criterion", "optimizer", "lr-scheduler", "bpe", "tokenizer")


class _Unreadable(Exception):
    """A value is none of an option's choices."""


def known(command: str, where: str, given: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Check that a command knows the options *given* in *where*.

    Args:
        command: fairseq-train or fairseq-eval-lm.
        where: the part of the table that gives them.
        given: all options of the command.
        changes: those of them from ``--set``.

    Raises:
        TableError: a name, or a choice such as that of --arch, is not known; the message has the nearest known one.
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
    except _Unreadable as error:
        message = CommandLine(parser, words).in_words(str(error))
        refused = next((name for name in chosen if message.startswith(f"--{name} ")), "")
        raise TableError(f"{'--set' if refused in changes else where}: {message}") from None
    except (LookupError, RuntimeError, OSError, ImportError):
        return
    names = {"data", *(option.removeprefix("--") for option in parser._option_string_actions)}
    for name, value in given.items():
        if value not in (None, False) and name not in names:
            message = CommandLine(parser, words).unrecognized(f"--{name}")
            raise TableError(f"{'--set' if name in changes else where}: {message}")


def overridden(loaded: Table, row: str, trained: Mapping[str, Any]) -> None:
    """Check the options of a row's model that its evaluations override.

    Args:
        loaded: the table.
        row: the name of the row.
        trained: all options of its training, whose names are known.

    Raises:
        TableError: a name or a value is not one that the model takes; the message has its place in the table.
    """
    from fairseq.models import MODEL_DATACLASS_REGISTRY

    from lamemo_fairseq.host.checkpoint_files import is_our_model
    from lamemo_fairseq.host.configuration import check_options
    from lamemo_fairseq.host.dataclass_defaults import defaults_of
    from lamemo_fairseq.host.overrides import check_overrides, parse_overrides

    arch = str(trained.get("arch"))
    if not is_our_model(arch) or arch not in MODEL_DATACLASS_REGISTRY:
        return
    options = {name.replace("-", "_"): value for name, value in trained.items()}
    defaults = defaults_of(MODEL_DATACLASS_REGISTRY[arch])
    model = {**defaults, **{name: value for name, value in options.items() if name in defaults}, "_name": arch}
    for where, given in _overrides(loaded, row).items():
        try:
            overrides = parse_overrides(given) if isinstance(given, str) else dict(given)
            check_overrides(overrides, {"model": model})
            check_options(overrides, MODEL_DATACLASS_REGISTRY[arch])
        except ValueError as error:
            raise TableError(f"{where}: {error}") from None


def _overrides(loaded: Table, row: str) -> Dict[str, Any]:
    """Return what the evaluations of a row override, by the place in the table that says so."""
    wanted, own = loaded.evaluation, loaded.rows[row]
    places: Dict[str, Any] = {}
    if "model-overrides" in wanted.options:
        places["evaluation.options"] = str(wanted.options["model-overrides"])
    lengths = wanted.memory.lengths if own.sweeps else []
    if any(lengths):
        places[f"row '{row}', evaluation.memory (sweeps: false leaves it out)"] = {"mem_len": max(lengths)}
    if 0 in lengths and own.without_memory is not None:
        places[f"row '{row}', without_memory"] = own.without_memory
    elif 0 in lengths:
        places[f"row '{row}', evaluation.without_memory"] = wanted.without_memory
    return places


def _unreadable(message: str) -> NoReturn:
    raise _Unreadable(message)
