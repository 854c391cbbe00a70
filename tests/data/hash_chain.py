"""The data order as a chain of hashes, comparable between any numbers of ranks, microbatches and
workers.

As a script it trains on nothing: it walks a loader, writes one line of JSON per step ({"hash",
    "state"}) and goes on until it is
killed or has done `steps`:  python hash_chain.py CONFIG.json OUT.jsonl STEPS
"""

import hashlib
import json
import sys
from types import SimpleNamespace


class HashChain:
    """Hash over all rows so far, in the global sample order."""

    def __init__(self):
        self.digest = hashlib.sha256()
        self.links = []

    def add(self, ranks):
        """One step: ranks[r][m] is microbatch m of rank r. Appends the chain's value to links and
        returns it."""
        for m in range(len(ranks[0])):
            for batches in ranks:
                for row in rows(batches[m]):
                    self.digest.update(repr(row).encode())
        self.links.append(self.digest.hexdigest())
        return self.links[-1]


def rows(batch):
    """A HostBatch -> its rows as lists (tokens, labels, borders within the row)."""
    borders, n = batch.cu_seqlens.tolist(), batch.seq_len
    tokens, labels = batch.tokens.tolist(), batch.labels.tolist()
    assert (
        borders[0] == 0
        and borders[-1] == len(tokens)
        and all(a < b for a, b in zip(borders, borders[1:]))
    )
    out = []
    for a in range(0, len(tokens), n):
        assert a in borders
        out.append(
            (tokens[a : a + n], labels[a : a + n], [b - a for b in borders if a <= b < a + n])
        )
    return out


def make_config(folder, *, batch_size=2, steps=4, seed=1, **data):
    """A configuration with the sections that the loader reads."""
    default = {
        "source": "stdlib",
        "tokenizer": "byte",
        "seq_len": 64,
        "paths": [],
        "field": "text",
        "mixture": [],
        "cache": "",
    }
    default |= {
        "workers": 0,
        "prefetch": 2,
        "validation_fraction": 0.1,
        "mqar_pairs": 4,
        "mqar_queries": 4,
        "accept_changes": False,
    }
    assert not data.keys() - default.keys()
    return SimpleNamespace(
        job=SimpleNamespace(seed=seed, folder=str(folder)),
        data=SimpleNamespace(**{**default, **data}),
        training=SimpleNamespace(batch_size=batch_size),
        validation=SimpleNamespace(steps=steps),
    )


def main(config, out, steps):
    from lmoe.data.loader import build_loader
    from lmoe.data.tokenizer import load_tokenizer

    options = json.loads(config)
    shape = {key: options.pop(key) for key in ("microbatches", "state") if key in options}
    config = make_config(options.pop("folder"), **options)
    loader = build_loader(config, load_tokenizer("byte"), **shape)
    chain = HashChain()
    with open(out, "a") as file:
        for batches in loader:
            file.write(json.dumps({"hash": chain.add([batches]), "state": loader.state()}) + "\n")
            file.flush()
            if loader.steps == int(steps):
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
