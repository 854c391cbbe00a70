"""Attention masks: what each query sees, which of them are built, prefill of many prompts, and
where the decode state is written."""

from unittest import mock

import pytest
import torch

from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.generate import Decoder
from lmoe.model import batch
from lmoe.model.batch import SeqBuilder, StepInfo, prompt_info
from lmoe.model.build import attention_windows, build_model, needs_dense_mask
from lmoe.model.init import materialise
from lmoe.model.mixers import MIXERS
from lmoe.parallel import context
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.context import ContextParallel, SliceBuilder
from tests.harness.weights import init_noisy
from tests.model.variants import MIXER_VARIANTS, UNREGISTERED, class_of, make_mixer, make_seq

CPU = torch.device("cpu")
WINDOWS = [0, 1, 3, 7, 12, 30]
LINEAR = ["--model.pattern=L", "--model.heads=3", "--mixer.heads=4", "--attention.impl=varlen"]


def visible(lengths, window):
    """[T, T] bool by definition: document by document, token by token."""
    mask, start = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool), 0
    for length in lengths:
        for i in range(start, start + length):
            mask[i, max(start, i - window + 1) if window else start : i + 1] = True
        start += length
    return mask


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_of_a_stream(window):
    for lengths in ([12], [5, 1, 6], [1] * 12, [3, 0, 9]):
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        build = SeqBuilder("cpu", dense_mask=True, windows=set(WINDOWS))
        (mask,) = build.seq_info(borders, 1, 12).mask(window)
        assert torch.equal(mask.dense[0, 0], visible(lengths, window))
        half = borders.clamp(max=12)
        rows = torch.cat([half, half[1:] + 12])
        (mask,) = build.seq_info(rows, 2, 12).mask(window)
        assert mask.dense.shape == (2, 1, 12, 12)
        assert torch.equal(mask.dense[1], mask.dense[0])
        assert torch.equal(mask.dense[1, 0], visible(lengths, window))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_masks_of_prompts(window):
    lengths = [1, 9, 3, 9, 12]
    masks = prompt_info(lengths, "cpu", dense_mask=True, windows={window}).mask(window)
    assert [mask.max_seqlen_q for mask in masks] == lengths
    for mask, n in zip(masks, lengths, strict=True):
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        assert torch.equal(causal if mask.dense is None else mask.dense[0, 0], visible([n], window))
    dense = [mask.dense for mask in masks if mask.dense is not None]
    assert bool(dense) == (0 < window < 12)
    assert len({t.untyped_storage().data_ptr() for t in dense}) == bool(dense)


def test_an_unannounced_window_raises():
    """On SDPA and with borders alike: no layer gets the mask of another window."""
    for dense_mask in (True, False):
        seq = SeqBuilder("cpu", dense_mask=dense_mask, windows={0, 5}).seq_info(
            torch.tensor([0, 8], dtype=torch.int32), 1, 8
        )
        seq.mask(0), seq.mask(5)
        with pytest.raises(AssertionError, match="window = 4"):
            seq.mask(4)
    mixer = make_mixer("attention-window")
    with pytest.raises(AssertionError, match="window = 5"):
        mixer(torch.randn(8, 32, dtype=torch.float64), make_seq([8]))


def test_the_windows_of_a_model():
    def windows(*words):
        return attention_windows(load_config(["--attention.window=6", *words]))

    assert windows() == {6} and windows("--model.pattern=N") == {6}
    assert windows("--model.pattern=L") == set()
    assert windows("--model.pattern=L", "--model.mixer=attention") == {6}
    with mock.patch.dict(MIXERS, UNREGISTERED):
        assert windows("--model.mixer=latent", "--mixer.window=9") == {6, 9}
        assert windows('--model.pattern=["gla", "latent"]') == {0}


