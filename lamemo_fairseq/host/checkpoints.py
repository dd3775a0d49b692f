"""Checkpoints that hold the memory of every rank, replace the former one only when complete, and show damage."""

import contextlib
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from .checkpoint_files import CheckpointError, is_ours, names, read_checkpoint
from .configuration import check, check_backend, complete
from .overrides import override
from .restoring import check_expected, expects_ours, restores
from .seals import damage_of, is_sealed, seal
from .stand_in import stand_in

logger = logging.getLogger(__name__)

_spared: Set[str] = set()  # paths of checkpoints that no option removes


class DamagedCheckpointError(ValueError):
    """A file differs from the one that was saved."""


def verify(path: Path) -> None:
    """Check a file against the checksum that `seal` added, or else against those that torch wrote for each part.

    Files of torch's oldest format have none.

    Raises:
        DamagedCheckpointError: the file is damaged; the message names it, and another to go on from.
    """
    damage = damage_of(path)
    if damage is not None:
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {damage}. {_advice(path)}")


def _advice(path: Path) -> str:
    """Return the advice on going on without a damaged file.

    A training reads checkpoint_last.pt again, and without one begins at update 0 and says nothing.
    """
    whole = _newest_whole(path.parent, but=path.name)
    last = restores() and path.name.startswith("checkpoint_last")
    if whole is None:
        return f"No other one beside it is whole: {'move it away to train from the start' if last else 'name another'}"
    if last:
        return f"To go on from the newest whole one beside it, copy {whole.name} over {path.name}"
    return f"The newest whole one beside it is {whole.name}: name that instead"


def _newest_whole(folder: Path, but: str = "") -> Optional[Path]:
    """Return the whole checkpoint of the latest update. Times of files do not tell: copies have those of copying.

    Checkpoints may be large: of those before this one only the number of updates is read.
    """
    checkpoints = sorted(folder.glob("checkpoint*.pt"), key=lambda p: (_updates(p), p.stat().st_mtime), reverse=True)
    return next((p for p in checkpoints if p.name != but and damage_of(p) is None), None)


def _updates(path: Path) -> int:
    """Return after how many updates a checkpoint was saved, -1 if the file does not say."""
    try:
        return int(_glance(path)["optimizer_history"][-1]["num_updates"])
    except (OSError, TypeError, ValueError, LookupError):
        return -1


@stand_in(checkpoint_utils, "load_checkpoint_to_cpu")
def load_checkpoint_to_cpu(
    original: Callable[..., Any],
    path: str,
    arg_overrides: Optional[Dict[str, Any]] = None,
    load_on_all_ranks: bool = False,
) -> Any:
    """Load a checkpoint of this package whole, checked, and with the options that it lacks; others as fairseq does.

    Raises:
        DamagedCheckpointError: the file differs from the one that was saved.
        CheckpointError: the file is no checkpoint, or its configuration has other things than plain values of known
            options.
        ValueError: an option to override is not known, or has a value of another type.
    """
    local = Path(PathManager.get_local_path(path))
    if not local.is_file():
        return original(path, arg_overrides, load_on_all_ranks)
    if not (expects_ours() or is_sealed(local)):
        state = _glance(local)
        if not is_ours(state):
            return _load_another(original, local, state, path, arg_overrides, load_on_all_ranks)
    verify(local)
    state = read_checkpoint(str(local))
    if is_ours(state):
        check(state, path)
    check_expected(state, path)
    if not is_ours(state):  # sealed by a former version of this package
        return original(path, arg_overrides, load_on_all_ranks)
    if restores():  # a trainer has its options already, and other ranks would refuse this object
        return {**state, "cfg": None}
    state["cfg"] = OmegaConf.create(complete(state["cfg"]), flags={"allow_objects": True})
    override(state["cfg"], arg_overrides or {})
    check_backend(state["cfg"].model.attention_backend, path)
    return state


def _glance(path: Path) -> Any:
    """Return the state of a checkpoint with its tensors left on the disk, None if it holds more than plain values."""
    try:
        return read_checkpoint(str(path), mapped=True)
    except CheckpointError:
        return None


def _load_another(original: Callable[..., Any], local: Path, state: Any, path: str, *args: Any) -> Any:
    """Load another package's checkpoint, and name the file in an error; fairseq's error does not name it."""
    if names(state) != (None, None):
        return original(path, *args)
    verify(local)
    try:
        return original(path, *args)
    except Exception as error:
        raise CheckpointError(f"{path} is no checkpoint of fairseq: {type(error).__name__}: {error}") from error


def write_checkpoint(state: Dict[str, Any], filename: str, cfg: Any) -> bool:
    """Write a checkpoint with a checksum.

    fairseq's checkpoint has no checksum, and on a full disk fairseq appends a second try to the first.

    Args:
        cfg: fairseq's options of checkpoints.

    Returns:
        Whether the file was written; of a run that has crashed, it may not be, as the crash matters more.

    Raises:
        OSError: the file was not written, with the reason and the last whole checkpoint.
    """
    if cfg.write_checkpoints_asynchronously or not PathManager.supports_rename(filename):
        checkpoint_utils.torch_persistent_save(state, filename, async_write=cfg.write_checkpoints_asynchronously)
        return True

    def write(unfinished: Path) -> None:
        torch.save(state, unfinished)
        seal(unfinished)

    started = time.monotonic()
    try:
        _replace(Path(filename), write)
    except OSError as error:
        if os.path.basename(filename) != "crash.pt":
            raise
        logger.warning("%s", error)
        return False
    logger.info(
        "%s: %.1f MB, of which the memory of the streams %.1f MB; written with a checksum in %.1f s",
        filename,
        os.path.getsize(filename) / 1e6,
        _size_of_memory(state) / 1e6,
        time.monotonic() - started,
    )
    return True


