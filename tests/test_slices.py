"""What is easily lost when a microbatch lies on several ranks: counts, weights, dtypes, windows of
just the slice's size."""

import pytest
import torch

from lmoe.config import load_config
from lmoe.data.packing import HostBatch
from lmoe.evaluate import windows
from lmoe.parallel import compat
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.context import ContextParallel, SliceBuilder
from tests.harness.compare import (
    TINY,
    build_run,
    compare_to_one_rank,
    differences,
    dims_of,
    microbatches_of,
    run_layout,
)
from tests.harness.layouts import words
from tests.test_context import ONE_LAYER, Sent

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.xdist_group("world4")]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_global_batch_balance_under_split_microbatches(pools, layout):
    """Counts over all ranks and p in equal parts: the value of one rank that has the rows of
    all."""
    data = 4 // torch.Size(layout.values()).numel()
    whole = run_layout(["--moe.balance=global_batch", f"--training.batch_size={data}"])
    for result in pools(4).run(run_layout, ["--moe.balance=global_batch", *words(layout)]):
        assert max(differences(whole, result).values()) < 1e-9


@pytest.mark.parametrize("window", [12, 13, 14])
def test_windows_around_the_size_of_a_slice(pools, window):
    compare_to_one_rank(
        pools(4),
        [f"--attention.window={window}", "--model.pattern=N", "--model.layers=1"],
        words({"cp": 4}),
        steps=1,
    )


def shown(borders, queries, keys, window):
    """[Tq, Tk]: what variable-length attention with these borders sees, aligned at every document's
    last key."""
    mask, cu_q, cu_k = (
        torch.zeros(queries, keys, dtype=torch.bool),
        borders.cu_seqlens_q.tolist(),
        borders.cu_seqlens_k.tolist(),
    )
    assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (
        0,
        0,
        queries,
        keys,
    )  # every row belongs to a document: all gradients are written
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        assert 0 <= b - a <= borders.max_seqlen_q and 0 <= d - c <= borders.max_seqlen_k
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        mask[a:b, c:d] = (distance >= 0) & ((distance < window) if window else True)
    return mask


@pytest.mark.parametrize("T, size", [(24, 4), (12, 4), (27, 3)])
def test_borders_of_varlen_attention_are_the_mask(T, size):
    for window in (0, 1, 4, T // size, T // size + 1, T // size + 2, T):
        for lengths in [[b, T - b] for b in range(1, T)] + [[T], [5, 1, 1, T - 7], [1] * T]:
            cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            for rank in range(size):
                ranks = Ranks("none", size, rank)
                common = {
                    "windows": {window},
                    "ranks": ranks,
                    "context": ContextParallel(ranks, "lasp2"),
                    "tp": 1,
                    "tp_index": 0,
                }
                dense, varlen = (
                    SliceBuilder("cpu", dense_mask=d, **common).seq_info(cu, 1, T).mask(window)
                    for d in (True, False)
                )
                for a, b in zip(dense, varlen, strict=True):
                    assert torch.equal(a.dense[0, 0], shown(b, *a.dense.shape[2:], window))


def summed(layout, value):
    dims = dims_of(load_config(layout, toml=TINY))
    return dims.sum_over_data(
        torch.tensor([value * (1 + dims.data_rank)], dtype=torch.float64)
    ).item()


@pytest.mark.parametrize(
    "layout, expected",
    [
        ({}, 10),
        ({"tp": 2}, 3),
        ({"cp": 2}, 3),
        ({"pp": 2}, 3),
        ({"tp": 2, "cp": 2}, 1),
        ({"ep": 2}, 10),
    ],
    ids=str,
)
def test_labels_are_counted_once(pools, layout, expected):
    assert pools(4).run(summed, words(layout), 1) == [expected] * 4


@pytest.mark.parametrize(
    "tokens, length, split", [(96, 16, 4), (80, 16, 3), (48, 12, 8), (100, 10, 6)]
)
def test_windows_divide_over_the_ranks(tokens, length, split):
    stream, borders = torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32)
    t, labels, borders, _ = windows(
        HostBatch(stream, stream, borders, tokens), length, split, shuffle=False
    )
    assert len(t) % split == 0 and borders[-1] == len(t) == len(labels)
    assert (labels != -100).sum() == tokens // length


def sent_states(words):
    config, dims, model, parallel, _, build = build_run(words)
    seen, real = [], compat.start_all_gather
    compat.start_all_gather = lambda x, *rest: seen.append(x.clone()) or real(x, *rest)
    try:
        parallel.forward_backward(*microbatches_of(config, dims, build, 0))
    finally:
        compat.start_all_gather = real
    return seen


def test_states_travel_in_fp32(pools):
    layer = [w for w in ONE_LAYER if "dtype" not in w] + [
        "--training.dtype=bfloat16",
        "--moe.experts=0",
        "--model.ffn_hidden=16",
    ]
    for seen in pools(4).run(sent_states, [*layer, "--model.mixer=gla"]):
        assert len(seen) == 8  # one each way for each of four microbatches
        assert all(x.dtype == torch.float32 for x in seen)
        assert any(not torch.equal(x, x.bfloat16().float()) for x in seen[::2])


def sums_in_backward(words):
    config, dims, model, _, _, build = build_run(words)
    ((tokens, labels, seq), *_), valid = microbatches_of(config, dims, build, 0)
    loss = model(tokens, seq, labels, valid).loss
    with Sent() as backward:
        loss.backward()
    return backward.seen["reduce"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_counts_are_summed_once(pools, mode):
    for seen in pools(4).run(
        sums_in_backward,
        [
            "--parallel.cp=4",
            "--model.pattern=L",
            "--model.layers=1",
            f"--activation_checkpoint.mode={mode}",
        ],
    ):
        assert seen == []
