"""Generate text from a checkpoint: prefill by chunks, then one token at a time with a state of
constant size.

python -m lmoe.generate outputs/ckpt/step-1000 --prompt "def main" --prompt "import" --max-tokens
200 --temperature 0.8 --top-p 0.9
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from lmoe.checkpoint import Checkpointer, with_newest
from lmoe.checkpoint_files import MANIFEST, read_manifest
from lmoe.command import end_with_reader, given_path, reason
from lmoe.config import load_saved_config
from lmoe.data.tokenizer import DESCRIPTION, Tokenizer, load_tokenizer
from lmoe.files import in_one_line, read_regular
from lmoe.model.batch import StepInfo, prompt_info
from lmoe.model.build import attention_windows, build_model, needs_dense_mask, on_meta
from lmoe.model.init import materialise, reset_buffers
from lmoe.model.model import Model


def sample(logits, *, temperature, top_k=0, top_p=1.0, generator=None):
    """One token per sequence from logits [N, V]: the best one at temperature 0, else a draw from
    the top_k best tokens (0: all), cut to the fewest whose probabilities reach top_p (arXiv
    1904.09751). ValueError where no probability is left."""
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers (NaN): nothing can be drawn from them")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        best, order = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, best)
    if top_p < 1:
        best, order = logits.sort(dim=-1, descending=True)
        before = best.softmax(-1).cumsum(-1) - best.softmax(-1)
        logits = logits.scatter(-1, order, best.masked_fill(before >= top_p, float("-inf")))
    probabilities = logits.softmax(-1)
    if not probabilities.isfinite().all():
        raise ValueError(
            f"--temperature {temperature} leaves no finite probability: try 1, or 0 for the most"
            " probable token"
        )
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


class Decoder:
    """A model with the decode states of N sequences."""

    def __init__(self, model, device, dtype, *, dense_mask: bool, windows=()):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.dense_mask = dense_mask
        self.windows = windows

    @torch.no_grad()
    def prefill(self, prompts, max_len):
        """prompts: N non-empty lists of ids, of any lengths; max_len: most tokens a sequence may
        reach. Logits [N, V] of what follows."""
        lengths = [len(prompt) for prompt in prompts]
        self.positions = torch.tensor(lengths, device=self.device)
        self.states = self.model.initial_states(len(prompts), max_len, self.device, self.dtype)
        seq = prompt_info(lengths, self.device, dense_mask=self.dense_mask, windows=self.windows)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        return self.model(tokens, seq, states=self.states, select=self.positions.cumsum(0) - 1)

    @torch.no_grad()
    def step(self, tokens):
        """tokens [N]: the next one of every sequence. Logits [N, V] of what follows it."""
        logits = self.model(tokens, StepInfo(self.positions), states=self.states)
        self.positions += 1
        return logits


def generate(decoder, prompts, max_tokens, *, eos, vocab_size, seed=0, **sampling):
    """Continue N prompts (lists of ids, each from tokenizer.start on, as in training) by up to
    max_tokens tokens each: lists of new ids, without the eos that ended them."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    logits = decoder.prefill(prompts, max(map(len, prompts)) + max_tokens)
    new = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for count in range(max_tokens):
        logits[:, vocab_size:] = float("-inf")  # rows that only fill up the vocabulary
        tokens = sample(logits, generator=generator, **sampling)
        for i, token in enumerate(tokens.tolist()):
            if token == eos:
                going.discard(i)
            if i in going:
                new[i].append(token)
        if not going or count == max_tokens - 1:
            break
        logits = decoder.step(tokens)
    return new


def load_decoder(path, device, dtype):
    """(Decoder, tokenizer) from a step-N folder, or the newest whole checkpoint in a folder of them
    or of a job. ValueError where it is damaged or holds no model."""

    def load(checkpointer, found):
        return _load(checkpointer, found, device, dtype)

    return with_newest(Path(path), load)


def _load(checkpointer: Checkpointer, path: Path, device, dtype) -> tuple[Decoder, Tokenizer]:
    files = read_manifest(path)[0]
    config = _read(path, "config.toml", files, lambda: load_saved_config(path))
    tokenizer = _read(path, DESCRIPTION, files, lambda: _tokenizer(path, files))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"checkpoint {path}: {DESCRIPTION}: {tokenizer.vocab_size} tokens, but the model has"
            f" model.vocab_size = {config.model.vocab_size}"
        )
    model = _read(path, "config.toml", files, lambda: _build(config))
    materialise(model, device)
    reset_buffers(model)  # those that a checkpoint does not hold
    checkpointer.load_model(model, path)
    for p in model.parameters():
        if not getattr(p, "keep_fp32", False):
            p.data = p.data.to(dtype)
    dense_mask = needs_dense_mask(config, device, dtype)
    windows = attention_windows(config)
    decoder = Decoder(model.eval(), device, dtype, dense_mask=dense_mask, windows=windows)
    return decoder, tokenizer


def _read(path: Path, name: str, files: dict, read):
    """read() a file that the manifest lists; what is wrong with it names it."""
    if name not in files:
        raise ValueError(f"checkpoint {path}: {name}: not listed in {MANIFEST}")
    try:
        return read()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: {name}: {in_one_line(error)}") from None


def _build(config) -> Model:
    with on_meta(config):
        return build_model(config)


def _tokenizer(path: Path, files: dict) -> Tokenizer:
    ranks = json.loads(read_regular(path / DESCRIPTION).decode())["ranks"]
    if not isinstance(ranks, str) or ranks not in files:
        raise ValueError(f"its ranks lie in {ascii(ranks)[:80]}, which {MANIFEST} does not list")
    return load_tokenizer(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m lmoe.generate", description="Continue prompts from a checkpoint."
    )
    parser.add_argument(
        "checkpoint",
        help="a step-N folder, or a folder of checkpoints or of a job: its newest whole one",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; give it several times for a batch (default: nothing)",
    )
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most probable token"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="draw from the k most probable tokens only; 0: from all",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the fewest tokens whose probabilities reach p",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error(f"--max-tokens {args.max_tokens}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature {args.temperature}: must be 0 or more")
    if args.top_k < 0:
        parser.error(f"--top-k {args.top_k}: must be 0 or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: must be above 0 and at most 1")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {in_one_line(error)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = given_path("checkpoint", args.checkpoint)
    decoder, tokenizer = load_decoder(path, device, dtype)
    texts = args.prompt or [""]
    prompts = [[tokenizer.start, *tokenizer.encode(text)] for text in texts]
    answers = generate(
        decoder,
        prompts,
        args.max_tokens,
        eos=tokenizer.eos,
        vocab_size=tokenizer.vocab_size,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    for text, answer in zip(texts, answers, strict=True):
        print(text + tokenizer.decode(answer))
        if len(texts) > 1:
            print("-" * 40)


if __name__ == "__main__":
    end_with_reader()
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        sys.exit(f"error: {reason(error)}")  # of the machine, too: no memory, a device lost
    except KeyboardInterrupt:
        sys.exit(130)
