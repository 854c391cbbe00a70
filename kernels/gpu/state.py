"""The state pass that the families share: S <- decay . S + sum over a chunk's tokens of x^T y, and
its mirror for gradients.

Forwards x, y are k, v, decayed to the chunk's end, and the state before every chunk is written.
Backwards they are q and do, decayed from the chunk's start, and the gradient of the state after
every chunk is written. A chunk is one step of a sequential chain, so a long sequence of few heads
would leave most of a GPU idle: it is cut into segments. A first pass finds what each of them ends
with if nothing enters it, a small one folds these into what enters each (transition.py in one GPU),
and a second pass writes the states.

Decays: `g` one number per token and value head, or `gamma` one per head, of tokens, evaluated here;
or `totals`, one per channel of K or V and chunk, of x, y that are decayed already.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.choice import DTYPES
from lmoe.kernels.gpu.common import (
    INTERPRETED,
    NOTHING,
    chunk_at,
    contiguous,
    load_fp32,
    load_rows,
    mm,
    of_head,
    of_tokens,
)
from lmoe.kernels.gpu.tiles import cdiv, processors, rounds, shared_memory, tiles

GONE = tl.constexpr(-1e30)  # a log decay that leaves nothing


@triton.jit
def scalar_gates(g, gamma, chunk, HV, G: tl.constexpr):
    """Log decays [C] of the tokens of a value head, zero where the stream has ended: per token (G =
    1), per head (2) or none (0)."""
    here, real = tl.zeros(chunk.place.shape, tl.float32), chunk.place < chunk.left
    if G == 1:
        here = load_fp32(of_tokens(g, chunk, HV), real)
    if G == 2:
        here = tl.where(real, tl.load(gamma + chunk.h).to(tl.float32), 0.0)
    return tl.maximum(here, NOTHING)


@triton.jit
def from_start(a, seen, G: tl.constexpr):
    """[C]: the decay from the chunk's start to each token that sees what was there, else 0."""
    if G == 0:
        return tl.where(seen, 1.0, 0.0)
    return tl.where(seen, tl.exp(tl.cumsum(tl.where(seen, a, 0.0), 0)), 0.0)


@triton.jit
def to_end(a, kept, G: tl.constexpr):
    """[C]: the decay from each token of the last document to the chunk's end, 0 for the others."""
    if G == 0:
        return tl.where(kept, 1.0, 0.0)
    mine = tl.where(kept, a, 0.0)
    return tl.where(kept, tl.exp(tl.cumsum(mine, 0, reverse=True) - mine), 0.0)


@triton.jit
def last_start(starts, chunk):
    """Where the document of the chunk's last token starts."""
    return tl.load(starts + chunk.first + tl.minimum(chunk.left, chunk.place.shape[0]) - 1)


@triton.jit
def documents(starts, chunk, DOCS: tl.constexpr):
    """Find of a chunk's tokens [C]: (start of the document, whether it began before the chunk,
    whether it is the last one's)."""
    real = chunk.place < chunk.left
    start, seen, kept = tl.zeros(chunk.place.shape, tl.int32), real, real
    if DOCS:
        start = tl.load(starts + chunk.first + chunk.place, mask=real, other=-1)
        last = last_start(starts, chunk)
        seen, kept = real & (start < tl.maximum(chunk.first, 1)), real & (start == last)
    return start, seen, kept


@triton.jit
def same_document(start):
    """[C, C]: whether two tokens are of one document."""
    return start[:, None] == start[None, :]


@triton.jit
def spans(seen, kept):
    """Tell whether the chunk's last document began before it."""
    return tl.sum(tl.where(seen & kept, 1, 0)) > 0


