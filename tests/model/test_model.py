"""The whole model: shapes and counts, initial weights, decoding, compilation, validation without
side effects."""

import collections
import copy

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lmoe.config import load_config
from lmoe.generate import Decoder, generate, sample
from lmoe.model.build import build_model, layer_mixers
from lmoe.model.config import FLAVORS
from lmoe.model.init import init_weights, materialise
from lmoe.model.mixers import MIXERS
from lmoe.model.model import count_parameters
from lmoe.model.moe.experts import IMPLEMENTATIONS
from lmoe.parallel.recompute import apply_recompute
from tests.model.variants import MIXER_VARIANTS, SHAPE, make_model, make_seq, window_of

every_mixer = pytest.mark.parametrize("variant", MIXER_VARIANTS)


def build(words):
    config = load_config(words)
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize(
    "flavor, total, body, active_body",
    [
        ("a0.3b_2b", 2_476_274_688, 2_165_109_760, 315_421_696),
        ("a1b_7b", 7_335_479_296, 6_713_149_440, 1_076_004_864),
    ],
)
def test_counts_of_the_softmax_baselines(flavor, total, body, active_body):
    """arXiv 2503.05447, table 2: all layers softmax attention, vocabulary 151,936."""
    model = build([f"--model.flavor={flavor}", "--model.pattern=N", "--model.vocab_size=151936"])
    assert count_parameters(model) == {
        "total": total,
        "body": body,
        "active_body": active_body,
        "active": active_body + total - body,
    }


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("preset", ["uniform", "faithful"])
def test_every_flavour_builds_with_every_mixer(flavor, mixer, preset):
    model = build(
        [
            f"--model.flavor={flavor}",
            f"--model.mixer={mixer}",
            f"--model.preset={preset}",
            "--model.vocab_size=320",
        ]
    )
    assert model.flops_per_token(2048) > 2 * count_parameters(model)["active_body"]


def test_uniform_gla_and_gated_deltanet_have_their_specified_size():
    """5 d^2 and the gates' parameters at d = 1024, H = 8."""
    d2 = 1024 * 1024
    for mixer, gates in (("gla", 33_792), ("gated_deltanet", 16_384 + 3 * 4096 + 16)):
        model = build(
            [
                "--model.flavor=a0.3b_2b",
                f"--model.mixer={mixer}",
                "--model.pattern=L",
                "--model.vocab_size=64",
            ]
        )
        size = sum(p.numel() for p in model.blocks[0].mixer.parameters())
        assert size == 5 * d2 + gates + 128


def test_patterns():
    config = load_config(["--model.pattern=LN", "--model.layers=6"])
    assert layer_mixers(config.model) == ["gla", "attention"] * 3
    config = load_config(['--model.pattern=["gated_deltanet", "N", "L"]', "--model.layers=3"])
    assert layer_mixers(config.model) == ["gated_deltanet", "attention", "gla"]
    for pattern, message in (
        ("LX", "only L"),
        ("LLLLL", "does not divide"),
        ('["gla", "glb"]', "mixer = 'glb' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_mixers(load_config([f"--model.pattern={pattern}"]).model)


@every_mixer
def test_initialisation_writes_everything(variant):
    """Memory full of NaN beforehand: every parameter and buffer is written; the same seed gives the
    same bits, another one does not."""
    model = make_model(variant, torch.float32, noise=0.0)
    again = copy.deepcopy(model)
    for tensor in again.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    for module in again.modules():
        for buffer in module.buffers(recurse=False):
            buffer.fill_(torch.nan if buffer.is_floating_point() else -7)
    init_weights(again, 0)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for (name, buffer), (_, other) in zip(
        again.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name
    init_weights(again, 1)
    assert not torch.equal(again.embed.weight, model.embed.weight)


def test_initial_weights_have_their_spread_and_their_own_draw():
    """init_std for what reads the residual stream, / sqrt(2 layers) for what writes to it; no two
    parameters share a draw."""
    model = make_model("gated_deltanet-uniform", noise=0.0, layers=8)
    drawn = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and "conv" not in name}
    for name, p in drawn.items():
        std = 0.3 / 4 if name.endswith(("wo.weight", "w2")) else 0.3
        assert p.std().item() == pytest.approx(std, rel=0.15), name
    firsts = [p.flatten()[:8] / p.std() for p in drawn.values()]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(firsts) for b in firsts[:i])


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_logits(tied):
    """Cross-entropy and z-loss of the logits that the model gives, with all gradients, the
    embedding's two among them where it is tied."""
    model = make_model("gla-uniform", tie_embeddings=tied, z_loss=0.01)
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 48))
    labels[::5] = -100
    seq = make_seq([48])
    output, gradients = loss_and_gradients(model, tokens, labels, seq)
    x = model.embed(tokens)
    for block in model.blocks:
        x, *_ = block(x, seq)
    x = x / (x.square().mean(-1, keepdim=True) + SHAPE.norm_eps).sqrt() * model.norm.weight
    logits = x @ (model.embed.weight if tied else model.head.weight).T
    torch.testing.assert_close(logits, model(tokens, seq))
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 10
    z_loss = 0.01 * logits.logsumexp(-1)[labels != -100].square().sum() / 10
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.z_loss, z_loss)
    (loss + z_loss).backward()
    assert ("head.weight" in gradients) != tied
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_the_mark_of_fp32_parameters_survives_materialisation():
    model = build(["--model.mixer=gated_deltanet", "--model.vocab_size=64"])
    marked = [name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)]
    assert (
        any("A_log" in name for name in marked)
        and any("router" in name for name in marked)
        and any("norm" in name for name in marked)
    )
    materialise(model, "cpu")
    assert [
        name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)
    ] == marked