@pytest.mark.parametrize("method", [None, "lasp2", "all_to_all"])
def test_a_linear_model_has_no_masks(monkeypatch, method):
    for module in (batch, context):
        monkeypatch.setattr(module, "dense_mask", None)
    config = load_config(LINEAR)
    common = {"dense_mask": True, "windows": attention_windows(config)}
    build = SeqBuilder("cpu", **common)
    if method:
        ranks = Ranks("none", 4, 1)
        ours = ContextParallel(ranks, method)
        build = SliceBuilder("cpu", **common, ranks=ranks, context=ours, tp=1, tp_index=0)
    assert build.seq_info(torch.tensor([0, 5, 16], dtype=torch.int32), 2, 8).masks == {}
    assert prompt_info([3, 1], "cpu", **common).masks == {}


def test_a_linear_model_is_not_asked_for_attention():
    """Its heads need not divide, nor its device have variable-length attention."""
    check_config(load_config(LINEAR), 1, CPU)
    assert not needs_dense_mask(load_config(LINEAR), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"attention\.heads = 3 does not divide"):
        check_config(load_config([*LINEAR, "--model.pattern=LN"]), 1, CPU)


def hybrid_decoder():
    """(Decoder, Model) with layers of two windows between linear ones."""
    words = ["--model.dim=32", "--model.heads=4", "--model.vocab_size=64", "--model.layers=4"]
    words += ['--model.pattern=["attention", "gla", "latent", "gated_deltanet"]']
    words += ["--attention.window=4", "--attention.kv_heads=2", "--model.mixer=latent"]
    with mock.patch.dict(MIXERS, UNREGISTERED), torch.device("meta"):
        config = load_config([*words, "--moe.experts=4", "--moe.hidden=16", "--moe.impl=loop"])
        model = build_model(config).double()
        windows = attention_windows(config)
    materialise(model, "cpu")
    init_noisy(model)
    assert windows == {4, 0}
    return Decoder(model, CPU, torch.float64, dense_mask=True, windows=windows), windows


@pytest.mark.parametrize(
    "lengths", [[1], [9], [1, 1, 1], [5, 5, 5, 5], [3, 4, 5], [1, 12, 2, 12, 7]], ids=str
)
def test_prefill_of_many_prompts_is_each_alone(lengths):
    """Prompts shorter than the window, of just its size and longer; the logits of the last tokens
    and of the next ones."""
    decoder, windows = hybrid_decoder()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 64, (n + 1,), generator=generator) for n in lengths]
    build = SeqBuilder("cpu", dense_mask=True, windows=windows)
    with torch.no_grad():
        alone = [
            decoder.model(p, build.seq_info(torch.tensor([0, len(p)]).int(), 1, len(p)))
            for p in prompts
        ]
    got = decoder.prefill([p[:-1].tolist() for p in prompts], 16)
    torch.testing.assert_close(got, torch.stack([x[-2] for x in alone]), rtol=1e-10, atol=1e-10)
    got = decoder.step(torch.stack([p[-1] for p in prompts]))
    torch.testing.assert_close(got, torch.stack([x[-1] for x in alone]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", [v for v in MIXER_VARIANTS if class_of(v).softmax])
def test_the_state_stays_where_it_is(variant):
    """Prefill and steps write in place: a captured graph may hold the addresses."""
    mixer = make_mixer(variant)
    state = mixer.initial_state(2, 12, "cpu", torch.float64)
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    window = mixer.options.window
    with torch.no_grad():
        x = torch.randn(9, 32, dtype=torch.float64)
        mixer(x, prompt_info([3, 6], "cpu", dense_mask=True, windows={window}), state)
        for i in range(4):
            mixer(x[:2], StepInfo(torch.tensor([3, 6]) + i), state)
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == places


def test_positions_stay_where_they_are():
    decoder, _ = hybrid_decoder()
    logits = decoder.prefill([[1, 2], [3]], 8)
    positions = decoder.positions
    decoder.step(logits.argmax(-1))
    assert decoder.positions is positions and positions.tolist() == [3, 2]
