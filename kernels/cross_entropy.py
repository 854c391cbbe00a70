"""Linear projection to the vocabulary and cross-entropy in one: only the logits of a chunk of
tokens exist at any time.

The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits are there,
and scaled in the backward pass. On a GPU one Triton kernel reads a row of logits for its maximum
and sum, a second one writes its gradient over it (gpu/cross_entropy.py). In bytes, for T tokens of
width D and V words in bf16, the most above the inputs is
    4 V D (dW in fp32) + 2 T D (dx) + 4 V chunk (logits in fp32; 2 V chunk in bf16);
at T = 16384, D = 1024, V = 151936, chunk = 4096 it is 0.58 + 0.03 + 2.32 GiB, where plain autograd
takes above 23. Where V is no multiple of 4, or in portable PyTorch, the gradient has 2 V chunk of
its own. The backward pass has 2 V D + 2 T D (both scaled) in the place of the last term.
With a vocabulary sharded over ranks V are the words of one rank.
"""

import functools

import torch

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.compat import assert_all
from lmoe.kernels.norm import compute_dtype

IGNORE = -100  # the label of a token that does not count
LOGITS = 5 * 2**29  # bytes that the logits of an automatic chunk may take
STEP, MOST = 128, 4096  # tokens of such a chunk


def linear_cross_entropy(
    x, weight, labels, normaliser, *, z_coeff=0.0, chunk=0, vocab=None, logits_dtype=None
):
    """Returns (loss, z_loss): sum of -log softmax(x W^T)[label] over the valid tokens, and z_coeff
    times the sum of logsumexp(x W^T)^2, each / normaliser.

    x [T, D]; weight [V, D] in x's dtype; labels [T] int64, IGNORE where the token does not count;
    normaliser: the number that both sums are divided by (0-dim tensor or float; usually all valid
    labels of the step, on all ranks). chunk: tokens whose logits exist at one time; 0: see
    automatic_chunk. z_loss carries no gradient of its own: its gradient comes with that of loss, so
    that one pass serves both (loss + z_loss has the right gradient). Both results are 0-dim, fp32
    (float64 for float64 inputs), as are all sums, so that they do not depend on the chunk; the
    gradients of x and weight come in their dtypes. logits_dtype: None for the sums' own;
    torch.bfloat16, for x in bf16, rounds the logits. Without a valid token both are 0, and so are
    the gradients. z-loss: ST-MoE, arXiv 2202.08906, equation 5. A label that is neither IGNORE nor
    a word, of this rank or another, is a RuntimeError on every rank: on the CPU at once, on a GPU a
    device-side assertion, which the next synchronisation reports.

    vocab: an object that speaks for a vocabulary sharded over ranks; None: weight is all of it. It
    has `start`, the word of weight's first row, and `gather_parts(t)`, the t [4, n] of all ranks
    [ranks, 4, n] in their order, called once a chunk. All arguments but weight are the same on
    every rank, and so are chunks (chunk = 0 asks for shards of one size); labels are words of the
    whole vocabulary. A token's terms are counted by the rank that has its label's row: loss and
    z_loss are parts, and their sum over the ranks is the whole. The gradients are those of the
    whole, provided that the same gradient of loss comes to every rank: exact for weight's rows, and
    for x a part, which the caller sums over the ranks.
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
    if chunk < 0:
        raise ValueError(f"chunk: {chunk} should be at least 1, or 0 to choose")
    logits_dtype = logits_dtype or compute_dtype(x)
    if logits_dtype not in (x.dtype, compute_dtype(x)):
        raise ValueError(
            f"logits_dtype: {logits_dtype} of x in {x.dtype}; take {x.dtype} or {compute_dtype(x)}"
        )
    if isinstance(normaliser, torch.Tensor):
        normaliser = normaliser.to(compute_dtype(x))
    chunk = chunk or automatic_chunk(len(weight), logits_dtype)
    return _LinearCrossEntropy.apply(
        x, weight, labels, normaliser, z_coeff, chunk, vocab, logits_dtype, torch.is_grad_enabled()
    )


def automatic_chunk(words, dtype):
    """Choose how many tokens have logits [.., words] of a dtype at one time: a multiple of STEP
    that LOGITS bytes hold, from STEP to MOST."""
    return min(max(LOGITS // (words * dtype.itemsize) // STEP, 1) * STEP, MOST)


def lies_over(words, logits, gradient):
    """Tell whether the kernel finds memory for rows of `gradient` (a dtype) in those of `logits`: a
    narrower one lies in the front half of each, if that is aligned as matrix products like it."""
    narrower = gradient.itemsize < logits.itemsize and words * logits.itemsize % 16 == 0
    return gradient == logits or narrower


# --------------------------------------------------------------------------------------------------
# Products


def _product(a, b, dtype):
    """a @ b, summed in fp32 or wider and rounded once, to `dtype`: bf16 logits on the way to fp32
    ones would show in the loss."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    wide = torch.promote_types(a.dtype, dtype)
    return (a.to(wide) @ b.to(wide)).to(dtype)