def test_declared_flops_are_the_products_that_run():
    """Everything but the scores of softmax attention, which torch's counter does not see on a
    CPU."""
    model = make_model("attention-uniform", torch.float32)
    length = 64
    tokens, seq = torch.randint(0, 64, (length,)), make_seq([length])
    with FlopCounterMode(display=False) as counter:
        model(tokens, seq)
    scores = (
        2 * 4 * model.head.weight.shape[1] * (length + 1) / 2
    )  # two layers; half of the positions are visible on average
    assert counter.get_total_flops() / length == pytest.approx(
        model.flops_per_token(length) - scores, rel=0.001
    )


@every_mixer
def test_generation_is_the_forward_pass(variant):
    """Greedy decoding in a batch of prompts of different lengths = the argmax of the full forward
    pass, token by token."""
    model = make_model(variant)
    decoder = Decoder(
        model, torch.device("cpu"), torch.float64, dense_mask=True, windows={window_of(variant)}
    )
    torch.manual_seed(0)
    prompts = [torch.randint(0, 64, (n,)).tolist() for n in (1, 18, 7)]
    answers = generate(decoder, prompts, 24, eos=-1, vocab_size=60, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 24
        sequence = torch.tensor(prompt + answer)
        with torch.no_grad():
            logits = model(sequence, make_seq([len(sequence)], variant))[:, :60]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


def test_generation_stops_at_eos_and_never_samples_padding():
    model = make_model("gla-uniform", torch.float32)
    decoder = Decoder(model, torch.device("cpu"), torch.float32, dense_mask=True)
    answers = generate(decoder, [[1], [2]], 50, eos=5, vocab_size=6, temperature=1.0)
    assert all(token < 5 for answer in answers for token in answer) and any(
        len(answer) < 50 for answer in answers
    )


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        return torch.bincount(sample(logits, generator=generator, **options), minlength=4) / 4000

    p = logits[0].softmax(-1)
    assert frequencies(temperature=0).tolist() == [0, 0, 0, 1]
    assert torch.allclose(frequencies(temperature=1.0), p, atol=0.03)
    assert torch.allclose(frequencies(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.03)
    two = p[2:] / p[2:].sum()
    assert torch.allclose(
        frequencies(temperature=1.0, top_k=2), torch.cat([torch.zeros(2), two]), atol=0.03
    )
    assert torch.allclose(
        frequencies(temperature=1.0, top_p=0.8), torch.cat([torch.zeros(2), two]), atol=0.03
    )
    assert frequencies(temperature=1.0, top_p=0.5).tolist() == [0, 0, 0, 1]


def loss_and_gradients(model, tokens, labels, seq):
    output = model(tokens, seq, labels, 10.0)
    (output.loss + output.z_loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return output, gradients


COMPILED = [
    pytest.param(
        variant,
        mode,
        marks=() if variant.endswith("uniform") and mode == "full" else pytest.mark.slow,
    )
    for variant in MIXER_VARIANTS
    for mode in (None, "full", "selective")
]


@pytest.mark.parametrize("variant, mode", COMPILED)
def test_blocks_compile_without_a_graph_break(variant, mode):
    """fullgraph, with recomputation inside, equals eager; other documents and lengths of documents
    do not recompile."""
    torch._dynamo.reset()
    model = make_model(
        variant, torch.float32, layers=1 if variant.endswith("uniform") else 2
    )  # HGRN2's bounds begin in the second layer
    for block in model.blocks:
        block.ffn.experts.run = IMPLEMENTATIONS["grouped"]
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 64))
    packings = ([30, 34], [1, 20, 3, 40], [64])
    expected = [
        loss_and_gradients(model, tokens, labels, make_seq(lengths, variant))
        for lengths in packings
    ]
    for block in model.blocks:
        if mode:
            apply_recompute(block, "forward", mode)
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        first = loss_and_gradients(model, tokens, labels, make_seq(packings[0], variant))
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = [first] + [
            loss_and_gradients(model, tokens, labels, make_seq(lengths, variant))
            for lengths in packings[1:]
        ]
    for (output, gradients), (expected_output, expected_gradients) in zip(
        results, expected, strict=True
    ):
        torch.testing.assert_close(output.loss, expected_output.loss)
        for name in gradients:
            torch.testing.assert_close(
                gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name
            )


def test_a_block_under_inductor():
    torch._dynamo.reset()
    model = make_model("gla-uniform", torch.float32, layers=1)
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 64))
    seq = make_seq([30, 34])
    model.blocks[0].ffn.experts.run = IMPLEMENTATIONS["grouped"]
    expected, expected_gradients = loss_and_gradients(model, tokens, labels, seq)
    model.blocks[0].forward = torch.compile(model.blocks[0].forward, fullgraph=True)
    output, gradients = loss_and_gradients(model, tokens, labels, seq)
    torch.testing.assert_close(output.loss, expected.loss)
    for name in gradients:
        torch.testing.assert_close(
            gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_router_counts_do_not_know_of_recomputation(mode):
    model = make_model("gla-uniform")
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 64, (2, 64))
    expected, expected_gradients = loss_and_gradients(model, tokens, labels, make_seq([64]))
    for block in model.blocks:
        apply_recompute(block, "forward", mode)
    output, gradients = loss_and_gradients(model, tokens, labels, make_seq([64]))
    for ours, theirs in zip(output.stats.values(), expected.stats.values(), strict=True):
        assert torch.equal(ours.counts, theirs.counts) and ours.counts.sum() == 128
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


class Calls(TorchDispatchMode):
    """How often each op of ours runs."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, times", [(None, 1), ("full", 2), ("selective", 1)])
def test_what_recomputation_does_twice(mode, times):
    """The choice of experts never, in any mode; scans and expert products in mode full only."""
    model = make_model("gla-uniform", torch.float32)
    for block in model.blocks:
        block.ffn.experts.run = IMPLEMENTATIONS["grouped"]
        if mode:
            apply_recompute(block, "forward", mode)
    tokens, seq = torch.randint(0, 64, (48,)), make_seq([48])
    with Calls() as calls:
        loss = model(tokens, seq, tokens, 48.0).loss
        loss.backward()
    layers = len(model.blocks)
    expected = {"route_topk": 1, "experts_bwd": 1}
    expected |= dict.fromkeys(("gla_fwd", "sort_by_expert", "experts"), times)
    for name, count in expected.items():
        assert calls.count[getattr(torch.ops.lmoe, name).default] == count * layers, name


@every_mixer
def test_forward_mutates_nothing(variant):
    model = make_model(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    tokens = torch.randint(0, 64, (48,))
    first = model(tokens, make_seq([48], variant), tokens, 48.0)
    second = model(tokens, make_seq([48], variant), tokens, 48.0)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())
