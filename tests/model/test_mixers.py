"""Every token mixer: documents do not leak, the future does not leak, packing and decoding change
nothing."""

import pytest
import torch

from lmoe.model.batch import LocalContext, StepInfo, prompt_info
from tests.model.variants import (
    MIXER_VARIANTS,
    SHAPE,
    class_of,
    make_mixer,
    make_seq,
    make_slow_mixer,
    window_of,
)

every_mixer = pytest.mark.parametrize("variant", MIXER_VARIANTS)
SOFTMAX = [variant for variant in MIXER_VARIANTS if class_of(variant).softmax]
LINEAR = [v for v in MIXER_VARIANTS if v not in SOFTMAX]


def run(mixer, x, lengths, variant, dy=None):
    """(output, input gradient or None) of a packed stream."""
    x = x.clone().requires_grad_(dy is not None)
    y, _, _ = mixer(x, make_seq(lengths, variant))
    if dy is not None:
        y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("variant", LINEAR)
def test_a_slow_mixer_remembers(variant):
    """The tests of leaks rest on this: one other first token is seen hundreds of tokens later."""
    mixer, length = make_slow_mixer(variant), 260
    torch.manual_seed(0)
    x = torch.randn(length, SHAPE.dim, dtype=torch.float64)
    changed = x.clone()
    changed[0] = torch.randn(SHAPE.dim, dtype=torch.float64)
    with torch.no_grad():
        y, other = (run(mixer, rows, [length], variant)[0][-32:] for rows in (x, changed))
    assert (y - other).norm() > 5e-3 * y.norm()  # bf16 rounds to 4e-3


# The tests of leaks take decays near 1 alone: whatever passes a border with the first weights,
# whose states last for some tokens, passes it with these too, and lasts.


@every_mixer
def test_documents_do_not_leak(variant):
    """Change one document: outputs and input gradients of all others keep every bit, wherever its
    borders lie in a chunk of 16."""
    mixer = make_slow_mixer(variant)
    for first in (1, 5, 15, 16, 17, 33):
        lengths = [first, 20, 1, 18]
        torch.manual_seed(first)
        x, dy = torch.randn(2, sum(lengths), SHAPE.dim, dtype=torch.float64)
        y, dx = run(mixer, x, lengths, variant, dy)
        start = 0
        for length in lengths:
            changed, own = x.clone(), slice(start, start + length)
            changed[own] += torch.randn(length, SHAPE.dim, dtype=torch.float64)
            new_y, new_dx = run(mixer, changed, lengths, variant, dy)
            others = torch.ones(len(x), dtype=torch.bool)
            others[own] = False
            assert torch.equal(new_y[others], y[others]) and torch.equal(new_dx[others], dx[others])
            assert not torch.equal(new_y[own], y[own])
            start += length


@every_mixer
def test_packed_is_separate(variant):
    mixer = make_slow_mixer(variant)
    lengths = [7, 1, 40, 16, 2]
    torch.manual_seed(0)
    x, dy = torch.randn(2, sum(lengths), SHAPE.dim, dtype=torch.float64)
    y, dx = run(mixer, x, lengths, variant, dy)
    packed = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for length, end in zip(lengths, ends, strict=True):
        part = slice(end - length, end)
        own_y, own_dx = run(mixer, x[part], [length], variant, dy[part])
        torch.testing.assert_close(own_y, y[part], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own_dx, dx[part], rtol=1e-9, atol=1e-9)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(p.grad, packed[name], rtol=1e-9, atol=1e-9, msg=name)


@every_mixer
def test_the_future_does_not_leak(variant):
    mixer = make_slow_mixer(variant)
    torch.manual_seed(0)
    x = torch.randn(40, SHAPE.dim, dtype=torch.float64)
    y, _ = run(mixer, x, [40], variant)
    for position in (0, 1, 15, 16, 31, 39):
        changed = x.clone()
        changed[position:] += torch.randn(40 - position, SHAPE.dim, dtype=torch.float64)
        new_y, _ = run(mixer, changed, [40], variant)
        if mixer.lookahead(x[:1], torch.zeros(1)) is None:
            assert torch.equal(new_y[:position], y[:position])
        else:  # what a token knows of the next one cancels, but for rounding
            torch.testing.assert_close(new_y[:position], y[:position], rtol=1e-11, atol=1e-11)
        assert not torch.equal(new_y[position], y[position])


