"""Check the checkpoints that a command or a call names, before anything is built from them."""

import argparse
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

from fairseq import utils
from fairseq.file_io import PathManager

from ..core.names import missing_checkpoint, nearest_path
from .checkpoint_files import CheckpointError, describe, is_our_task, is_ours, names, not_ours, read_checkpoint
from .configuration import check, check_encoders, read_ours
from .generation_options import refusal
from .option_checks import need_path
from .overrides import check_arguments, check_overrides, parse_overrides


def take_task_from_checkpoint(parser: argparse.ArgumentParser, arguments: Optional[Sequence[str]]) -> None:
    """Let a command without ``--task`` take the task of the checkpoint given as ``--path``.

    Raises:
        FileNotFoundError: the checkpoint is missing.
        ValueError: no checkpoint is given, or it is a folder, or not one of this package.
    """
    if not any(action.dest == "path" for action in parser._actions):
        return
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--task", "--path", "--user-dir", "--checkpoint-suffix"):
        given.add_argument(option)
    try:
        options, _ = given.parse_known_args(arguments)
    except argparse.ArgumentError:  # the command's own parser reports it
        return
    if options.task is not None or options.user_dir is None:
        return
    if not {"-h", "--help"}.intersection(arguments or sys.argv):
        need_path(options.path)
    for path in _files(options):
        state = read_checkpoint(path, mapped=True)
        if not is_ours(state):
            _, task = names(state)
            raise CheckpointError(
                f"{not_ours(state, path)}: to open it with fairseq's own, pass "
                f"--task {task or 'NAME'}, if you trust the file"
            )
        check(state, path)
        parser.set_defaults(task=names(state)[1])


def check_checkpoints(options: argparse.Namespace) -> None:
    """Check the checkpoints of ``--path`` against ``--task``, and ``--model-overrides`` against them.

    Raises:
        CheckpointError: a checkpoint is not of this package, but the task is.
        FileNotFoundError: a checkpoint is missing.
        ValueError: another option does not fit the checkpoints.
    """
    if not is_our_task(getattr(options, "task", None)):
        _refuse_another_task(options)
        return
    if getattr(options, "lm_path", None) is not None:
        raise ValueError(refusal("lm_path"))
    overrides = parse_overrides(getattr(options, "model_overrides", "{}"))
    only_validates = not (hasattr(options, "beam") or hasattr(options, "context_window"))
    for path in _files(options):
        check_overrides(overrides, read_ours(path)["cfg"], with_criterion=only_validates)


def check_files(folder: str, files: str, data: str, arguments: Dict[str, Any]) -> None:
    """Check the checkpoints and the arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: a folder or a checkpoint is missing.
        ValueError: a checkpoint is not one of this package, or an argument is not known.
    """
    for directory in (folder, *([] if data.startswith(".") else utils.split_paths(data))):
        if not os.path.isdir(directory):
            raise FileNotFoundError(
                f"there is no folder {directory}"
                + (nearest_path(directory) or ": an archive or address has to be unpacked there first")
            )
    for name in files.split(os.pathsep):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(missing_checkpoint(path))
        state = read_ours(path)
        check_encoders(state, arguments, path)
        check_arguments(arguments, state["cfg"])


def _refuse_another_task(options: argparse.Namespace) -> None:
    for path in filter(os.path.isfile, _paths(options)):
        try:
            state = read_checkpoint(path, mapped=True)
        except ValueError:  # a checkpoint for fairseq's own code, in any format
            continue
        if is_ours(state) and hasattr(options, "task"):
            raise CheckpointError(
                f"{path} is {describe(state)}, which --task {options.task} does not read: leave --task out, or pass "
                f"--task {names(state)[1]}"
            )


def _files(options: argparse.Namespace) -> List[str]:
    """Return the files of ``--path``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a path is that of a folder.
    """
    paths = _paths(options)
    for path in paths:
        if os.path.isdir(path):
            raise ValueError(f"--path {path} is a folder: pass a checkpoint in it, such as checkpoint_best.pt")
        if not os.path.isfile(path):
            raise FileNotFoundError(missing_checkpoint(path, "--path"))
    return paths


def _paths(options: argparse.Namespace) -> List[str]:
    """Return the paths of ``--path`` on this machine, with fairseq's suffix."""
    end = f"{getattr(options, 'checkpoint_suffix', None) or ''}.pt"
    paths = utils.split_paths(getattr(options, "path", None) or "")
    return [PathManager.get_local_path(path.replace(".pt", end)) for path in paths if path]
