"""Linear projection to the vocabulary and cross-entropy in one: only the logits of a chunk of
tokens exist at any time.

The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits are there,
and scaled in the backward pass. In bytes, for T tokens of width D and V words in bf16 on a GPU, the
most above the inputs is
    4 V D (dW in fp32) + 2 T D (dx) + the larger of 6 V chunk (logits in fp32, their gradient) and 2
    V chunk + 4 V D (gradient, dW of one chunk); at T = 16384, D = 1024, V = 151936, chunk = 1024 it
    is 0.58 + 0.03 + 0.87 GiB, where plain autograd takes above 23.
The backward pass has 6 V D (dW scaled and rounded) in the place of the last term.
With a vocabulary sharded over ranks V are the words of one rank.
"""

import torch

from lmoe.kernels.compat import assert_all
from lmoe.kernels.norm import compute_dtype

IGNORE = -100  # the label of a token that does not count


def linear_cross_entropy(x, weight, labels, normaliser, *, z_coeff=0.0, chunk=1024, vocab=None):
    """Returns (loss, z_loss): sum of -log softmax(x W^T)[label] over the valid tokens, and z_coeff
    times the sum of logsumexp(x W^T)^2, each / normaliser.

    x [T, D]; weight [V, D] in x's dtype; labels [T] int64, IGNORE where the token does not count;
    normaliser: the number that both sums are divided by (0-dim tensor or float; usually all valid
    labels of the step, on all ranks). chunk: tokens whose logits exist at one time. z_loss carries
    no gradient of its own: its gradient comes with that of loss, so that one pass serves both (loss
    + z_loss has the right gradient). Both results are 0-dim, fp32 (float64 for float64 inputs), as
    are all sums, so that they do not depend on the chunk; the gradients of x and weight come in
    their dtypes. Without a valid token both are 0, and so are the gradients. z-loss: ST-MoE, arXiv
    2202.08906, equation 5. A label that is neither IGNORE nor a word, of this rank or another, is a
    RuntimeError on every rank: on the CPU at once, on a GPU a device-side assertion, which the next
    synchronisation reports.

    vocab: an object that speaks for a vocabulary sharded over ranks; None: weight is all of it. It
    has `start`, the word of weight's first row, and `max(t)` and `sum(t)`, elementwise over the
    ranks, each called once a chunk. All arguments but weight are the same on every rank; labels are
    words of the whole vocabulary. A token's terms are counted by the rank that has its label's row:
    loss and z_loss are parts, and their sum over the ranks is the whole. The gradients are those of
    the whole, provided that the same gradient of loss comes to every rank: exact for weight's rows,
    and for x a part, which the caller sums over the ranks.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight: shape {list(weight.shape)} does not fit x {list(x.shape)}; they should be [V,"
            " D] and [T, D]"
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels: shape {list(labels.shape)} should be {list(x.shape[:1])}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: dtype {weight.dtype} beside {x.dtype} of x; cast one")
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} should be at least 1")
    if isinstance(normaliser, torch.Tensor):
        normaliser = normaliser.to(compute_dtype(x))
    return _LinearCrossEntropy.apply(
        x, weight, labels, normaliser, z_coeff, chunk, vocab, torch.is_grad_enabled()
    )


def _wide_product(a, b, dtype):
    """a @ b in dtype (fp32, float64), whatever the dtype of a and b: rounding logits to bf16 would
    show in the loss."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, normaliser, z_coeff, chunk, vocab, grad):
        dtype = compute_dtype(x)
        need_x, need_w = (grad and need for need in ctx.needs_input_grad[:2])
        # Once: a CPU has no product of bf16 into fp32.
        wide = weight.to(dtype) if x.device.type == "cpu" else weight
        nll, square, found = x.new_zeros(3, x.shape[0], dtype=dtype)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=dtype) if need_w else None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            valid = labels[rows] != IGNORE
            label = labels[rows] - (0 if vocab is None else vocab.start)
            here = valid & (label >= 0) & (label < len(weight))
            label = label.masked_fill(~here, 0)[:, None]
            p = _wide_product(x[rows].to(wide.dtype), wide.T, dtype)
            # In place from here: logits, their exponentials, the gradient of the logits.
            top = p.amax(1, keepdim=True)
            top = top if vocab is None else vocab.max(top)
            p -= top
            target = p.gather(1, label).squeeze(1)
            total = torch.stack([p.exp_().sum(1), here.to(dtype)])
            total, found[rows] = total if vocab is None else vocab.sum(total)
            log_total = total.log()
            lse = log_total + top.squeeze(1)
            torch.mul(log_total - target, here, out=nll[rows])
            torch.mul(lse.square(), here, out=square[rows])
            if not (need_x or need_w):
                continue
            share = valid.to(dtype) / normaliser
            p *= (share * (1 + 2 * z_coeff * lse) / total)[:, None]
            p.scatter_add_(1, label, -(share * here)[:, None])
            p = p.to(wide.dtype)
            if need_x:
                dx[rows] = p @ wide
            if need_w:
                dw += _wide_product(p.T, x[rows].to(wide.dtype), dtype)
        known = found == (labels != IGNORE)  # by one rank, where there is a label
        assert_all(known, "a label is no word of the vocabulary")
        ctx.save_for_backward(dx, dw)
        ctx.dtypes = x.dtype, weight.dtype
        z_loss = z_coeff * square.sum() / normaliser
        ctx.mark_non_differentiable(z_loss)
        return nll.sum() / normaliser, z_loss

    @staticmethod
    def backward(ctx, d, _):
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else (dx * d).to(ctx.dtypes[0]),
            None if dw is None else (dw * d).to(ctx.dtypes[1]),
            *[None] * 6,
        )
