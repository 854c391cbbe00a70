import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hash_chain import HashChain, make_config, rows

from lmoe.data.loader import Loader, ValidationBatches, build_loader
from lmoe.data.packing import IGNORE
from lmoe.data.sources import MqarSource
from lmoe.data.tokenizer import load_tokenizer
from tests.harness.runs import children_of, processes, wait_for_the_end

BYTE = load_tokenizer("byte")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """Two sources, of which the text has few samples: epochs end within the tests."""
    cache = tmp_path_factory.mktemp("cache")
    return {"mixture": ["0.7 mqar", f"0.3 text:{corpus[0]}/*.jsonl"], "cache": str(cache)}


def build(data, world=1, microbatches=1, batch_size=2, state=None, seed=1, **options):
    config = make_config("unused", batch_size=batch_size, seed=seed, **{**data, **options})
    return [
        build_loader(config, BYTE, rank=r, world=world, microbatches=microbatches, state=state)
        for r in range(world)
    ]


def consumed(state):
    """Samples given, by the name of the source."""
    return {entry["name"]: entry["consumed"] for entry in state["sources"].values()}


def walk(loaders, steps, chain=None):
    chain = chain or HashChain()
    iterators = [iter(loader) for loader in loaders]
    for _ in range(steps):
        chain.add([next(iterator) for iterator in iterators])
    for iterator in iterators:
        iterator.close()
    return chain


@pytest.fixture(scope="module")
def whole(data):
    """40 steps of 8 rows on one rank."""
    return walk(build(data, microbatches=4), 40).links


@pytest.mark.parametrize(
    "world, microbatches, batch_size, workers, prefetch",
    [
        (2, 2, 2, 0, 2),
        (4, 1, 2, 0, 2),
        (1, 1, 8, 0, 2),
        (1, 4, 2, 2, 1),
        (1, 1, 8, 3, 4),
        (2, 1, 4, 1, 2),
        (8, 1, 1, 0, 2),
    ],
)
def test_order_is_the_same_on_any_layout(
    data, whole, world, microbatches, batch_size, workers, prefetch
):
    steps = 40 if workers == 0 else 12
    loaders = build(data, world, microbatches, batch_size, workers=workers, prefetch=prefetch)
    assert walk(loaders, steps).links == whole[:steps]
    assert {json.dumps(loader.state()) for loader in loaders} == {
        json.dumps(build(data, microbatches=4)[0].state(steps))
    }


def test_four_ranks_hold_the_microbatches_of_one(data):
    alone = next(iter(build(data, microbatches=4)[0]))
    four = [next(iter(loader))[0] for loader in build(data, world=4)]
    for a, b in zip(alone, four):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a.seq_len == b.seq_len


def test_seed_matters(data, whole):
    assert walk(build(data, microbatches=4, seed=2), 1).links[0] != whole[0]


def test_state(data):
    (loader,) = build(data, microbatches=3)
    states = []
    for step, batches in enumerate(loader):
        assert len(batches) == 3
        states.append(loader.state())
        if step == 9:
            break
    names = [s.name for s in loader.sources]
    for step, state in enumerate(states, 1):
        assert state == json.loads(json.dumps(state)) == loader.state(step)
        given = consumed(state)
        assert state["position"] == sum(given.values()) == 6 * step and list(given) == names
    assert loader.state(0)["position"] == 0 and loader.state(10) == states[-1]


@pytest.mark.parametrize("steps", [1, 17, 33])
def test_resume_on_other_layouts(data, whole, steps):
    first = build(data, world=2, microbatches=2)
    chain = walk(first, steps)
    for world, microbatches, batch_size in ((4, 1, 2), (1, 2, 4)):
        again = HashChain()
        again.digest, again.links = chain.digest.copy(), list(chain.links)
        loaders = build(data, world, microbatches, batch_size, state=first[0].state())
        assert walk(loaders, 40 - steps, again).links == whole
        assert loaders[0].state() == build(data, microbatches=4)[0].state(40)


