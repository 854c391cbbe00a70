"""Where the launchers of a job's machines meet, and the store that they and their ranks share."""

import os
import socket

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

LOOPBACK = "127.0.0.1"


def run_id() -> str:
    """Name the job."""
    return os.environ.get("RUN_ID") or "lmoe"


class Alone(RendezvousHandler):
    """The rendezvous of one machine: the store listens on loopback, and nothing in it is a
    pickle. port: of the store; 0: a free one."""

    use_agent_store = True  # the ranks are its clients, and it outlives them

    def __init__(self, port: int):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen(4096)
        except OSError as error:
            raise ValueError(f"MASTER_PORT={port}: {error.strerror}") from None
        port = listener.getsockname()[1]
        options = {"is_master": True, "wait_for_workers": False}
        self.store = dist.TCPStore(LOOPBACK, port, master_listen_fd=listener.detach(), **options)
        self.info = RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return run_id()

    def next_rendezvous(self) -> RendezvousInfo:
        return self.info

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True


def several(nodes: int, first: bool, host: str, port: int) -> RendezvousHandler:
    """Make torchrun's rendezvous of several machines. first: this is the host, which serves the
    store, on all its addresses."""
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"{host}:{port}",
            run_id=run_id(),
            min_nodes=nodes,
            max_nodes=nodes,
            is_host=str(first).lower(),
        )
    )