def _add_product(total, a, b, dtype):
    """total + a @ b, in total's memory; a @ b for None."""
    if total is None:
        return _product(a, b, dtype)
    if a.dtype == dtype:
        return total.addmm_(a, b)
    if _adds_wide(a.dtype, a.device):
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    return total.add_(_product(a, b, dtype))


@functools.cache
def _adds_wide(dtype, device):
    """Tell, from one trial, whether addmm adds products of a narrow dtype to an fp32 matrix: on a
    GPU, and not in every version of torch."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = ones.float()
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 17).all())


# --------------------------------------------------------------------------------------------------
# A chunk, in portable PyTorch


def parts(logits, label):
    """[3, n] of logits [n, V], which become their exponentials: the largest, the sum of
    exponentials relative to it, and the label's (-1: not here), else 0."""
    target = logits.gather(1, label.clamp(min=0)[:, None]).squeeze(1).masked_fill(label < 0, 0)
    top = logits.amax(1)
    logits -= top[:, None]
    return torch.stack([top, logits.exp_().sum(1), target])


def terms(exponentials, label, own, gathered, share, z_coeff, dtype):
    """([2, n]: of each token -log p and logsumexp, where its label is here; the gradient of the
    logits [n, V] in `dtype`, or None for None). own [3, n], gathered [ranks, 3, n]: what `parts`
    gave here and on all ranks; share [n]: of the tokens in the loss."""
    tops, totals, targets = gathered.unbind(1)
    top = tops.amax(0)
    total = (totals * (tops - top).exp()).sum(0)
    log_total = total.log()
    lse = log_total + top
    here = label >= 0
    found = torch.stack([log_total - (targets.sum(0) - top), lse]) * here
    if dtype is None:
        return found, None
    factor = share * (1 + 2 * z_coeff * lse) / total * (own[0] - top).exp()
    exponentials *= factor[:, None]
    exponentials.scatter_add_(1, label.clamp(min=0)[:, None], -(share * here)[:, None])
    return found, exponentials.to(dtype)


# --------------------------------------------------------------------------------------------------
# All chunks


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, normaliser, z_coeff, chunk, vocab, logits_dtype, grad):
        dtype = compute_dtype(x)
        need_x, need_w = (grad and need for need in ctx.needs_input_grad[:2])
        # Once: a CPU has no product of bf16 into fp32.
        wide = weight.to(dtype) if x.device.type == "cpu" else weight
        fused = on_gpu(x, weight)
        if fused:
            from lmoe.kernels.gpu import cross_entropy as gpu
        label = labels - (0 if vocab is None else vocab.start)
        label = label.masked_fill((label < 0) | (label >= len(weight)), -1)
        valid = labels != IGNORE
        share = valid.to(dtype) / normaliser
        has = (label >= 0).to(dtype)  # how many ranks have the label
        found = x.new_zeros(2, x.shape[0], dtype=dtype)
        dx = torch.empty_like(x) if need_x else None
        dw = None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            of_x = x[rows].to(wide.dtype)
            logits = _product(of_x, wide.T, logits_dtype)
            logits = logits if fused else logits.to(dtype)
            own = (gpu.parts if fused else parts)(logits, label[rows])
            gathered = own[None]
            if vocab is not None:
                gathered = vocab.gather_parts(torch.cat([own, has[None, rows]]))
                has[rows] = gathered[:, 3].sum(0)
            rest = gathered[:, :3], share[rows], z_coeff, wide.dtype if need_x or need_w else None
            found[:, rows], logits = (gpu.terms if fused else terms)(
                logits, label[rows], own, *rest
            )
            if need_x:
                dx[rows] = logits @ wide
            if need_w:
                dw = _add_product(dw, logits.T, of_x, dtype)
            del logits  # before the next chunk's come
        if need_w and dw is None:  # no token
            dw = torch.zeros_like(weight, dtype=dtype)
        nll, lse = found
        # By one rank, where there is a label.
        assert_all(has == valid, "a label is no word of the vocabulary")
        ctx.save_for_backward(dx, dw)
        ctx.dtype = x.dtype
        z_loss = z_coeff * lse.square().sum() / normaliser
        ctx.mark_non_differentiable(z_loss)
        return nll.sum() / normaliser, z_loss

    @staticmethod
    def backward(ctx, d, _):
        d = d.view(1)  # as a 0-dim tensor it would be rounded to bf16 beside dx

        # Rounded on the way: an fp32 copy of dW would be the largest tensor here.
        def scaled(x):
            return torch.mul(x, d, out=torch.empty_like(x, dtype=ctx.dtype))

        return *(None if x is None else scaled(x) for x in ctx.saved_tensors), *[None] * 7