@every_mixer
def test_rows_are_a_way_to_lay_out_a_stream(variant):
    """The same documents in one row and in two rows (attention folds rows)."""
    mixer = make_mixer(variant)
    torch.manual_seed(0)
    x = torch.randn(48, SHAPE.dim, dtype=torch.float64)
    lengths = [10, 14, 1, 23]
    one, two = (mixer(x, make_seq(lengths, variant, rows))[0] for rows in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@every_mixer
@pytest.mark.parametrize("prompts", [[1, 15, 16, 17], [64, 3]], ids=str)
def test_decoding_is_the_forward_pass(variant, prompts):
    """Prefill prompts of different lengths, then step: every output equals the whole sequence's.
    The state is written where it lies; after a long prompt that would show in the next one, if it
    leaked."""
    mixer, steps = (make_mixer if max(prompts) < 64 else make_slow_mixer)(variant), 9
    torch.manual_seed(0)
    sequences = [torch.randn(n + steps, SHAPE.dim, dtype=torch.float64) for n in prompts]
    whole = [run(mixer, x, [len(x)], variant)[0] for x in sequences]
    state = mixer.initial_state(len(prompts), max(prompts) + steps, "cpu", torch.float64)
    places = {key: tensor.data_ptr() for key, tensor in state.items()}
    seq = prompt_info(prompts, "cpu", dense_mask=True, windows={window_of(variant)})
    with torch.no_grad():
        x = torch.cat([x[:n] for x, n in zip(sequences, prompts, strict=True)])
        y, _, _ = mixer(x, seq, state)
        for part, expected, n in zip(y.split(prompts), whole, prompts, strict=True):
            torch.testing.assert_close(part, expected[:n], rtol=1e-9, atol=1e-9)
        for i in range(steps):
            x = torch.stack([s[n + i] for s, n in zip(sequences, prompts, strict=True)])
            y, _, _ = mixer(x, StepInfo(torch.tensor(prompts) + i), state)
            torch.testing.assert_close(
                y,
                torch.stack([w[n + i] for w, n in zip(whole, prompts, strict=True)]),
                rtol=1e-9,
                atol=1e-9,
            )
    assert {key: tensor.data_ptr() for key, tensor in state.items()} == places
    assert all(tensor.shape[0] == len(prompts) for tensor in state.values())


@every_mixer
def test_decoding_from_nothing(variant):
    """Steps from the initial state alone, without a prefill."""
    mixer = make_mixer(variant)
    x = torch.randn(20, SHAPE.dim, dtype=torch.float64)
    whole, _ = run(mixer, x, [20], variant)
    state = mixer.initial_state(1, 20, "cpu", torch.float64)
    with torch.no_grad():
        steps = [mixer(x[i : i + 1], StepInfo(torch.tensor([i])), state)[0] for i in range(20)]
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-9, atol=1e-9)


class Piece(LocalContext):
    """Keeps what its stream's next piece needs, and hands out what an earlier Piece kept. ahead:
    what the next one's first token adds."""

    def __init__(self, before=None, ahead=None):
        self.before, self.ahead = before, ahead
        self.tails, self.states, self.calls, self.taken = [], [], 0, 0

    def left_context(self, x, rows):
        self.tails.append(x[-rows:])
        self.calls += 1
        return self.before and self.before.tails[self.calls - 1]

    def lookahead(self, x):
        return super().lookahead(x) if self.ahead is None else self.ahead

    def finish(self, pending):
        taken, self.taken = self.taken, self.taken + len(pending)
        if self.before is None:
            return super().finish(pending)
        return self.before.states[taken : self.taken]

    def scan(self, scan, q, entering, seq, final):
        if entering is not None:  # of the first document
            others = [torch.zeros_like(entering)] * (len(seq.cu_seqlens) - 2)
            entering = torch.cat([entering, *others])
        o, S = super().scan(scan, q, entering, seq, final)
        self.states.append(S[:1])
        return o, S


@pytest.mark.parametrize("variant", [v for v in LINEAR if class_of(v).splits_sequence])
@pytest.mark.parametrize("cut", [3, 16, 29])
def test_a_stream_in_two_pieces(variant, cut):
    """The second piece takes the first one's state and halo: outputs and all gradients are the
    whole stream's. One document, then one more that must not see what comes in."""
    mixer = (make_slow_mixer if cut == 16 else make_mixer)(variant)
    torch.manual_seed(0)
    x, dy = torch.randn(2, 43, SHAPE.dim, dtype=torch.float64)
    y, dx = run(mixer, x, [37, 6], variant, dy)
    expected = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()

    x, pieces, context = x.requires_grad_(), [], None
    for part, lengths in ((x[:cut], [cut]), (x[cut:], [37 - cut, 6])):
        seq = make_seq(lengths, variant)
        if context is not None:
            seq.positions[: lengths[0]] += cut
        ahead = mixer.lookahead(x[cut : cut + 1], torch.tensor([cut])) if context is None else None
        seq.context = context = Piece(context, ahead)
        state = mixer.initial_state(len(lengths), 43, "cpu", torch.float64)
        pieces.append(mixer(part, seq, state)[0])
    torch.testing.assert_close(torch.cat(pieces), y, rtol=1e-10, atol=1e-10)
    torch.cat(pieces).backward(dy)
    torch.testing.assert_close(x.grad, dx, rtol=1e-9, atol=1e-9)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@every_mixer
def test_flops_of_projections_are_counted(variant):
    """The declared FLOPs are at least those of the GEMMs with weights, and not more than these plus
    a scan of a few states."""
    mixer = make_mixer(variant)
    weights = sum(2 * p.numel() for p in mixer.parameters() if p.ndim == 2)
    assert weights < mixer.flops_per_token(64) < 4 * weights
