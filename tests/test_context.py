"""Context parallelism layer by layer: documents that begin, end and go on at any place around the
ranks' borders; prefill; what is sent."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lmoe.config import load_config
from lmoe.data.packing import HostBatch
from lmoe.model.mixers import MIXERS
from lmoe.parallel import compat
from lmoe.parallel.context import make_builder, shares_heads
from tests.harness.compare import TINY, build_run, dims_of, microbatches_of
from tests.model.latent import KEY, LATENT, ROTARY, VALUE
from tests.model.variants import (
    MIXER_VARIANTS,
    SHAPE,
    UNREGISTERED,
    class_of,
    make_mixer,
    make_seq,
    make_slow_mixer,
    window_of,
)

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.xdist_group("world4")]
T, RANKS = 24, 4
SIZE = T // RANKS
# Two documents with their border at every place; then documents inside a rank, over three and four
# ranks, empty, of one token.
LAYOUTS = [[b, T - b] for b in range(1, T)] + [
    [T],
    [5, 1, 1, 17],
    [1] * 7 + [0, 17],
    [6, 6, 6, 6],
    [2, 20, 2],
    [0, 11, 0, 13, 0],
    [1] * T,
]
OVER_RANKS = [[T], [5, 1, 1, 17], [2, 20, 2]]


def builder(variant, method):
    """(Dims, SeqBuilder) of four context parallel ranks."""
    config = load_config(
        [
            "--parallel.cp=4",
            f"--parallel.cp_method={method}",
            f"--attention.window={window_of(variant)}",
        ],
        toml=TINY,
    )
    dims = dims_of(config)
    build = make_builder(config, dims, dense_mask=True)
    build.context.share_heads = shares_heads(class_of(variant), method)
    return dims, build


def worst_difference(variant, method):
    """Over all LAYOUTS: how far this rank's outputs, input gradients and the summed weight
    gradients are from a whole stream's.

    With decays near 1: what passes a border lasts, and is no less seen than with those of the first
    weights. These, whose transitions are far from 1, take the layouts with documents over several
    ranks."""
    dims, build = builder(variant, method)
    mine = slice(dims.index("cp") * SIZE, (dims.index("cp") + 1) * SIZE)
    slow, first = make_slow_mixer(variant), make_mixer(variant)
    worst = 0.0
    for mixer, lengths in [(slow, x) for x in LAYOUTS] + [(first, x) for x in OVER_RANKS]:
        torch.manual_seed(1)
        x, dy = torch.randn(2, T, SHAPE.dim, dtype=torch.float64)
        whole = x.clone().requires_grad_()
        y, _, _ = mixer(whole, make_seq(lengths, variant))
        y.backward(dy)
        expected = [p.grad for p in mixer.parameters()]
        mixer.zero_grad()
        part = x[mine].clone().requires_grad_()
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        out, _, _ = mixer(part, build.seq_info(borders, 1, T))
        out.backward(dy[mine])
        pairs = [(out, y[mine]), (part.grad, whole.grad[mine])]
        for p, gradient in zip(mixer.parameters(), expected, strict=True):
            dist.all_reduce(p.grad)
            pairs.append((p.grad, gradient))
        mixer.zero_grad()
        # A bias of keys hardly moves a softmax: its gradient is rounding alone.
        worst = max(
            worst,
            *((a - b).abs().max().item() / b.abs().max().clamp(min=1e-3).item() for a, b in pairs),
        )
    return worst


def methods(variant):
    mixer, options = class_of(variant), MIXER_VARIANTS[variant][1]
    if not mixer.splits_sequence:
        return []
    if shares_heads(mixer, "auto"):
        return ["auto"]
    divides = all(options.get(key, SHAPE.heads) % RANKS == 0 for key in ("heads", "kv_heads"))
    return ["lasp2", "all_to_all"] if divides else ["lasp2"]


def often(variant, method):
    """Whether a case belongs to the fast suite: every way in which softmax layers gather, and every
    mixer whose decays are not all that tells it from one that stays."""
    if MIXER_VARIANTS[variant][0] == "latent":
        return True
    alike = MIXER_VARIANTS[variant][0] in ("bla", "lightning", "retnet", "hgrn2", "gsa")
    kinds = ("uniform", "window", "gqa", "toy")
    return method != "all_to_all" and variant.endswith(kinds) and not alike


CASES = [
    pytest.param(v, m, marks=() if often(v, m) else pytest.mark.slow)
    for v in MIXER_VARIANTS
    for m in methods(v)
]


@pytest.mark.parametrize("variant, method", CASES)
def test_documents_anywhere(pools, variant, method):
    for worst in pools(4).run(worst_difference, variant, method):
        assert worst < 1e-9


def prefilled(variant, method, lengths):
    """Whether the states that prefill leaves are the whole stream's, on every rank."""
    dims, build = builder(variant, method)
    mixer = make_slow_mixer(variant)
    torch.manual_seed(1)
    x = torch.randn(T, SHAPE.dim, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    states = []
    for split in (False, True):
        state = mixer.initial_state(len(lengths), T, "cpu", torch.float64)
        seq = build.seq_info(cu_seqlens, 1, T) if split else make_seq(lengths, variant)
        rows = (
            slice(dims.index("cp") * SIZE, (dims.index("cp") + 1) * SIZE) if split else slice(None)
        )
        with torch.no_grad():
            mixer(x[rows], seq, state)
        states.append({key: value[: len(lengths)] for key, value in state.items()})
    expected, split = states
    assert expected.keys() == split.keys()
    for key in expected:
        torch.testing.assert_close(split[key], expected[key], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("variant, method", CASES)
def test_prefill_leaves_the_states_of_one_rank(pools, variant, method):
    for lengths in ([T], [6, 12, 6], [1, 7, 14, 2], [5, 13, 1, 5]):
        pools(4).run(prefilled, variant, method, lengths)


class Sent:
    """Counts what lmoe sends: {kind: [calls, bytes that this rank receives]}."""

    KINDS = {
        "start_all_gather": "gather",
        "start_all_to_all": "exchange",
        "start_reduce_scatter": "scatter",
        "start_all_reduce": "reduce",
    }

    def __enter__(self):
        self.seen, self.real = {kind: [] for kind in self.KINDS.values()}, {}
        for name, kind in self.KINDS.items():
            self.real[name] = getattr(compat, name)
            setattr(compat, name, self._counted(self.real[name], kind))
        return self

    def _counted(self, function, kind):
        def run(x, *arguments):
            self.seen[kind].append(x.nbytes)
            return function(x, *arguments)

        return run

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(compat, name, function)


def sent(variant_words, seq_len):
    """Of one forward and backward pass of one layer: [(calls, bytes given)] per kind, forward and
    then backward."""
    config, dims, model, _, _, build = build_run(
        [*variant_words, f"--data.seq_len={seq_len}", "--moe.experts=0", "--model.ffn_hidden=16"]
    )
    ((tokens, labels, seq), *_), valid = microbatches_of(config, dims, build, 0)
    with Sent() as forward:
        loss = model(tokens, seq, labels, valid).loss
    with Sent() as backward:
        loss.backward()
    return forward.seen, backward.seen


ONE_LAYER = [
    "--model.layers=1",
    "--model.pattern=L",
    "--parallel.cp=4",
    "--model.heads=2",
    "--training.dtype=float32",
]
H, K, V = 2, 16, 16
STATE = 4 * H * K * V
DECAY = {"gla": 4 * H * (K + V), "gated_deltanet": 4 * H * K * K}
HALO = {"gla": [], "gated_deltanet": [4 * 3 * 32]}  # three rows of x


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("seq_len", [48, 192])
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_lasp2_gathers_once_each_way(pools, mixer, seq_len, mode):
    """Whatever the length, and with recomputation: one gather of states forward, one of gradients
    backward, one exchange of a halo."""
    words = [*ONE_LAYER, f"--model.mixer={mixer}", f"--activation_checkpoint.mode={mode}"]
    for forward, backward in pools(4).run(sent, words, seq_len):
        assert forward["gather"] == [STATE + DECAY[mixer]] and backward["gather"] == [STATE]
        assert len(forward["exchange"]) == len(HALO[mixer])
        assert all(n in (0, *HALO[mixer]) for n in forward["exchange"])  # the last rank sends none
        again = 1 if mode == "full" else 0  # the halo's rows are fetched once more
        assert len(backward["exchange"]) == (1 + again) * len(HALO[mixer])
        assert not forward["scatter"] + forward["reduce"] + backward["scatter"] + backward["reduce"]


@pytest.mark.parametrize("seq_len", [48, 192])
def test_softmax_layers_gather_keys_and_values(pools, seq_len):
    """One gather of k and v, scattered back in one; half of the queries and outputs go to the
    mirrored rank and back."""
    size = seq_len // 4
    kv, half = 2 * 4 * size * 32, 4 * (size // 2) * 32
    for forward, backward in pools(4).run(sent, [*ONE_LAYER, "--model.pattern=N"], seq_len):
        assert (
            forward["gather"] == [kv]
            and forward["exchange"] == [half] * 2
            and not forward["scatter"]
        )
        assert (
            backward["scatter"] == [4 * kv]
            and backward["exchange"] == [half] * 2
            and not backward["gather"]
        )


def test_a_window_needs_the_rows_before_only(pools):
    for forward, backward in pools(4).run(
        sent, [*ONE_LAYER, "--model.pattern=N", "--attention.window=7"], 48
    ):
        assert (
            not forward["gather"]
            and len(forward["exchange"]) == 1
            and forward["exchange"][0] in (0, 2 * 4 * 6 * 32)
        )
        assert not backward["scatter"] and len(backward["exchange"]) == 1


def sent_by_latent(words, seq_len):
    with mock.patch.dict(MIXERS, UNREGISTERED):
        return sent([*ONE_LAYER, '--model.pattern=["latent"]', "--model.heads=4", *words], seq_len)


def test_a_latent_travels_as_it_is(pools):
    """Latent and rotary key of a token in one gather, not the keys and values made of them."""
    size, heads = 12, 4
    kv, q, o = (4 * size * width for width in (LATENT + ROTARY, heads * (KEY + ROTARY), 4 * VALUE))
    for forward, backward in pools(4).run(sent_by_latent, [], 4 * size):
        assert forward["gather"] == [kv] and forward["exchange"] == [q // 2, o // 2]
        assert backward["scatter"] == [4 * kv] and backward["exchange"] == [o // 2, q // 2]
    words = ["--parallel.cp_method=all_to_all"]
    for forward, backward in pools(4).run(sent_by_latent, words, 4 * size):
        assert forward["gather"] == [kv] and forward["exchange"] == [q, o]
        assert backward["scatter"] == [4 * kv] and backward["exchange"] == [o, q]


def attended(method, window):
    """Assert that a kernel gets all tokens of kv, of any dtypes and dims, and of q the heads that
    it is told of; the collectives that this took."""
    dims, build = builder("attention-window" if window else "latent-uniform", method)
    rank = dims.index("cp")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(T, 4, 3, generator=generator)
    shapes = [(T, 4, 3), (T, 5), (T, 4, 2), (T, 7)]
    dtypes = [torch.float32, torch.float64, torch.float64, torch.float32]
    whole = [torch.randn(s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    mine = slice(rank * SIZE, (rank + 1) * SIZE)
    keys = slice(max(0, mine.start - window + 1), mine.stop) if window else slice(0, T)

    def kernel(q_seen, kv, mask, seen_window, heads):
        assert seen_window == window and mask.dense.shape[-1] == kv[0].shape[1]
        assert torch.equal(q_seen, (q if method == "all_to_all" else q[mine])[None, :, heads])
        for got, expected in zip(kv, whole, strict=True):
            expected = expected[:, heads] if expected.ndim > 2 else expected
            expected = expected[keys if method == "lasp2" else slice(0, T)]
            assert got.dtype == expected.dtype and torch.equal(got[0, -len(expected) :], expected)
        return q_seen

    seq = build.seq_info(torch.tensor([0, T], dtype=torch.int32), 1, T)
    with Sent() as counted:
        o = seq.context.attend(kernel, q[mine], tuple(t[mine] for t in whole), seq, window)
    assert torch.equal(o, q[mine])
    return {kind: len(calls) for kind, calls in counted.seen.items() if calls}


def test_one_exchange_for_tensors_of_one_dtype(pools):
    assert pools(4).run(attended, "lasp2", 5) == [{"exchange": 2}] * 4
    assert pools(4).run(attended, "all_to_all", 0) == [{"gather": 2, "exchange": 3}] * 4


def loss_with_borders(words, borders):
    config, dims, model, _, _, build = build_run(words)
    length = config.data.seq_len
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(0, 64, (2, length), generator=generator)
    labels[torch.tensor(borders) - 1] = -100
    cu_seqlens = torch.tensor([0, *borders, length], dtype=torch.int32)
    tokens, labels, seq = build(HostBatch(tokens, labels, cu_seqlens, length))
    with torch.no_grad():
        loss = model(tokens, seq, labels, 1.0).loss
    dist.all_reduce(loss)
    return loss.item() / (dims.world // dims.cp)


def test_labels_at_the_ranks_borders(pools):
    """The loss of documents that end one before, at and one after each border."""
    for border in (12, 24, 36):
        for end in (border - 1, border, border + 1):
            alone = loss_with_borders([], [end])
            for loss in pools(4).run(loss_with_borders, ["--parallel.cp=4"], [end]):
                assert loss == pytest.approx(alone, rel=1e-12)