def test_killed_and_resumed(data, whole, tmp_path):
    """A process with loader workers dies of SIGKILL at any moment; what it had written last is
    enough to go on, thrice."""
    out = tmp_path / "chain.jsonl"
    chain, state = HashChain(), None
    for target in (5, 11, 18):
        options = {"folder": str(tmp_path), "microbatches": 4, "workers": 2, "state": state, **data}
        env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        out.write_text("")
        child = subprocess.Popen(
            [sys.executable, str(HERE / "hash_chain.py"), json.dumps(options), str(out), "100000"],
            env=env,
        )
        while (
            out.read_bytes().count(b"\n") < 3
            or json.loads(out.read_text().splitlines()[2])["state"] is None
        ):
            assert child.poll() is None
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        lines = [
            json.loads(line)
            for line in out.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        # What the killed run saw from its start is what a run without a break sees there.
        seen = walk(build(data, microbatches=4, state=state), min(len(lines), target))
        assert [line["hash"] for line in lines[: len(seen.links)]] == seen.links
        walk(build(data, microbatches=4, state=state), len(seen.links), chain)
        state = lines[len(seen.links) - 1]["state"]
    assert state["position"] == 8 * len(chain.links) and chain.links == whole[: len(chain.links)]


def test_another_mixture_and_batch_size_from_a_step_on(data, corpus):
    (old,) = build(data, batch_size=8)
    walk([old], 10)
    state = old.state()
    text = f"text:{corpus[0]}/*.jsonl"
    (new,) = build(
        {**data, "mixture": [f"1 {text}", f"1 text:{corpus[0]}/sub"]}, batch_size=3, state=state
    )
    walk([new], 20)
    after = new.state()
    sub = f"text:{corpus[0]}/sub"
    before, given = consumed(state), consumed(after)
    # kept, should it come back
    assert after["position"] == 80 + 60 and given["mqar"] == before["mqar"]
    assert abs(given[text] - before[text] - 30) <= 3
    assert given[text] - before[text] + given[sub] == 60
    (back,) = build(data, batch_size=8, state=after)
    assert consumed(back.state()) == given


def test_another_seq_len_goes_on_after_as_many_tokens(data):
    (old,) = build(data)
    walk([old], 20)
    counts = consumed(old.state())
    (new,) = build(data, state=old.state(), seq_len=48)
    assert consumed(new.state()) == {name: -(-count * 64 // 48) for name, count in counts.items()}
    assert next(iter(new))[0].tokens.shape == (96,)


def test_epochs(corpus, tmp_path):
    """Every sample once an epoch, in another order the next."""
    (loader,) = build(
        {"source": "text", "paths": [str(corpus[0])], "cache": str(tmp_path)}, batch_size=1
    )
    n = loader.sources[0].samples
    iterator = iter(loader)
    epochs = [[tuple(next(iterator)[0].tokens.tolist()) for _ in range(n)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_is_one_line(corpus, tmp_path, workers):
    options = {"source": "text", "paths": [str(corpus[0])], "cache": str(tmp_path)}
    (loader,) = build(options, workers=workers)
    (shard,) = tmp_path.glob("*/*.tokens")
    os.truncate(shard, 100)
    with pytest.raises(ValueError) as error:
        next(iter(loader))
    assert str(error.value).startswith(
        f"data.paths: shard '{shard}' is damaged"
    ) and "\n" not in str(error.value)


def test_signals_for_the_job_leave_the_workers_alone(data, whole):
    """A batch system signals every process of a job; the loader must outlive that, or no checkpoint
    could follow."""
    before = loader_processes()
    (loader,) = build(data, microbatches=4, workers=2)
    iterator, chain = iter(loader), HashChain()
    chain.add([next(iterator)])
    children = loader_processes() - before
    assert len(children) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for pid in children:  # sent by a process that is not their parent
            subprocess.run(["kill", f"-{number}", str(pid)], check=True)
    time.sleep(0.2)
    for _ in range(11):
        chain.add([next(iterator)])
    assert chain.links == whole[:12]
    for pid in children:  # the parent may
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while loader_processes() & children:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def loader_processes():
    """Those of this process that run."""
    return {
        int(path.name)
        for path in children_of(os.getpid())
        if b"resource_tracker" not in (path / "cmdline").read_bytes()
    }


@pytest.mark.parametrize("workers, prefetch", [(1, 1), (2, 1000)])
def test_loader_processes_end_with_a_killed_parent(tmp_path, workers, prefetch):
    """Even one that hangs while it reads, and one with much to prepare ahead."""
    program = f"""
import os, time
from lmoe.data.loader import Loader
from lmoe.data.sources import MqarSource
from lmoe.data.tokenizer import load_tokenizer

class Slow(MqarSource):
    def row(self, epoch, i):
        if i > 50:
            time.sleep(1000)
        return super().row(epoch, i)

source = Slow("mqar", load_tokenizer("byte"), 2, 2, "train", 8, 1)
batches = iter(Loader([source], [1.0], 1, workers={workers}, prefetch={prefetch}))
print("ready", flush=True)
for batch in batches:
    print("a batch", flush=True)
    time.sleep(1000)
"""
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "JOB": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
    parent.stdout.readline()
    deadline = time.monotonic() + 60
    while len(processes(tmp_path)) < 1 + workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)  # their signals are set up
    parent.kill()
    parent.wait()
    wait_for_the_end(tmp_path, 3)


# Validation


def validation(data, world, batch_size=2, steps=5, seed=1, **options):
    config = make_config(
        "unused", batch_size=batch_size, steps=steps, seed=seed, **{**data, **options}
    )
    return [
        build_loader(config, BYTE, rank=r, world=world, split="validation") for r in range(world)
    ]


def test_validation_is_the_same_on_any_world(data):
    reference = [row for batch in validation(data, 1)[0] for row in rows(batch)]
    assert len(reference) == 10
    for world in (1, 2, 3, 4, 16):
        ranks = [list(loader) for loader in validation(data, world, seed=world)]
        assert (
            {len(batches) for batches in ranks}
            == {-(-5 // world)}
            == {len(validation(data, world)[0])}
        )
        assert all(len(batch.tokens) == 2 * 64 for batches in ranks for batch in batches)
        found = [row for b in range(len(ranks[0])) for batches in ranks for row in rows(batches[b])]
        assert found[:10] == reference
        assert all(set(labels) == {IGNORE} for _, labels, _ in found[10:])


def test_validation_can_be_repeated_beside_training(data, whole):
    (loader,) = validation(data, 1)
    (train,) = build(data, microbatches=4)
    chain, first = HashChain(), [batch.tokens.tolist() for batch in loader]
    for step, batches in enumerate(train):
        chain.add([batches])
        assert [batch.tokens.tolist() for batch in loader] == first
        if step == 3:
            break
    assert chain.links == whole[:4]


def test_validation_with_fewer_samples_than_asked(corpus, tmp_path):
    options = {"source": "text", "paths": [str(corpus[0])], "cache": str(tmp_path)}
    (loader,) = validation(options, 1, steps=1000)
    samples = loader.sources[0].samples
    found = [
        tuple(tokens)
        for batch in loader
        for tokens, labels, _ in rows(batch)
        if set(labels) != {IGNORE}
    ]
    assert loader.rows == samples == len(found) > 3 and len(loader) == -(-samples // 2)


def test_splits_share_no_document(tmp_path):
    """Each document spells its own number, so a row shows which documents it holds."""
    for k in range(200):
        (tmp_path / f"{k:03d}.txt").write_text(f"{k:03d}" * 30)
    options = {
        "source": "text",
        "paths": [str(tmp_path)],
        "cache": str(tmp_path / "cache"),
        "seq_len": 91,
    }
    (train,) = build(options, batch_size=1)
    iterator = iter(train)
    seen = {
        BYTE.decode(next(iterator)[0].labels[:3].tolist()) for _ in range(train.sources[0].samples)
    }
    held_out = {
        BYTE.decode(batch.labels[:3].tolist())
        for batch in validation(options, 1, batch_size=1, steps=1000)[0]
    }
    assert not seen & held_out and len(seen) + len(held_out) == 200 and 8 < len(held_out) < 40


def test_loader_needs_no_config():
    source = MqarSource("mqar", BYTE, 2, 2, "train", 8, 1)
    assert next(iter(Loader([source], [1.0], batch_size=3)))[0].cu_seqlens.tolist() == [
        0,
        8,
        16,
        24,
    ]
    assert len(ValidationBatches([source], [1.0], rows=7, batch_size=2, world=2)) == 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("field", ["tokens", "labels"])
@pytest.mark.parametrize("wrong", [-1, 259, -99, 1 << 40])
def test_ids_beyond_the_vocabulary_are_refused(workers, field, wrong):
    """Whatever a source gives, in training and validation, by its name."""
    if workers and wrong != 259:
        return
    source = Wrong("odd source", BYTE, 2, 2, "train", 8, 1)
    source.field, source.wrong = field, wrong
    loaders = (
        Loader([source], [1.0], 3, workers=workers, vocab_size=259),
        ValidationBatches([source], [1.0], 7, 2, vocab_size=259),
    )
    for batches in loaders:
        with pytest.raises(ValueError, match=rf"^data: odd source gives token {wrong}; [^\n]*259$"):
            for _ in zip(range(5), batches):
                pass
    source.wrong = 258
    assert len(next(iter(loaders[1])).tokens) == 16


class Wrong(MqarSource):
    def row(self, epoch, i):
        row = super().row(epoch, i)
        getattr(row, self.field)[3] = self.wrong
        return row


def test_build_loader_knows_the_vocabulary(corpus, tmp_path):
    for split in ("train", "validation"):
        config = make_config(tmp_path, source="text", paths=[str(corpus[0])])
        assert build_loader(config, BYTE, split=split).vocab_size == 259


def test_import_is_light():
    code = (
        "import sys, lmoe.data.tokenizer, lmoe.data.prepare; assert not {'torch', 'torchdata'} &"
        " set(sys.modules)"
    )
    code += "; import lmoe.data.loader; assert 'torchdata' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_memory(data, workers):
    batch = next(iter(build(data, workers=workers)[0]))[0]
    assert all(x.is_pinned() for x in batch[:3])
    assert all(x.is_pinned() for x in next(iter(validation(data, 1)[0]))[:3])
