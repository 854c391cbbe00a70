"""Shared by all tests: one process group per process, the pools of ranks, and threads that leave
room for the other worker."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def one_rank():
    """This process as a world of one."""
    from tests.harness.pool import join_alone

    join_alone()


@pytest.fixture(scope="session")
def pools():
    """world size -> Pool, each started at its first use and kept for the session."""
    from tests.harness.pool import Pool

    started = {}

    def pool(world):
        if world not in started:
            started[world] = Pool(world)
        return started[world]

    yield pool
    for p in started.values():
        p.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small documents, which runs can train on."""
    from tests.harness.runs import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
