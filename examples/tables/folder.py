"""The folder of one run: its description, its device and versions, and its results once it is complete."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

import torch

IN_CHECKOUT = __package__ == "examples.tables"
# Where recipes start from.
ROOT = Path(__file__).parent.parent.parent if IN_CHECKOUT else Path.cwd()
USER_DIR = "lamemo_fairseq"  # as tables name the package, from the root of a checkout
# Workers that load data look every five seconds whether the process that started them is still there.
PATIENCE = 10.0  # seconds


class ChangedError(ValueError):
    """A folder holds another run than the one that is asked for."""


class BusyError(RuntimeError):
    """Another process is at work in a folder."""


def user_dir(path: str) -> str:
    """Return the installed package instead of a checkout's, where there is no checkout."""
    installed = not IN_CHECKOUT and Path(path) == Path(USER_DIR) and not (ROOT / path).exists()
    return str(Path(__file__).parents[1]) if installed else path


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_json(path: Path) -> Optional[Any]:
    """Return the contents of a file that `write_json` wrote, None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it") from None


def make(folder: Path, option: str) -> None:
    """Make a folder to write to, which *option* names.

    Raises:
        OSError: the folder cannot be made or written to; the message has the remedy.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"\0")
        return
    from lamemo_fairseq.core.folder import make_folder  # with fairseq, which takes seconds to import

    make_folder(folder, option)


class RunFolder:
    """Files of a run, by name."""

    def __init__(self, path: Path):
        self.path = path
        self.identity = path / "run.json"
        self.starts = path / "starts.jsonl"
        self.log = path / "train.log"
        self.checkpoints = path / "checkpoints"
        self.checkpoint = self.checkpoints / "checkpoint_best.pt"
        self.trained = path / "trained.json"
        self.results = path / "results.json"

    def evaluated(self, name: str) -> Path:
        return self.path / "evaluations" / f"{name}.json"

    def forget_evaluations(self) -> None:
        """Remove evaluations of a former training, whose checkpoints somebody has removed."""
        for former in (self.results, *self.path.glob("evaluations/*.json")):
            former.unlink(missing_ok=True)

    def check(self, wanted: Dict[str, Any]) -> None:
        """Refuse a folder unless it holds the run *wanted*, or one without a checkpoint.

        Raises:
            ChangedError: the folder holds another run; the message says what differs.
        """
        stored = comparable(read_json(self.identity), wanted)
        saved = self.trained.exists() or any(self.checkpoints.glob("*.pt"))
        if saved and stored is not None and stored != wanted:
            raise ChangedError(
                f"{self.path} holds another run: {'; '.join(differences(stored, wanted))}. "
                "Ask for the same options, take another folder with --out, or move this one away"
            )

    def claim(self, wanted: Dict[str, Any]) -> None:
        """Record that the folder, which is locked, holds the run *wanted*.

        Raises:
            ChangedError: as `check`.
        """
        self.check(wanted)
        if read_json(self.identity) != wanted:
            for former in (self.log, self.starts):  # files of a run that never reached a checkpoint
                former.unlink(missing_ok=True)
            write_json(self.identity, wanted)

    def lock(self) -> contextlib.AbstractContextManager[int]:
        """Lock the folder as `locked` does, for the work on this run."""
        return locked(self.path / "lock", "another process is at work there")

    def note_start(self, commands: List[List[str]], devices: Optional[str]) -> None:
        """Record where and how the run is started, or started again."""
        cut = self.starts.exists() and not self.starts.read_bytes().endswith(b"\n")
        with self.starts.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps({"commands": commands, **environment(devices)}) + "\n")

    def started(self) -> List[Dict[str, Any]]:
        """Return the records of `note_start`, without a line that a kill cut short."""
        lines = self.starts.read_text(encoding="utf-8").splitlines() if self.starts.exists() else []
        starts = []
        for line in lines:
            with contextlib.suppress(ValueError):
                starts.append(json.loads(line))
        return starts


