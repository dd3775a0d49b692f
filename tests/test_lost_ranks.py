"""A rank that is killed ends the others, which wait for it where Python handles no signal."""

import logging
import os
import socket
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Client
from types import SimpleNamespace

import pytest

from lamemo_fairseq.host import interruption, lost_ranks
from lamemo_fairseq.host.lost_ranks import Watch, watch_ranks

from .faults import killed_while_another_waits
from .helpers import TASK, write_data
from .processes import output_of, train_in_processes
from .test_ranks import TRAIN


def test_a_killed_rank_ends_one_that_waits_for_its_device(tmp_path):
    data = write_data(tmp_path / "data", train=2 * 16 * 10, valid=100)
    command = [data, *TASK, "--arch", "lamemo_lm", *TRAIN, "--batch-size", 1, "--cpu", "--save-interval-updates", 2]
    fault = killed_while_another_waits(3, grace=0.3)
    codes = train_in_processes([*command, "--disable-validation"], tmp_path / "run", 2, fault, patience=10)
    assert codes == [1, -9], output_of(tmp_path / "run")[-2000:]
    last = tmp_path / "run" / "checkpoints" / "checkpoint_last.pt"
    line = f"Rank 1 ended, which ends the run after update 3: update 2 is saved in {last}, from which the same command"
    assert output_of(tmp_path / "run", 0).count("ended, which ends the run") == 1
    assert line in output_of(tmp_path / "run", 0) and "Traceback" not in output_of(tmp_path / "run", 0)


@pytest.fixture
def exits(monkeypatch):
    """The exit codes of this process, which goes on."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(lost_ranks, "GRACE", 0.05)
    monkeypatch.setattr(interruption, "_training", None)
    monkeypatch.setattr(interruption, "_told", False)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return codes


def watching(rank, *peers):
    """A thread of a rank, and the other ends of its connections."""
    pairs = {peer: Pipe() for peer in peers}
    watch = Watch(rank, {here: peer for peer, (here, _) in pairs.items()})
    watch.start()
    return watch, {peer: there for peer, (_, there) in pairs.items()}


@pytest.mark.parametrize(
    ("rank", "local", "message", "line"),
    [
        (0, None, None, "Rank {} ended, which ends the run\n"),
        (0, "0", b"{}", "Rank {} ended, which ends the run\n"),
        (1, "1", None, "Rank {} ended, which ends the run\n"),
        (1, "1", b"{}", ""),  # that rank has said why
        (1, "1", b"7", ""),  # the first rank passes on what it reports
        (8, "0", None, "Rank {} ended, which ends the run\n"),  # nobody else on this machine reports it
        (9, "1", None, ""),
    ],
)
def test_one_line_is_told(rank, local, message, line, exits, monkeypatch, capsys):
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    other = 0 if rank else 3
    watch, peers = watching(rank, other)
    if message is not None:
        peers[other].send_bytes(message.replace(b"{}", str(other).encode()))
    peers[other].close()
    watch.join(5)
    assert (exits, capsys.readouterr().err) == ([1], line.format(other))


def test_the_first_rank_passes_on_which_rank_was_lost(exits):
    watch, peers = watching(0, 1, 2, 3)
    peers[2].close()
    for rank in (1, 3):
        assert peers[rank].recv_bytes() == b"2"
        peers[rank].close()
    watch.join(5)
    assert exits[0] == 1


def test_ranks_that_end_at_different_times(exits, capsys):
    """Each says so before it ends."""
    watch, peers = watching(0, 1, 2)
    for rank in (2, 1):
        other = Watch(rank, {peers[rank]: 0})
        other.leave()
        assert watch.is_alive() or rank == 1
    watch.join(5)
    assert not watch.is_alive() and exits == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("failed", [False, True])
def test_a_rank_ends_by_itself(failed, exits, monkeypatch, capsys):
    """It tells the others whether by an error, and does not end itself before its time when one of them has ended."""
    if failed:
        monkeypatch.setattr("sys.last_value", ValueError(), raising=False)
    else:
        monkeypatch.delattr("sys.last_value", raising=False)
    monkeypatch.setattr(lost_ranks, "GRACE", 5)
    watch, peers = watching(0, 1, 2)
    peers[1].close()
    assert peers[2].recv_bytes() == b"1"
    watch.leave()
    assert peers[2].recv_bytes() == (b"0" if failed else b"-1")
    watch.join(4)
    assert not watch.is_alive() and exits == [] and capsys.readouterr().err == ""


def test_a_spawned_rank_does_not_know_how_it_ended(monkeypatch):
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the command")
    here, there = Pipe()
    Watch(1, {here: 0}).leave()
    with pytest.raises(EOFError):
        there.recv_bytes()


def test_others_that_connect_are_no_ranks(monkeypatch):
    """Such as those that look for open ports: they neither end the run nor take the place of a rank."""
    peers = {}
    with socket.create_server(("localhost", 0)) as server:
        address = server.getsockname()
        accepting = threading.Thread(target=lost_ranks._accept, args=(server, "secret", 1, peers))
        accepting.start()
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\1\xff"):
            with socket.create_connection(address) as stranger:
                stranger.sendall(said)
        for said in (b"public 1", b"secret one"):
            with Client(address) as stranger:
                stranger.send_bytes(said)
        with Client(address) as rank:
            rank.send_bytes(b"secret 1")
            accepting.join(5)
            assert list(peers.values()) == [1]
            (peer,) = peers
            with socket.socket(fileno=os.dup(peer.fileno())) as connection:
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and connection.gettimeout() is None


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_cannot_connect_train_all_the_same(rank, monkeypatch, caplog):
    monkeypatch.setattr(lost_ranks, "_watch", None)
    monkeypatch.setattr(lost_ranks, "TIMEOUT", 0.05)
    monkeypatch.setattr("atexit.register", lambda call: None)
    monkeypatch.setattr("os.register_at_fork", lambda **calls: None)
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    ranks = SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: 2)
    ranks.broadcast_object_list = lambda values, **_: rank and values.__setitem__(1, port)
    monkeypatch.setattr(lost_ranks, "dist", ranks)
    with caplog.at_level(logging.WARNING):
        watch_ranks(None, "tcp://localhost:1")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"rank {rank} does not notice if others are killed, as they did not connect")
    lost_ranks._watch.join(5)
    assert not lost_ranks._watch.is_alive()
