"""The end of a rank, noticed by the others.

If a rank is killed, NCCL's kernels on other devices wait for it, and hosts wait for their devices. Meanwhile Python
handles no signal, and only SIGKILL or a timeout ends the process. Settings of torch do not help. Its watchdog has a
timeout, which long validations must not exceed. `TORCH_NCCL_PROPAGATE_ERROR` propagates what a living rank notices.

Here each rank has a TCP connection with the first one, and a thread that waits for its end. Nothing is sent
over the connection until then. A rank that is busy, however long, keeps its connection.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import secrets
import socket
import sys
import threading
from multiprocessing.connection import Connection, wait
from typing import Any, Dict, List, Optional
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from . import interruption

logger = logging.getLogger(__name__)

GRACE = 5.0  # seconds in which a rank may end by itself, with a message of its own
TIMEOUT = 30.0  # seconds to connect
# A machine that vanishes is noticed after five minutes.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 12}
_ALL_WELL = -1

_watch: Optional["Watch"] = None


def watch_ranks(group: Any, init_method: Optional[str]) -> None:
    """From now on, end this process soon after another rank has ended by an error. Every rank has to call this.

    Args:
        group: exchanges objects between the hosts.
        init_method: names the first rank's host, as for `torch.distributed.init_process_group`.
    """
    global _watch
    if _watch is not None:
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    server = socket.create_server(("", 0), backlog=ranks) if rank == 0 else None
    published: List[Any] = [secrets.token_hex(), server.getsockname()[1] if server else 0]
    dist.broadcast_object_list(published, src=0, group=group, device=torch.device("cpu"))
    secret, port = published
    peers: Dict[Connection, int] = {}
    try:
        if server is not None:
            _accept(server, secret, ranks - 1, peers)
        else:
            host = urlparse(init_method or "").hostname or os.environ.get("MASTER_ADDR", "localhost")
            first = _lasting(socket.create_connection((host, port), TIMEOUT))
            first.send_bytes(f"{secret} {rank}".encode())
            peers[first] = 0
    except OSError as error:
        logger.warning("rank %d does not notice if others are killed, as they did not connect (%s)", rank, error)
    _watch = Watch(rank, peers)
    atexit.register(_watch.leave)
    os.register_at_fork(after_in_child=_watch.close)
    _watch.start()


def _accept(server: socket.socket, secret: str, count: int, peers: Dict[Connection, int]) -> None:
    with server:
        server.settimeout(TIMEOUT)
        while len(peers) < count:
            peer = _lasting(server.accept()[0])
            with contextlib.suppress(EOFError, OSError, ValueError):  # the peer may be no rank
                told, _, rank = peer.recv_bytes(99).decode().partition(" ") if peer.poll(TIMEOUT) else ("", "", "")
                if told == secret:
                    peers[peer] = int(rank)


def _lasting(peer: socket.socket) -> Connection:
    """Return a connection without timeout that ends if the other machine vanishes."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(peer.detach())


class Watch(threading.Thread):
    """A thread that waits for the end of other ranks: the first rank for any, the others for the first.

    A rank that ends sends a number: `_ALL_WELL`, or its own if an error ends it. A rank that is killed sends none. The
    first rank passes on which rank has ended.

    Args:
        rank: this one.
        peers: connections, and the ranks at their other ends.
    """

    def __init__(self, rank: int, peers: Dict[Connection, int]):
        super().__init__(name="lost ranks", daemon=True)
        self._rank, self._peers = rank, peers
        self._leaving = threading.Event()

    def run(self) -> None:
        """Wait while there are connections."""
        while self._peers and not self._leaving.is_set():
            for peer in wait(list(self._peers)):
                assert isinstance(peer, Connection)
                self._hear(peer)

    def _hear(self, peer: Connection) -> None:
        """Receive a number, or the end of the connection, and end this process if a rank was lost."""
        rank, lost = self._peers.pop(peer, None), None
        with peer, contextlib.suppress(EOFError, OSError):
            lost = int(peer.recv_bytes())
        if rank is None or lost == _ALL_WELL:  # this rank ends, or that one
            return
        self._send(rank if lost is None else lost)
        if self._leaving.wait(GRACE):
            return
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
        if self._rank == 0 or (lost is None and (self._rank == 1 or local == "0")):
            interruption.report(f"Rank {rank} ended, which ends the run")
        os._exit(1)

    def _send(self, number: int) -> None:
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                peer.send_bytes(str(number).encode())

    def leave(self) -> None:
        """Send the others that this rank ends. A spawned process sends nothing: it cannot know its errors here."""
        self._leaving.set()
        if multiprocessing.parent_process() is None:
            self._send(self._rank if hasattr(sys, "last_value") else _ALL_WELL)
        self.close()

    def close(self) -> None:
        """Close the connections, as do forked processes, which may outlive the rank."""
        while self._peers:
            self._peers.popitem()[0].close()
