"""Sampling at its edges, decoding from a checkpoint, and what the command refuses."""

import json
import shutil

import pytest
import torch

from lmoe import checkpoint_files
from lmoe import generate as module
from lmoe.checkpoint import Checkpointer
from lmoe.config import load_config, to_toml
from lmoe.config.sections import OptimizerConfig
from lmoe.data.documents import text_files
from lmoe.data.packing import pack
from lmoe.data.prepare import prepare
from lmoe.data.sources import TokenSource
from lmoe.data.tokenizer import load_tokenizer
from lmoe.generate import generate, load_decoder, sample
from lmoe.model.batch import SeqBuilder
from lmoe.model.build import build_model
from lmoe.model.init import init_weights, materialise
from lmoe.optimizer import build_optimizer
from tests.harness.weights import init_noisy

CPU = torch.device("cpu")


def support(logits, **options):
    """Per row, the tokens that a thousand draws give."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.as_tensor(logits)
    draws = torch.stack(
        [sample(logits.clone(), generator=generator, **options) for _ in range(1000)], 1
    )
    return [set(row.tolist()) for row in draws]


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    p = torch.tensor(
        [[0.125, 0.5, 0.125, 0.25], [0.5, 0.25, 0.125, 0.125]]
    )  # sums of these are exact
    assert support(p.log(), temperature=1.0, top_p=0.5) == [{1}, {0}]
    assert support(p.log(), temperature=1.0, top_p=0.51) == [{1, 3}, {0, 1}]
    assert support(p.log(), temperature=1.0, top_p=0.75) == [{1, 3}, {0, 1}]
    assert all(len(kept) == 3 for kept in support(p.log(), temperature=1.0, top_p=0.8))
    assert all(len(kept) == 4 for kept in support(p.log(), temperature=1.0, top_p=0.9))
    assert support(p.log(), temperature=1.0, top_p=1e-6) == [{1}, {0}]


def test_top_k_keeps_k_tokens_even_of_equals():
    """Logits in bf16 are often equal."""
    assert [len(kept) for kept in support(torch.zeros(2, 6), temperature=1.0, top_k=2)] == [2, 2]
    assert support([[0.0, 3.0, 1.0, 2.0]], temperature=1.0, top_k=3) == [{1, 2, 3}]
    assert len(support(torch.zeros(1, 4), temperature=1.0, top_k=9)[0]) == 4


def test_temperature_sharpens():
    hot, cold = (support([[0.0, 2.0]], temperature=t)[0] for t in (1.0, 0.01))
    assert hot == {0, 1} and cold == {1}
    assert sample(torch.tensor([[0.0, 2.0]]), temperature=0, top_k=1).tolist() == [1]


class Script:
    """A decoder whose best tokens are given: one list per step."""

    device = CPU

    def __init__(self, steps):
        self.steps, self.fed = steps, []

    def logits(self):
        return torch.nn.functional.one_hot(torch.tensor(self.steps[len(self.fed)]), 8).float()

    def prefill(self, prompts, max_len):
        self.max_len = max_len
        return self.logits()

    def step(self, tokens):
        self.fed.append(tokens.tolist())
        return self.logits()


def test_each_sequence_ends_at_its_own_eos():
    decoder = Script([[1, 2], [5, 3], [1, 4], [1, 5], [1, 1]])
    assert generate(decoder, [[1], [1, 2, 3]], 10, eos=5, vocab_size=8, temperature=0) == [
        [1],
        [2, 3, 4],
    ]
    assert (
        decoder.fed == [[1, 2], [5, 3], [1, 4]] and decoder.max_len == 13
    )  # no step after the last one has ended
    assert generate(Script([[1], [2], [3]]), [[1]], 2, eos=5, vocab_size=8, temperature=0) == [
        [1, 2]
    ]


def test_ids_that_only_fill_up_the_vocabulary_are_never_given():
    for sampling in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}):
        answers = generate(Script([[7]] * 40), [[1]], 40, eos=-1, vocab_size=7, **sampling)
        assert len(answers[0]) == 40 and max(answers[0]) < 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    words = [
        "--model.dim=32",
        "--model.heads=2",
        '--model.pattern=["gla", "gated_deltanet", "attention"]',
        "--model.layers=3",
    ]
    config = load_config(
        [
            *words,
            "--moe.experts=4",
            "--moe.hidden=16",
            "--attention.window=6",
            "--model.init_std=0.2",
        ]
    )
    tokenizer = load_tokenizer("byte")
    config.model.vocab_size = 320
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, "cpu")
    init_noisy(model)
    return save(folder / "ckpt", model, config, tokenizer)


def save(folder, model, config, tokenizer):
    Checkpointer(folder, process_group=None).save(
        1,
        model,
        [],
        {"tokenizer": tokenizer.digest},
        {"config.toml": to_toml(config)},
        tokenizer.save,
        sync=True,
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_decodes_in_the_dtype_asked_for(checkpoint, dtype):
    decoder, tokenizer = load_decoder(checkpoint, CPU, dtype)
    dtypes = {name: p.dtype for name, p in decoder.model.named_parameters()}
    kept = {name for name, p in decoder.model.named_parameters() if getattr(p, "keep_fp32", False)}
    assert (
        any("A_log" in name for name in kept)
        and any("router" in name for name in kept)
        and any("norm" in name for name in kept)
    )
    assert all(kind == (torch.float32 if name in kept else dtype) for name, kind in dtypes.items())
    prompts = [
        tokenizer.encode(text) for text in ("a", "some words that are longer than the window")
    ]
    answers = generate(decoder, prompts, 12, eos=-1, vocab_size=tokenizer.vocab_size, temperature=0)
    assert [len(answer) for answer in answers] == [12, 12]
    if dtype == torch.float32:  # a batch gives what each prompt alone does
        for prompt, answer in zip(prompts, answers, strict=True):
            assert generate(
                decoder, [prompt], 12, eos=-1, vocab_size=tokenizer.vocab_size, temperature=0
            ) == [answer]


def test_every_prompt_begins_as_documents_do(checkpoint, monkeypatch):
    fed = []

    def listen(decoder, prompts, *args, **options):
        fed.append(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(module, "generate", listen)
    start = load_tokenizer("byte").start
    for words in ([], ["--prompt="], ["--prompt=ab", "--prompt="]):
        module.main([str(checkpoint), "--device=cpu", *words])
    assert fed == [[[start]], [[start]], [[start, 97, 98], [start]]]


def test_what_begins_a_document_is_learnt(tmp_path, monkeypatch, capsys):
    """A d, or an eos where it is empty, and chance after it: what is generated from no prompt."""
    generator = torch.Generator().manual_seed(0)
    for k in range(40):
        letters = torch.randint(97, 123, (20,), generator=generator).tolist()
        (tmp_path / f"{k:02d}.txt").write_bytes(bytes([ord("d"), *letters]) if k % 10 else b"")
    words = ["--model.dim=32", "--model.heads=2", "--model.layers=1", "--moe.experts=0"]
    config = load_config([*words, "--model.pattern=L", "--model.mixer=gla"])
    tokenizer = load_tokenizer("byte")
    config.model.vocab_size = tokenizer.vocab_size
    model = build_model(config)
    init_weights(model, 0)
    shards = prepare(tmp_path / "shards", text_files([str(tmp_path)]), tokenizer)
    source = TokenSource("x", [shards], "train", 0.1, 32, tokenizer.start)
    batch = pack([source.row(0, i) for i in range(source.samples)])
    tokens, labels, seq = SeqBuilder("cpu", dense_mask=True)(batch)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2), model)
    for _ in range(60):
        model(tokens, seq, labels, float(batch.num_valid)).loss.backward()
        assert model.embed.weight.grad[tokenizer.start].abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    seen = []

    def listen(logits, **options):
        seen.append(logits.softmax(-1)[0])
        return sample(logits, **options)

    monkeypatch.setattr(module, "sample", listen)
    path = save(tmp_path / "ckpt", model, config, tokenizer)
    module.main([str(path), "--max-tokens=1", "--device=cpu", "--temperature=0"])
    first = labels[tokens == tokenizer.start]
    for label in (ord("d"), tokenizer.eos):
        share = (first == label).double().mean().item()
        assert seen[0][label].item() == pytest.approx(share, abs=0.05) and share > 0.05
    assert capsys.readouterr().out == "d\n"


def test_the_state_does_not_grow(checkpoint):
    decoder, tokenizer = load_decoder(checkpoint, CPU, torch.float32)
    logits = decoder.prefill([[1, 2, 3], [4]], 40)
    sizes = [{key: tensor.shape for key, tensor in state.items()} for state in decoder.states]
    for _ in range(20):
        logits = decoder.step(logits.argmax(-1))
    assert sizes == [
        {key: tensor.shape for key, tensor in state.items()} for state in decoder.states
    ]
    assert decoder.states[2]["k"].shape[1] == 6  # the window


def test_the_seed_decides(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        module.main(
            [
                str(checkpoint),
                "--prompt=ab",
                "--max-tokens=20",
                "--device=cpu",
                f"--seed={seed}",
                "--temperature=1",
            ]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("ab")


@pytest.mark.parametrize(
    "word",
    [
        "--max-tokens=0",
        "--temperature=-1",
        "--temperature=nan",
        "--top-k=-1",
        "--top-p=0",
        "--top-p=1.5",
        "--device=nowhere",
    ],
)
def test_refusals_are_one_line(checkpoint, capsys, word):
    with pytest.raises(SystemExit) as caught:
        module.main([str(checkpoint), word])
    assert caught.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"python -m lmoe.generate: error: {word.split('=')[0]} ")
    )


def test_the_folder_of_a_job_will_do(checkpoint, capsys):
    for path in (checkpoint, checkpoint.parent, checkpoint / "step-1"):
        module.main([str(path), "--max-tokens=2", "--device=cpu", "--temperature=0"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) % 3 == 0 and lines == 3 * lines[: len(lines) // 3]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.5}])
def test_logits_that_are_not_numbers_are_refused(options):
    logits = torch.zeros(2, 5)
    logits[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        sample(logits, **options)


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e300])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_a_temperature_that_leaves_no_probability_is_named(temperature, options):
    logits = torch.tensor([[1.0, 2.0, 3.0, float("-inf")]])
    with pytest.raises(ValueError, match="^--temperature 1e.* leaves no finite probability"):
        sample(logits, temperature=temperature, **options)


@pytest.mark.parametrize("name", ["config.toml", "lmoe_tokenizer.json", "ranks.tiktoken"])
def test_only_what_the_manifest_lists_is_read(checkpoint, tmp_path, name):
    shutil.copytree(checkpoint / "step-1", tmp_path / "step-1")
    files = checkpoint_files.read_manifest(tmp_path / "step-1")[0]
    del files[name]
    text = json.dumps({"files": files, "sha256": checkpoint_files._digest(files)})
    (tmp_path / "step-1" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*not list") as caught:
        load_decoder(tmp_path, CPU, torch.float32)
    assert "\n" not in str(caught.value)


def replaced(checkpoint, path, name, change):
    """A copy of a checkpoint in which change(bytes) of a file lies, listed as if it belonged."""
    shutil.copytree(checkpoint / "step-1", path)
    (path / name).write_bytes(change((path / name).read_bytes()))
    files = checkpoint_files.read_manifest(path)[0] | checkpoint_files.seal(path, [name])
    text = json.dumps({"files": files, "sha256": checkpoint_files._digest(files)})
    (path / "manifest.json").write_text(text)


ODD_CONFIGS = [b"\xff", b"a = [" + b"[" * 100_000, b"[nowhere]\n", b"a b"]
ODD_CONFIGS += [b"x = [{" + b"a." * 3000 + b"a = 1}]", b"[model]\ndense_layers = 'x'"]
ODD_CONFIGS += [b"[model]\nvocab_size = 320\n[mixer]\nexpand_k = 9223372036854775807"]


def test_a_vocabulary_beyond_the_models_is_refused(checkpoint, tmp_path):
    path = tmp_path / "step-1"
    far = lambda data: data.replace(b" 97\n", b" 5000\n")  # noqa: E731
    replaced(checkpoint, path, "ranks.tiktoken", far)
    with pytest.raises(ValueError, match="tokenizer.json: 5001 tokens, but .*vocab_size = 320"):
        load_decoder(path, CPU, torch.float32)


@pytest.mark.parametrize("text", ODD_CONFIGS, ids=lambda text: repr(text)[:30])
def test_a_config_that_is_none_is_named(checkpoint, tmp_path, text):
    path = tmp_path / "step-1"
    replaced(checkpoint, path, "config.toml", lambda data: text)
    with pytest.raises(ValueError, match=r"step-1: config.toml: ") as caught:
        load_decoder(path, CPU, torch.float32)
    assert "\n" not in str(caught.value)
