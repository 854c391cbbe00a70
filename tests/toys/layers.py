"""Mixers that use what coming ones need of a mixer's interface, over the families that there
are."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from lmoe.kernels import families
from lmoe.model.batch import document_ids
from lmoe.model.init import Linear
from lmoe.model.mixers.base import Mixer, QKVMixer, output_projection, projections
from lmoe.model.mixers.gla import GLA
from lmoe.model.mixers.phases import angle_sums, rotate
from lmoe.model.moe.balance import LocalBalanceGroup, add_loss, balance_loss
from lmoe.model.moe.router import RouterStats


class Turning(QKVMixer):
    """Linear attention whose q and k turn by angles that add up over a document (GateLoop, arXiv
    2311.01927)."""

    family = families.SSD
    tp_plan = QKVMixer.tp_plan | {"wturn": 0}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        width = options.shape(config).qk_heads * (self.K // 2)
        self.wturn = Linear(config.dim, width, std=config.init_std)

    def project_kv(self, x, left, seq, state, residuals):
        kv = super().project_kv(x, left, seq, state, residuals)
        turns = torch.tanh(self.wturn(x)).unflatten(-1, (-1, self.K // 2))
        sums = None if state is None else state["phi"]
        phi = angle_sums(turns, seq, sums, self.options.chunk_size, self.options.backend)
        return {"k": rotate(kv["k"], phi), "v": kv["v"], "phi": phi}

    def scans(self, kv):
        return [self.scan({name: kv[name] for name in ("k", "v")})]

    def read(self, q, kv, scans, entering, seq, state):
        return super().read(rotate(q, kv["phi"]), kv, scans, entering, seq, state)

    def initial_state(self, sequences, max_len, device, dtype):
        state = super().initial_state(sequences, max_len, device, dtype)
        shape = sequences, state["S"].shape[1], 1, self.K // 2
        return state | {"phi": torch.zeros(shape, device=device, dtype=torch.float64)}


class Selective(Mixer):
    """A state space layer whose time step, B and C come from all heads' channels together (Mamba,
    arXiv 2312.00752): ranks that share the heads sum them inside the mixer."""

    family = families.SSD
    tp_plan = {"wx": 0, "x_proj": 1, "dt_proj": 0, "wo": 1}
    rank = 3

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads, _, self.K, self.V = options.shape(config)
        (self.wx,) = projections(config, [heads * self.V])
        std = config.init_std
        self.x_proj = Linear(heads * self.V, self.rank + 2 * self.K, std=std)
        self.dt_proj = Linear(self.rank, heads, bias=True, std=std)
        self.wo = output_projection(config, heads * self.V)

    @classmethod
    def head_counts(cls, options, config):
        return {"": options.shape(config).v_heads}

    def streams(self, x, left, seq, state):
        inner = self.wx(x)
        parts = self.sum_over_heads(self.x_proj(F.silu(inner)))
        dt, B, C = parts.split([self.rank, self.K, self.K], -1)
        return {"x": inner, "dt": F.softplus(self.dt_proj(dt)), "B": B[:, None], "C": C[:, None]}

    def project_q(self, x, left, seq, state):
        return x["C"]

    def project_kv(self, x, left, seq, state, residuals):
        v = x["x"].unflatten(-1, (-1, self.V)) * x["dt"][..., None]
        return {"k": x["B"], "v": v, "g": -x["dt"]}

    def output(self, o, gate):
        return self.wo(o.flatten(-2))


class FirstValue(GLA):
    """GLA whose values lean towards those of the first such layer, by a gate of x (RWKV7, arXiv
    2503.14456)."""

    tp_plan = GLA.tp_plan | {"wlean": 0}
    joined = True  # whether gradients flow back to the first layer

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads = options.shape(config).v_heads
        self.wlean = Linear(config.dim, heads, bias=True, std=config.init_std)
        self.residual_shapes = {"first": (heads, self.V)}

    def project_kv(self, x, left, seq, state, residuals):
        kv = super().project_kv(x, left, seq, state, residuals)
        first = residuals.setdefault("first", kv["v"])
        first = first if self.joined else first.detach()
        lean = torch.sigmoid(self.wlean(x))[..., None]
        return kv | {"v": kv["v"] + lean * (first.tanh() - kv["v"])}


class Memories(QKVMixer):
    """Two memories, of which a router gives each token one (MoM, arXiv 2502.13685): a scan over
    (memory, document) segments, whose borders are its own, and statistics with a balance loss."""

    family = families.SSD
    splits_sequence = False
    router_size = 2

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        self.router = Linear(config.dim, self.router_size, std=config.init_std)

    def project_kv(self, x, left, seq, state, residuals):
        kv = super().project_kv(x, left, seq, state, residuals)
        logits = self.router(x)
        ids = logits.detach().argmax(-1, keepdim=True)
        weight = logits.softmax(-1).gather(1, ids)
        chosen = torch.zeros_like(logits).scatter(1, ids, 1.0)
        stats, weight = self.route(logits, chosen, weight, seq)
        routed = {"ids": ids.squeeze(1), "weight": weight, "stats": stats}
        if seq.decoding:
            return kv | routed
        N, T = len(seq.cu_seqlens) - 1, len(x)
        segment = ids.squeeze(1) * N + document_ids(seq.cu_seqlens, T)
        order = segment.argsort(stable=True)
        places = torch.arange(1, self.router_size * N + 1, device=x.device)
        ends = torch.searchsorted(segment[order], places)
        borders = F.pad(ends, (1, 0)).to(seq.cu_seqlens.dtype)
        kv = {name: t[order] for name, t in kv.items()}
        return kv | routed | {"order": order, "borders": borders}

    def route(self, logits, chosen, weight, seq):
        """(RouterStats, weight with the balance loss): one of tensor parallel ranks speaks."""
        balance = logits.new_zeros(())
        loss = None
        if self.speaks and not seq.decoding:
            seq = replace(seq, weights=seq.mixer_weights)
            rest = {"top_k": 1, "score": "softmax"}
            loss = balance_loss("megatron", 0.1, logits, chosen, seq, LocalBalanceGroup(), **rest)
        if loss is not None:
            weight, balance = add_loss(weight, loss), loss.detach()
        counts = chosen.sum(0).long() * self.speaks
        return RouterStats(counts, balance, torch.zeros_like(balance)), weight

    def scans(self, kv):
        scan = self.scan({"k": kv["k"], "v": kv["v"]})
        scan.cu_seqlens = kv.get("borders")
        return [scan]

    def read(self, q, kv, scans, entering, seq, state):
        ids, (scan,) = kv["ids"], scans
        if seq.decoding:
            places = torch.arange(len(ids), device=ids.device), ids
            S = state["S"][places]
            o = scan.family.step(scan, q, S)
            state["S"][places] = S
        else:
            o, final = seq.context.scan(scan, q[kv["order"]], None, seq, state is not None)
            o = o[kv["order"].argsort()]
            if state is not None:
                memories = final.unflatten(0, (self.router_size, -1)).transpose(0, 1)
                state["S"].copy_(memories[: len(state["S"])])
        return o * kv["weight"][..., None]

    def initial_state(self, sequences, max_len, device, dtype):
        state = super().initial_state(sequences, max_len, device, dtype)
        return {"S": state["S"].unsqueeze(1).repeat(1, self.router_size, 1, 1, 1)}
