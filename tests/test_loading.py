"""Batches that are loaded ahead when a process ends."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from fairseq.data.iterators import BackgroundConsumer

from lamemo_fairseq.data.iterator import SegmentBatchIterator
from lamemo_fairseq.host import loading

from .test_streams import numbered, split_of

# What is collated in the thread that loads takes a while, nearly all of it inside torch.
STOPS_INSIDE_AN_EPOCH = """
import time

import torch

from lamemo_fairseq.data.iterator import SegmentBatchIterator
from lamemo_fairseq.data.segments import SegmentDataset
from tests.test_streams import numbered, split_of


class Slow(SegmentDataset):
    def collater(self, items):
        matrix, until = torch.randn(512, 512), time.monotonic() + 0.5
        while time.monotonic() < until:
            matrix @ matrix
        return super().collater(items)


dataset = split_of(numbered(600), 5, words=700)
dataset.__class__ = Slow
next(SegmentBatchIterator(dataset, 2, buffer_size=4).next_epoch_itr())
"""


# As torch does before 2.13, for workers whose batches are pinned.
WAITS_FOR_WORKERS = """
import atexit

from torch.utils.data import dataloader

from lamemo_fairseq.data.iterator import SegmentBatchIterator
from tests.test_streams import numbered, split_of

start = dataloader._MultiProcessingDataLoaderIter.__init__


def start_and_register(self, *args):
    start(self, *args)
    for worker in self._workers:
        atexit.register(lambda: print("still there" if worker.is_alive() else "gone"))


dataloader._MultiProcessingDataLoaderIter.__init__ = start_and_register
iterator = SegmentBatchIterator(split_of(numbered(600), 5, words=700), 2, buffer_size=4, num_workers=1)
next(iterator.next_epoch_itr())
"""


# As fairseq-train starts a rank for each GPU.
LOADS_IN_A_SPAWNED_RANK = """
import multiprocessing

import torch

from lamemo_fairseq.data.iterator import SegmentBatchIterator
from tests.test_streams import numbered, split_of


def load(rank):
    iterator = SegmentBatchIterator(split_of(numbered(600), 5, words=700), 2, buffer_size=4, num_workers=1)
    next(iterator.next_epoch_itr())
    print([worker._popen.method for worker in multiprocessing.active_children()])


if __name__ == "__main__":
    torch.multiprocessing.spawn(load, nprocs=1)
"""


def test_workers_of_a_spawned_rank_are_started_as_those_of_any_other(tmp_path):
    """They would import everything anew in each epoch."""
    root, script = Path(__file__).parent.parent, tmp_path / "script.py"
    script.write_text(LOADS_IN_A_SPAWNED_RANK)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], cwd=root, env=environment, capture_output=True, text=True)
    default = multiprocessing.get_all_start_methods()[0]
    assert (done.stdout, done.returncode) == (f"['{default}']\n", 0), done.stderr


def test_workers_end_before_torch_waits_for_them():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WAITS_FOR_WORKERS], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("gone\n", 0), done.stderr


def test_a_process_that_stops_inside_an_epoch_ends_well():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", STOPS_INSIDE_AN_EPOCH], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_left_that_loads(workers):
    threads, processes = set(threading.enumerate()), set(active_children())
    iterator = SegmentBatchIterator(split_of(numbered(600), 5, words=700), 2, buffer_size=4, num_workers=workers)
    next(iterator.next_epoch_itr())
    assert set(threading.enumerate()) - threads and len(set(active_children()) - processes) == workers
    loading._end_all()
    left = [t for t in set(threading.enumerate()) - threads if t.name != "QueueFeederThread"]  # they load nothing
    assert not left and not set(active_children()) - processes
    loading._end_all()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_not_read_to_the_end_is_let_go_of_by_the_next(workers):
    """As validation with --max-valid-steps does every time."""
    split = split_of(numbered(600), 5, words=700)
    iterator = SegmentBatchIterator(
        split, 2, buffer_size=2, num_workers=workers, reuse_dataloader=True, persistent_workers=True
    )
    read = []
    for _ in range(3):
        former = set(loading_threads())
        batches = iterator.next_epoch_itr()
        read.append([next(batches)["net_input"]["src_tokens"].tolist() for _ in range(3)])
        assert not former & set(loading_threads())
    assert read[0] == read[1] == read[2]
    iterator.next_epoch_itr()
    with pytest.raises(RuntimeError, match="another iterator over the same split was begun"):
        next(batches)
    loading._end_all()


_others = set()


@pytest.fixture(autouse=True)
def threads_of_other_tests():
    """Commands that other tests stopped inside an epoch leave a thread behind for the rest of the process."""
    _others.clear()
    _others.update(loading_threads())


def loading_threads():
    """Threads that have begun to load in this test."""
    return [t for t in threading.enumerate() if isinstance(t, BackgroundConsumer) and t not in _others]


def test_what_hangs_is_not_waited_for(monkeypatch):
    dataset, hangs = split_of(numbered(600), 5, words=700), threading.Event()
    collate, first = dataset.collater, iter(range(2))

    def collater(items):
        if next(first, None) is None:
            hangs.wait()
        return collate(items)

    monkeypatch.setattr(dataset, "collater", collater)
    monkeypatch.setattr(loading, "PATIENCE", 0.2)
    iterator = SegmentBatchIterator(dataset, 2, buffer_size=4)
    next(iterator.next_epoch_itr())
    began = time.monotonic()
    loading._end_all()
    assert time.monotonic() - began < 5
    hangs.set()


def test_where_no_thread_can_be_started_at_exit_all_are_ended(monkeypatch):
    """Python 3.12 is so, and torch starts one to wake the thread that pins."""
    processes = set(active_children())
    iterators = [
        SegmentBatchIterator(split_of(numbered(600), 5, words=700), 2, buffer_size=2, num_workers=1) for _ in range(2)
    ]
    for iterator in iterators:
        next(iterator.next_epoch_itr())
        workers = iterator._loaded_ahead._iterable._iterator
        if not hasattr(workers, "_pin_memory_thread"):  # without a GPU
            workers._pin_memory_thread_done_event = threading.Event()
            workers._pin_memory_thread = threading.Thread()
    started = set(active_children()) - processes
    assert len(started) == 2

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    loading._end_all()
    for process in started:
        process.join(5)  # torch before 2.13 terminates them and goes on
    assert not loading_threads() and not started & set(active_children())