@contextlib.contextmanager
def locked(path: Path, reason: str) -> Iterator[int]:
    """Lock a folder in this context, and as long as a process has the lock's descriptor open.

    Raises:
        BusyError: another process has the lock, with the *reason*.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for(descriptor, path, f"{reason}; wait for it, or end it (fuser {path} shows its number)")
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, message: str) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
        except BlockingIOError:
            if time.monotonic() > until:
                raise BusyError(f"{path.parent}: {message}") from None
        time.sleep(0.1)


def flock(descriptor: int, operation: int, path: Path) -> None:
    """Lock an open file as ``fcntl.flock`` does; on a file system without locks, only warn."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"its file system has no locks ({error.strerror})"
        print(f"{path.parent}: {reason}: start no second runner there meanwhile", file=sys.stderr)


def comparable(stored: Any, wanted: Dict[str, Any]) -> Any:
    """Return a stored identity, without its data if *wanted* has none, since it was made on a machine without them."""
    if isinstance(stored, dict) and "data" not in wanted:
        return {key: value for key, value in stored.items() if key != "data"}
    return stored


def differences(stored: Any, wanted: Any, name: str = "") -> List[str]:
    """Return the differences between two values read from JSON, in words."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = list(dict.fromkeys([*stored, *wanted]))
        nested = [
            differences(stored.get(key), wanted.get(key), f"{name} {key}".strip())
            for key in keys
            if stored.get(key) != wanted.get(key)
        ]
        return [words for inner in nested for words in inner]
    return [f"{name} is {_shown(wanted)}, there it was {_shown(stored)}"]


def departures(given: Mapping[str, Any], table: Mapping[str, Any]) -> List[str]:
    """Return where *given* values depart from those of a table, in words: ``--max-update 2 (table: 12)``."""
    names = [name for name in {**table, **given} if given.get(name) != table.get(name)]
    return [f"{name} {_shown(given.get(name))} (table: {_shown(table.get(name))})" for name in names]


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def has_dictionary(data: str) -> bool:
    """Tell if a folder of binarized data is here."""
    return Path(data, "dict.txt").exists()


def data_identity(data: str) -> Dict[str, Any]:
    """Return the identity of a binarized corpus: its dictionary, and the size of its splits.

    Raises:
        FileNotFoundError: the corpus is missing.
    """
    folder = Path(data)
    if not has_dictionary(data):
        from lamemo_fairseq.core.names import nearest_path  # with fairseq, which takes seconds to import

        remedy = nearest_path(folder) or ": prepare the data first, as the README of the table says"
        raise FileNotFoundError(f"{folder} holds no dict.txt{remedy}")
    words = hashlib.sha256((folder / "dict.txt").read_bytes()).hexdigest()[:16]
    return {"dictionary": words, **{f"size of {p.name}": p.stat().st_size for p in sorted(folder.glob("*.bin"))}}


def environment(devices: Optional[str]) -> Dict[str, Any]:
    """Return where a run is: device, versions, commit; *devices* are CUDA devices to use, None for a CPU."""
    names: List[str] = []
    if devices:
        names = (
            _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={devices}") or f"CUDA {devices}"
        ).splitlines()
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _changes(),
        "device": ", ".join(names) or f"{_processor()}, {torch.get_num_threads()} threads",
        "host": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fairseq": _fairseq()},
    }


def code(noted: Mapping[str, Any]) -> str:
    """Return the commit of what `environment` has *noted*, in a few words."""
    return f"{(noted.get('commit') or 'unknown')[:10]}{' with changes' if noted.get('changed_files') else ''}"


def _changes() -> Optional[str]:
    """Return the changed files as git lists them, and new ones of the package, such as an own memory's."""
    listed = _git("status", "--porcelain", "--untracked-files=all")
    if listed is None:
        return None
    ours = "?? lamemo_fairseq/"
    return "\n".join(line for line in listed.splitlines() if line.startswith(ours) or not line.startswith("??"))


def _git(*command: str) -> Optional[str]:
    """Return git's description of this code; None where the package is installed, maybe in another repository."""
    return _output("git", "-C", str(ROOT), *command) if IN_CHECKOUT else None


def _output(*command: str) -> Optional[str]:
    """Return the output of a command, None if it fails or is not installed."""
    try:
        completed = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None


def _fairseq() -> str:
    for name in ("ve-fairseq", "fairseq-fixed", "fairseq"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