@triton.jit
def _walk(
    x,
    y,
    g,
    gamma,
    totals_k,
    totals_v,
    starts,
    border,
    added,
    added_at,
    out,
    far,
    ends,
    logs,
    logs_k,
    logs_v,
    scale,
    T,
    NC,
    L,
    NS,
    first,
    few,
    known,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    DOCS: tl.constexpr,
    ENTERS: tl.constexpr,
    ADDED: tl.constexpr,
    REVERSE: tl.constexpr,
    FOLD: tl.constexpr,
    WRITE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Segments first, .., first + few - 1 of NS; one before or beyond them (the way that is walked)
    has no chunks.

    Without FOLD: what they end with if nothing enters them, ends [B, few, HV, K, V], and their log
    decays. With FOLD: what enters them is border, folded with the `known` ends [B, known, HV, K, V]
    of the segments before; far [B, HV, K, V] is what the last one ends with. WRITE: also out, the
    states before chunks.
    """
    VT: tl.constexpr = (V + BV - 1) // BV
    TILES: tl.constexpr = (K + BK - 1) // BK * VT
    tile, rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    segment, b, h = first + rest % few, rest // few // HV, rest // few % HV
    hk = h // (HV // H)
    k, v = tile // VT * BK + tl.arange(0, BK), tile % VT * BV + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    at = k[:, None] * V + v[None, :]
    whole = (b * HV + h).to(tl.int64) * K * V
    S = tl.zeros([BK, BV], tl.float32)
    if ENTERS:
        S = load_fp32(border + whole + at, inside)
    if FOLD:
        for j in range(NS - 1 - segment if REVERSE else segment):
            end = (b * known + (known - 1 - j if REVERSE else j)).to(tl.int64) * HV + h
            S *= tl.exp(tl.load(logs + end))
            if GK:
                S *= tl.exp(load_fp32(logs_k + end * K + k, k < K))[:, None]
            if GV:
                S *= tl.exp(load_fp32(logs_v + end * V + v, v < V))[None, :]
            S += load_fp32(ends + end * K * V + at, inside)
    run, run_k, run_v = 0.0, tl.zeros([BK], tl.float32), tl.zeros([BV], tl.float32)
    count = tl.where(segment < 0, 0, tl.minimum(L, NC - segment * L))
    for step in range(count):
        c = segment * L + (count - 1 - step if REVERSE else step)
        chunk = chunk_at(b, c, h, T, NC, HV, C)
        if WRITE:
            tl.store(out + chunk.index * K * V + at, S, mask=inside)
        X = load_rows(x, of_head(chunk, hk), k, H, K)
        Y = load_rows(y, chunk, v, HV, V)
        through, used = True, chunk.place < chunk.left
        if DOCS:
            _, seen, kept = documents(starts, chunk, True)
            used = seen if REVERSE else kept
            through = last_start(starts, chunk) < tl.maximum(chunk.first, 1)
        total = 0.0
        if G > 0:
            a = scalar_gates(g, gamma, chunk, HV, G)
            Y = Y * (from_start(a, used, G) if REVERSE else to_end(a, used, G))[:, None]
            total = tl.sum(a, 0)
        elif DOCS:
            Y = tl.where(used[:, None], Y, 0.0)
        if DOCS:
            total = tl.where(through, total, GONE)
        if G > 0 or DOCS:
            S *= tl.exp(total)
            run += total
        if GK:
            total_k = load_fp32(totals_k + chunk.index * K + k, k < K)
            S *= tl.exp(total_k)[:, None]
            run_k += total_k
        if GV:
            total_v = load_fp32(totals_v + chunk.index * V + v, v < V)
            S *= tl.exp(total_v)[None, :]
            run_v += total_v
        S += mm(tl.trans(X), Y, ROUND) * scale
        if ADDED:  # the state of the document added_at[c] comes in after this chunk
            n = tl.load(added_at + c)
            where = added + (n.to(tl.int64) * HV + h) * K * V
            S += load_fp32(where + at, inside & ((k * 0 + n)[:, None] >= 0))
    if FOLD:
        if (segment <= 0) if REVERSE else (segment >= NS - 1):
            tl.store(far + whole + at, S, mask=inside)
    else:
        end = (b * few + segment - first).to(tl.int64) * HV + h
        tl.store(ends + end * K * V + at, S, mask=inside)
        tl.store(logs + end, run)
        if GK:
            tl.store(logs_k + end * K + k, run_k, mask=k < K)
        if GV:
            tl.store(logs_v + end * V + v, run_v, mask=v < V)


@triton.jit
def load_state(states, chunk, k, v, K: tl.constexpr, V: tl.constexpr):
    """[BK, BV]: rows k and columns v of the chunk's state [K, V], as it is stored."""
    return tl.load(
        states + chunk.index * K * V + k[:, None] * V + v[None, :],
        mask=(k < K)[:, None] & (v < V)[None, :],
        other=0.0,
    )


class Plan:
    """Sizes, tiles and segments of a call; ValueError for what the kernels can't take. g [HV] or
    [B, T, HV], or None."""

    def __init__(self, k, v, C, g=None, exact=False):
        """exact: the states are kept in fp32, because they are results."""
        (self.B, self.T, self.H, self.K), (self.HV, self.V) = k.shape, v.shape[2:]
        if C < 16:
            raise ValueError(f"chunk_size: {C}; the triton backend takes 16 and more")
        if max(self.K, self.V) > 256:
            raise ValueError(
                f"q, v: heads of {self.K} and {self.V} channels; the triton backend takes up to 256"
            )
        if not {k.dtype, v.dtype} <= set(DTYPES):
            raise ValueError(
                f"q, v: {k.dtype}, {v.dtype}; the triton backend takes bfloat16 and float32"
            )
        if k.device.type == "cpu" and not INTERPRETED:
            raise ValueError(
                "backend: triton runs on a GPU; take backend = chunk (or set TRITON_INTERPRET=1, to"
                " debug kernels)"
            )
        self.C = C
        self.round = rounds(k, v)
        self.shared = shared_memory(k)
        self.state_dtype = torch.bfloat16 if self.round and not exact else torch.float32
        (self.g,) = contiguous(g)
        self.NC = cdiv(self.T, C)
        self.chunks = self.B * self.NC * self.HV
        self.states = (self.B, self.NC, self.HV, self.K, self.V)
        # A sequence is cut unless its programs about fill the GPU: into three a multiprocessor, but
        # not into less than four chunks.
        self.walk_tiles = tiles("walk", self)
        across = cdiv(self.K, self.walk_tiles["BK"])
        down = cdiv(self.V, self.walk_tiles["BV"])
        self.programs = self.B * self.HV * across * down
        room = 3 * processors(k)
        full = 4 * self.programs >= room
        segments = 1 if full else max(1, min(room // self.programs, self.NC // 4))
        self.L = cdiv(self.NC, segments)
        self.NS = cdiv(self.NC, self.L)

    @property
    def kind(self):
        """The kernels' constant G: 0 none, 1 per token, 2 constant."""
        return 0 if self.g is None else 2 if self.g.ndim == 1 else 1

    def constants(self, *names, **flags):
        """The kernels' constants of these names, and whether there is what a flag asks for."""
        sizes = {name: getattr(self, name) for name in ("H", *names, "K", "V", "C")}
        flags = {name: x is not None for name, x in flags.items()}
        return sizes | flags | {"ROUND": self.round}

    def walk(
        self,
        x,
        y,
        starts,
        border,
        scale,
        reverse,
        totals=(None, None),
        states=True,
        added=None,
        added_at=None,
    ):
        """(states [B, NC, HV, K, V] before each chunk, or after it if reversed; that at the far end
        of the stream [B, HV, K, V]), or without states (that at the far end; the log decays of the
        stream: [B, HV], and [B, HV, K], [B, HV, V] or None).

        x [B, T, H, K], y [B, T, HV, V], contiguous; starts: document_starts or None; border [B, HV,
        K, V] or None: the state that enters the stream, or, reversed, the gradient of the one that
        leaves it. totals: log decays of chunks [B, NC, HV, K], [B, NC, HV, V] or None. added [N,
        HV, K, V], added_at [NC]: see documents.py.
        """
        of_k, of_v = totals
        known = self.NS - 1 if states else self.NS  # segments whose ends must be known
        far = x.new_empty(self.B, *self.states[2:], dtype=torch.float32)
        ends, logs = far, [far] * 3  # not read if there are none
        if known:
            ends = x.new_empty(self.B, known, *self.states[2:], dtype=torch.float32)
            widths = (), (self.K if of_k is not None else 0,), (self.V if of_v is not None else 0,)
            logs = [
                x.new_empty(self.B, known, self.HV, *width, dtype=torch.float32) for width in widths
            ]
        out = x.new_empty(self.states, dtype=self.state_dtype) if states else None

        def launch(first, few, fold, write):
            _walk[(self.programs * few,)](
                x,
                y,
                self.g,
                self.g,
                of_k,
                of_v,
                starts,
                border if fold else None,
                added,
                added_at,
                out,
                far,
                ends,
                *logs,
                scale,
                self.T,
                self.NC,
                self.L,
                self.NS,
                first,
                few,
                known,
                **self.constants("HV", GK=of_k, GV=of_v, DOCS=starts, ADDED=added),
                G=self.kind,
                ENTERS=fold and border is not None,
                REVERSE=reverse,
                FOLD=fold,
                WRITE=write,
                **self.walk_tiles,
            )

        if known:
            launch(self.NS - known if reverse else 0, known, False, False)
        if states:
            launch(0, self.NS, True, True)
            return out, far
        launch(-1 if reverse else self.NS, 1, True, False)
        return far, [log.sum(1) if log.numel() else None for log in logs]
