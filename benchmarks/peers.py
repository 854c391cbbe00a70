"""Transformers' Qwen2-MoE beside ours, in one process on one GPU: tokens/s and memory of whole
steps.

    python benchmarks/peers.py --steps 20 --out outputs/peers

All have the shape of --config (12 layers of width 1024, 64 experts of which 8 are active) and
--rows rows of 2048 tokens a step. Ours are trained by train.py's own loop (benchmarks/steps.py):
fp32 master weights and moments, clipped gradients, text of this Python's library in Qwen2's
vocabulary. The peer runs as it ships, compiled as a whole, on random tokens: parameters, gradients
and AdamW's moments in bfloat16, loss by its own loss_function over all logits, no auxiliary loss,
no clipping. It has a shared expert by construction, here of --shared channels; 0 leaves of it what
costs nothing. Attention and experts by --attention and --experts; what this version of transformers
does not know is one line. Words after -- go to ours. Prints a table and writes peers.json to --out.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.steps import WARMUP, Runner, forget
from benchmarks.timing import ROOT, mark, milliseconds, synchronise
from benchmarks.train import COMMON, row, split_words
from lmoe.config import load_config
from lmoe.files import in_one_line
from lmoe.metrics import memory_gib, setup_logging
from lmoe.model.init import narrow
from lmoe.parallel.dims import init_distributed

OURS = {
    "ours, softmax": "--model.pattern=N",
    "ours, gla hybrid": "--model.mixer=gla --model.pattern=LLLN",
}


def qwen2_moe(config, shared, attention, experts):
    """Transformers' model of our shape; ValueError or ImportError, of any number of lines, where
    it cannot be built."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    model, moe = config.model, config.moe
    peer = Qwen2MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        intermediate_size=moe.hidden,  # of dense layers, which there are none
        moe_intermediate_size=moe.hidden,
        shared_expert_intermediate_size=shared,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.renormalize,
        max_position_embeddings=config.data.seq_len,
        use_cache=False,
        output_router_logits=False,
        attn_implementation=attention,
    )
    peer._experts_implementation = experts
    return Qwen2MoeForCausalLM(peer)


def train_peer(model, config, steps, device, backend):
    """Take steps of forward, backward and AdamW in the model's dtype. Returns a result as
    benchmarks/steps.py gives one."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        config.optimizer.lr,
        tuple(config.optimizer.betas),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    compiled = torch.compile(model, backend=backend)
    generator = torch.Generator(device).manual_seed(0)
    shape = config.training.batch_size, config.data.seq_len
    model.train()
    losses, walls, marks = [], [], []
    memory_gib(device)  # from here on
    for _ in range(steps):
        tokens = torch.randint(config.model.vocab_size, shape, device=device, generator=generator)
        synchronise()
        start = time.perf_counter()
        times = [mark(device)]
        loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        times.append(mark(device))
        optimizer.step()
        optimizer.zero_grad()
        times.append(mark(device))
        losses.append(loss.item())
        synchronise()
        walls.append(time.perf_counter() - start)
        marks.append(times)
    timed = slice(WARMUP if steps > WARMUP else 0, None)
    seconds = statistics.median(walls[timed])
    return {
        "loss": losses,
        "tokens_per_second": shape[0] * shape[1] / seconds,
        "step_ms": 1e3 * seconds,
        "mfu": None,
        "memory_gib": memory_gib(device),
        "forward_backward_ms": statistics.median(milliseconds(*t[:2]) for t in marks[timed]),
        "optimizer_ms": statistics.median(milliseconds(*t[1:]) for t in marks[timed]),
    }


def run_peer(args, words, device):
    """Build and train the peer."""
    import transformers

    config = load_config([f"--config={args.config}", *words])
    torch.manual_seed(0)
    with torch.device(device):
        model = qwen2_moe(config, args.shared, args.attention, args.experts)
    narrow(model, torch.bfloat16)
    result = train_peer(model, config, args.steps, device, args.backend)
    result["transformers"] = transformers.__version__
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return result


def main():
    words, extra = split_words(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "train_configs/a0.3b_2b.toml"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", type=int, default=0, help="steps of ours to trace")
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for the peer")
    parser.add_argument("--out", default="outputs/peers")
    args = parser.parse_args(words)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = init_distributed()
    setup_logging(1)  # warnings only
    warnings.simplefilter("ignore")  # the peer's
    shared = [
        *COMMON,
        f"--training.batch_size={args.rows}",
        f"--training.global_batch_size={args.rows}",
        "--validation.every=0",
        "--data.source=stdlib",
        "--data.paths=[]",
    ]
    runner = Runner(device)
    results = {}
    print(
        f"{'':24} {'first':>8} {'last':>8} {'tok/s':>10} {'mfu':>6} {'GiB':>7} {'passes':>9}"
        f" {'optimizer':>9}   (ms)"
    )
    with tempfile.TemporaryDirectory() as folder:
        peer = [*shared, *extra]
        ours = {
            name: [
                f"--config={args.config}",
                *shared,
                f"--data.cache={folder}/data",
                *extra,
                *shlex.split(words),
            ]
            for name, words in OURS.items()
        }

        def measure(name):
            if name in ours:
                words = [*ours[name], "--compile.enable=true"]
                return runner.run(words, f"{folder}/{name}", args.steps, args.trace)
            return run_peer(args, peer, device)

        for name in ("transformers qwen2-moe", *ours):
            forget()
            try:
                results[name] = measure(name)
                print(row(name, results[name]), flush=True)
            except (Exception, SystemExit) as error:  # what one cannot do is a row too
                results[name] = {"error": in_one_line(error)[:300]}
                print(f"{name}: {results[name]['error']}", flush=True)
            about = {"arguments": vars(args), "words": extra, "torch": torch.__version__}
            (out / "peers.json").write_text(json.dumps(about | {"results": results}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
