"""Print a refusal of this package, or a lack of memory, in one line, without the calls that led to it.

A refusal is an error of input that a ``raise`` of this package raises: its message has the remedy. Errors that other
code or a call within the package raises may be bugs, and are printed with their traceback. Python's development mode
(``PYTHONDEVMODE=1``) prints it for all.
"""

import dis
import functools
import os
import re
import sys
from types import TracebackType
from typing import Any, Callable, Optional, Type

from hydra.core.hydra_config import HydraConfig

_OF_INPUT = (ValueError, OSError, FloatingPointError)
_RAISE = dis.opmap["RAISE_VARARGS"]
_PACKAGE = __name__.partition(".")[0]
_COMPLETE = "HYDRA_FULL_ERROR"


def hook_once(hook: Callable[..., Any]) -> None:
    """Let *hook* see errors that end this process, with the former hook as its first argument.

    A hook that is there already stays where it is, also below others: a process may run many commands.
    """
    former: Any = sys.excepthook
    while isinstance(former, functools.partial) and former.args:
        if former.func is hook:
            return
        former = former.args[0]
    sys.excepthook = functools.partial(hook, sys.excepthook)


def print_in_one_line() -> None:
    """From now on, print refusals that end this process in one line."""
    hook_once(_print)


def print_in_one_line_under_hydra() -> None:
    """From now on, print refusals and a lack of memory in one line in fairseq-hydra-train too.

    hydra prints a job's error itself, with a traceback, unless it is asked for complete ones. It then leaves errors to
    the hooks of this module. A user who has asked for them sees every traceback.
    """
    if HydraConfig.initialized() and _COMPLETE not in os.environ:
        os.environ[_COMPLETE] = "1"
        print_in_one_line()
        explain_out_of_memory()


def is_refusal(error: BaseException) -> bool:
    """Return whether a statement of this package has raised an error of input."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, _OF_INPUT):
        return False
    code, module = last.tb_frame.f_code.co_code, str(last.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] == _PACKAGE and code[last.tb_lasti] == _RAISE


def explain_out_of_memory() -> None:
    """From now on, print in one line that memory ran out, for a command with a model of this package."""
    hook_once(_explain)


def out_of_memory(error: BaseException) -> Optional[str]:
    """Return a message on an error of torch's allocators, None for another error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not re.search("out of memory|can't allocate memory", text):
        return None
    if match := re.search("tried to allocate ([0-9]+) bytes", text):
        lacking = f"{int(match[1]) / 2**30:,.2f} GiB"
    else:
        match = re.search("Tried to allocate ([0-9.]+ [A-Za-z]+)", text)
        lacking = match[1] if match else "a tensor"
    return (
        f"out of memory, with no room for {lacking}: pass a smaller --tokens-per-sample, --mem-len (of a trained model "
        "--model-overrides \"{'mem_len': M}\") or --batch-size; in generation also --beam, --max-len-a or --max-len-b"
    )


def _print(
    otherwise: Callable[..., Any],
    kind: Type[BaseException],
    error: BaseException,
    raised: Optional[TracebackType],
) -> None:
    _tell(str(error) if is_refusal(error) else None, otherwise, kind, error, raised)


def _explain(
    otherwise: Callable[..., Any],
    kind: Type[BaseException],
    error: BaseException,
    raised: Optional[TracebackType],
) -> None:
    _tell(out_of_memory(error), otherwise, kind, error, raised)


def _tell(message: Optional[str], otherwise: Callable[..., Any], *error: Any) -> None:
    if message and not sys.flags.dev_mode:  # a bare ValueError has none
        print(message, file=sys.stderr, flush=True)
    else:
        otherwise(*error)