def _size_of_memory(state: Dict[str, Any]) -> int:
    memory = state.get("extra_state", {}).get("train_iterator", {}).get("memory")
    return sum(t.numel() * t.element_size() for t in _tensors(memory))


def _tensors(saved: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers, and in the containers within them."""
    if isinstance(saved, torch.Tensor):
        yield saved
    elif isinstance(saved, (dict, list, tuple)):
        for value in saved.values() if isinstance(saved, dict) else saved:
            yield from _tensors(value)


def copy_checkpoint(source: str, target: str) -> None:
    """Copy a checkpoint over another, which stays until the copy is complete."""

    def write(unfinished: Path) -> None:
        shutil.copyfile(source, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())

    _replace(Path(target), write)


class _PathManager(PathManager):
    """Copies sealed checkpoints as `copy_checkpoint` does, and lists no file that `spare_former` has noted.

    fairseq copies over a checkpoint in place; a run killed there would be left without its last one.
    """

    @staticmethod
    def ls(path: str) -> List[str]:
        return [name for name in PathManager.ls(path) if os.path.realpath(os.path.join(path, name)) not in _spared]

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Optional[bool]:
        if not (overwrite and PathManager.supports_rename(dst_path) and is_sealed(Path(src_path))):
            return PathManager.copy(src_path, dst_path, overwrite=overwrite)
        copy_checkpoint(src_path, dst_path)
        return True


checkpoint_utils.PathManager = _PathManager


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside *path*, and move it there only when it is complete.

    Raises:
        OSError: the file cannot be written, with the reason and the last whole checkpoint.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
        _spared.discard(os.path.realpath(path))
    except BaseException as error:
        reason = _reason(error, unfinished)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if reason is None:
            raise
        raise OSError(reason.errno, f"{reason.strerror}: {path} was not written. {_what_is_left(path)}") from None


def _reason(error: BaseException, unfinished: Path) -> Optional[OSError]:
    """Return why a file could not be written. torch does not say why, so that a write is tried once more."""
    if isinstance(error, RuntimeError):
        try:
            with unfinished.open("ab") as file:
                file.write(b"\0" * (1 << 20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            return reason
    return error if isinstance(error, OSError) else None


def _what_is_left(path: Path) -> str:
    whole = _newest_whole(path.parent)
    if whole is None:
        return "No checkpoint is there yet: make room, or pass another --save-dir"
    return f"The last whole checkpoint is {whole}: make room, and start the same command again"


def keep_due_checkpoint(cfg: Any, saved: str, due: Optional[str]) -> None:
    """Copy the checkpoint just *saved* to the *due* one, and remove those beyond ``--keep-interval-updates``.

    Args:
        cfg: fairseq's options of checkpoints.
        due: ``checkpoint_EPOCH_UPDATES.pt``, with fairseq's suffix before its end.
    """
    if due is None:
        return
    copy_checkpoint(saved, due)
    if cfg.keep_interval_updates > 0:
        suffix = re.fullmatch(r"checkpoint_\d+_\d+(.*)\.pt", os.path.basename(due))
        assert suffix is not None
        pattern = rf"checkpoint_\d+_(\d+){re.escape(suffix[1])}\.pt"
        spared = cfg.keep_interval_updates_pattern
        present: Any = checkpoint_utils.checkpoint_paths(cfg.save_dir, pattern=pattern, keep_match=True)
        removable = [name for name, update in present if spared == -1 or update % spared]
        for name in removable[cfg.keep_interval_updates :]:
            os.remove(name)


def spare_former(trainer: Any, epoch: int) -> None:
    """Let no option remove checkpoints that are not of this run's past, until it writes some of the same names.

    They are of a run before, which ``--reset-optimizer`` or ``--restore-file`` has begun anew. Of all files together,
    ``--keep-interval-updates`` and ``--keep-last-epochs`` keep the highest numbers, and would remove each new file.
    ``--keep-best-checkpoints`` would compare values of other validations, if the best value so far is forgotten.

    Args:
        trainer: a `SegmentTrainer` that has loaded its checkpoint.
        epoch: the one that it trains on next.
    """
    options, updates, suffix = trainer.cfg.checkpoint, trainer.get_num_updates(), re.escape(trainer.checkpoint_suffix)
    _spared.clear()
    _spared.add(os.path.realpath(options.restore_file))  # every start begins with it
    if not (trainer.should_save_checkpoint_on_current_rank and os.path.isdir(options.save_dir)):
        return
    numbered = re.compile(rf"checkpoint(?:(\d+)|_\d+_(\d+)){suffix}\.pt")
    best = re.compile(rf"checkpoint\.best_.*{suffix}\.pt")
    forgotten = not hasattr(checkpoint_utils.save_checkpoint, "best")

    def is_former(name: str) -> bool:
        number = numbered.fullmatch(name)
        if number is None:
            return forgotten and best.fullmatch(name) is not None
        return int(number[1]) >= epoch if number[1] else int(number[2]) > updates

    former = sorted(filter(is_former, os.listdir(options.save_dir)))
    _spared.update(os.path.realpath(os.path.join(options.save_dir, name)) for name in former)
    if former and max(options.keep_interval_updates, options.keep_last_epochs, options.keep_best_checkpoints) > 0:
        logger.warning(
            "--save-dir %s holds %s%s, of a run before or of updates yet to reach: this run replaces those of the same "
            "names, and no --keep-... option counts or removes the others. Remove or move them",
            options.save_dir,
            former[0],
            f" and {len(former) - 1} more" if former[1:] else "",
        )
