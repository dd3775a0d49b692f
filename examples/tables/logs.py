"""Read measurements from the logs of fairseq's commands, with ``--log-format json`` in training."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterator, List, Optional, Tuple

_RECORD = re.compile(r"^[\d\-]+ [\d:]+ \| INFO \| ([\w.-]+) \| (\{.*\})\s*$")
_PARAMETERS = re.compile(r"num\. shared model params: ([\d,]+)")
_CAPACITY = re.compile(r"rank +0: .*total memory = ([\d.]+) GB")  # of the device whose free memory is logged
_STARTED = "training on "
_ANEW = "No existing checkpoint found"
_TRAINED = re.compile(r"done training in ([\d.]+) seconds")
_GRAPH = re.compile(r"recorded a CUDA graph for (\w+) segments .* keeps ([\d.]+) GiB to itself")
_EVALUATED = re.compile(r"Evaluated ([\d,]+) tokens in ([\d.]+)s \(([\d.]+) tokens/s\)")
DEVICE_MEMORY = "peak memory of the device: "  # evaluate.py writes it
_LOSS = re.compile(r"Loss \(base 2\): ([\d.]+|inf|nan), Perplexity: ([\d.]+|inf|nan)")


class LogError(ValueError):
    """A log lacks values that a finished run writes to it."""


def records(path: Path) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Return the JSON records of a log with their tags; ``start`` stands where a process began to train.

    ``graph`` stands where a CUDA graph was recorded, with its kind and the GiB that it reserves; ``device`` where a
    process named its device, with the device's capacity. ``anew`` stands where a process found no checkpoint to go on
    from, and ``trained`` where one ended, with its seconds.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _RECORD.match(line)
            if match:
                try:
                    yield match.group(1), json.loads(match.group(2))
                except ValueError:  # a line cut short by a kill
                    continue
            elif _STARTED in line:
                yield "start", {}
            elif _ANEW in line:
                yield "anew", {}
            else:
                graph, capacity, trained = (words.search(line) for words in (_GRAPH, _CAPACITY, _TRAINED))
                if graph:
                    yield "graph", {graph.group(1): float(graph.group(2))}
                elif capacity:
                    yield "device", {"capacity": float(capacity.group(1))}
                elif trained:
                    yield "trained", {"seconds": float(trained.group(1))}


def training(path: Path, valid_subset: str = "valid") -> Dict[str, Any]:
    """Read a log of training.

    Returns:
        The values are ``parameters``, ``tokens_per_second``, ``tokens_an_update``, ``device_memory_gib``, ``updates``,
        ``seconds`` and ``curve``. The rate is the median over log intervals, without the first after each start and
        each validation where there are others. The memory is the largest peak that was logged, with what CUDA graphs
        reserved by then (None on a CPU). The seconds are the sum over all starts, validations included (None if a start
        was killed). The curve has one ``[update, bits a token]`` a validation. Starts of a former training, which left
        no checkpoint, count in none of them.

    Raises:
        LogError: the log has no parameters, or records without their values.
    """
    try:
        return _training(path, valid_subset)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LogError):
            raise
        raise LogError(f"{path} has a record that is not one of fairseq's: {error!r}") from None


def _training(path: Path, valid_subset: str) -> Dict[str, Any]:
    text = path.read_text(encoding="utf-8", errors="replace")
    parameters = _PARAMETERS.findall(text)
    if not parameters:
        raise LogError(f"{path} does not say how many parameters the model has")
    speeds: List[float] = []
    first: List[float] = []
    used: List[float] = []  # GiB
    capacity: Optional[float] = None  # GiB; a run may go on on another device
    graphs: Dict[str, float] = {}  # one for training and one for evaluation at a time
    recorded: Dict[str, float] = {}
    curve: Dict[int, float] = {}
    batches: List[float] = []  # the last update of an epoch may be smaller
    seconds: List[float] = []
    updates, starts, fresh = 0, 0, True
    for tag, record in records(path):
        if tag == "start":
            starts, fresh, graphs, recorded = starts + 1, True, {}, {}
        elif tag == "anew":
            starts, updates = 1, 0
            for former in (speeds, first, used, curve, batches, seconds):
                former.clear()
        elif tag == "trained":
            seconds.append(record["seconds"])
        elif tag == "graph":
            recorded.update(record)
        elif tag == "device":
            capacity = float(record["capacity"])
        elif tag == "train_inner":
            updates = int(record["num_updates"])
            if "wps" in record:
                (first if fresh else speeds).append(float(record["wps"]))
            fresh = False
            if "wpb" in record:
                batches.append(float(record["wpb"]))
            if "gb_free" in record and capacity is not None:
                used.append(capacity - float(record["gb_free"]) + sum(graphs.values()))
            # They count from the next interval on: memory used while recording is released by then.
            graphs.update(recorded)
        elif tag == valid_subset:
            # A resumed run repeats the updates after its checkpoint.
            # With --sentence-avg the loss is that of a segment, and with label smoothing a smoothed one.
            loss = record.get(f"{tag}_nll_loss", record[f"{tag}_loss"])
            curve[int(record[f"{tag}_num_updates"])] = float(loss)
            fresh = True  # fairseq counts the seconds of the validation in the next interval
    return {
        "parameters": int(parameters[-1].replace(",", "")),
        "tokens_per_second": median(speeds or first) if speeds or first else None,
        "tokens_an_update": median(batches) if batches else None,
        "device_memory_gib": round(max(used), 2) if used else None,
        "updates": max([updates, *curve]),
        "seconds": round(sum(seconds), 1) if 0 < starts == len(seconds) else None,
        "curve": sorted([update, loss] for update, loss in curve.items()),
    }


def evaluation(path: Path) -> Dict[str, Any]:
    """Read a log of fairseq-eval-lm: tokens, seconds, tokens/s, base-2 loss and perplexity.

    On a GPU there is also ``device_memory_gib``, the peak in a line that begins with `DEVICE_MEMORY` (None on a CPU).

    Raises:
        LogError: the command did not finish.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    evaluated, loss = _EVALUATED.findall(text), _LOSS.findall(text)
    if not (evaluated and loss):
        raise LogError(f"{path} has no results: the evaluation did not finish")
    tokens, seconds, speed = evaluated[-1]
    peak = re.findall(rf"^{DEVICE_MEMORY}([\d.]+) GiB$", text, re.MULTILINE)
    return {
        "tokens": int(tokens.replace(",", "")),
        "seconds": float(seconds),
        "tokens_per_second": float(speed),
        "loss": float(loss[-1][0]),
        "perplexity": float(loss[-1][1]),
        "device_memory_gib": float(peak[-1]) if peak else None,
    }


def size(path: Path) -> int:
    """Return the size of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def began(path: Path, start: int = 0) -> bool:
    """Return whether a command began to train, by what it added to a log from the byte *start* on."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(start)
        return _STARTED.encode() in file.read()


def tail(path: Path, lines: int = 12, largest: int = 20_000, start: int = 0) -> List[str]:
    """Return the last lines of a file, which may still be written, from the byte *start* on."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(start, size(path) - largest))
        return file.read().decode("utf-8", errors="replace").splitlines()[-lines:]


def now(path: Path) -> Optional[str]:
    """Return the progress of a training, in a few words."""
    for line in reversed(tail(path, lines=200)):
        match = _RECORD.match(line)
        if match and match.group(1) == "train_inner":
            record = json.loads(match.group(2))
            return f"update {record.get('num_updates')}, loss {record.get('loss')}, {record.get('wps')} tokens/s"
    return None
