"""Attention over dense batches, forward and backward."""

import functools

import torch

from flashinfer_lite import _check, _dtensor, _ops, _plain, _sink, reference


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=(-1, -1),
    softmax_scale=None,
    softcap=None,
    mask=None,
    alibi_slopes=None,
    sink=None,
    kv_start=None,
    seqlens_kv=None,
    dropout_p=0.0,
    softmax="auto",
    phi=None,
    deterministic=False,
    batch_invariant=False,
    impl="auto",
    return_lse=False,
):
    """FlashAttention-2: exact attention without a seqlen_q x seqlen_kv buffer.

        S = softcap(softmax_scale q k^T) + alibi + mask,  hidden keys at -inf
        out = softmax(S) v,  lse = log sum exp(S)

    Dao, "FlashAttention-2" (arXiv 2307.08691). K and V are read where they lie, never copied or
    expanded. Differentiable in q, k, v, an additive mask, a sink, and through lse.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], float64 (CPU only), float32, bfloat16 or
            float16.
        k: [batch, seqlen_kv, num_heads_kv, head_dim], num_heads_q a multiple of num_heads_kv:
            query head h reads KV head h // (num_heads_q // num_heads_kv).
        v: [batch, seqlen_kv, num_heads_kv, head_dim_v]. Both head dimensions are multiples of 8 up
            to 256. The last dimension is contiguous, every other stride is free.
        causal: False, True or "bottom_right" (row i sees keys <= i + seqlen_kv - seqlen_q), or
            "top_left" (keys <= i, as torch's scaled_dot_product_attention).
        window: (left, right) keys to each side of the row's position, inclusive; -1 is open.
            Without causal the position is bottom-right aligned.
        softmax_scale: default head_dim ** -0.5.
        softcap: None, or c > 0 for c * tanh(score / c), before the mask.
        mask: bool (True is visible) or additive floating point, where exactly -inf hides a key;
            broadcasts to [batch, num_heads_q, seqlen_q, seqlen_kv].
        alibi_slopes: float32 [num_heads_q] or [batch, num_heads_q], any strides: adds -slope
            |position - j| to the score of key j (Press et al., "Train short, test long", arXiv
            2108.12409), after the softcap. The position of row i is that of causal and window: i +
            seqlen_kv - seqlen_q, counted from seqlens_kv where there is one, and i with "top_left".
            No gradient: a tensor that requires grad is refused.
        kv_start, seqlens_kv: int32 or int64 [batch]: the visible slots of each sequence are
            kv_start <= j < seqlens_kv; bottom-right alignment counts from seqlens_kv.
        deterministic: gradients whose bits are the same in every run, as everything else is
            anyway. On CUDA it costs two products of seven, and, where a mask that broadcasts
            requires grad, float32 memory for its gradient at full size. So does
            torch.use_deterministic_algorithms(True).
        batch_invariant: likewise always so here: a row of out and lse has bits that depend on its
            own sequence alone.
        impl: "auto", "cpu", "sm80" (CUDA, compute capability 8.0 or higher), or "reference" (the
            eager oracle, on any device). Never falls back.
        return_lse: also return lse.
        softmax: "online" moves the base of its exponentials with each row's maximum. "unified"
            (FlashDecoding++, arXiv 2311.01282) takes exp(S - phi) instead, without looking at the
            maximum on the way, and computes again, by the online softmax, each row for which that
            was not safe: docs/flashdecoding_pp.md. "auto" is "unified" if phi is given.
        phi: a number, or float32 [num_heads_q]: below the row maxima of S, by up to 44 (float16:
            10.4). `flashinfer_lite.calibrate` measures it; None with "unified" is 0. It decides how
            many rows are computed twice, `stats()` counts them, never what comes out beyond
            rounding: a row computed again is bit for bit what "online" gives.
        sink: [num_heads_q], float64, float32, bfloat16 or float16: one more score for each query
            head, with no value, as if every row saw one key more whose v is 0. It takes a share of
            the softmax that no key gets, exp(sink) / (exp(sink) + sum exp(S)), and is counted in
            lse: the learned sink of GPT-OSS, after Xiao et al., "Efficient Streaming Language
            Models with Attention Sinks" (arXiv 2309.17453), where the first tokens play it. No
            scale, softcap, mask or window applies to it. -inf is no sink, NaN makes its head NaN.
            A bfloat16 or float16 out is rounded once more.
        dropout_p: not implemented yet, refused.

    Returns:
        out [batch, seqlen_q, num_heads_q, head_dim_v], or (out, lse) with lse [batch, num_heads_q,
        seqlen_q], natural log, float32 (float64 for float64). A row that sees no key: out 0, lse
        -inf, gradients 0; with a sink: out 0, lse the sink, and the gradient of lse is the sink's.

    Raises:
        TypeError, ValueError: naming the argument, what is expected and what came.
        RuntimeError: for alibi_slopes that require grad while grad mode is on, and
            for values only the kernel reads (kv_start, seqlens_kv). On CUDA they are
            clamped instead, because a check would wait for the device; the environment variable
            FLASHINFER_LITE_CHECK=1 asks for it.
        NotImplementedError: for arguments that have not landed, and for tensors that carry a
            tangent of forward-mode AD, which impl="reference" has.

    DTensors sharded along batch and heads give DTensors, forward and backward, and nothing is
    communicated; all tensors must then be DTensors. docs/distributed.md tells what is done with
    other placements.

    Limits on CUDA: compute capability 8.0 or higher, no float64, and less than 2^30 keys and less
    than 2^30 rows (queries times the heads of a group) per KV head. A device or a size beyond them
    is a RuntimeError.

    Gradients are rebuilt from lse: a row whose every key carries a huge finite bias (-1e5 and
    beyond, finfo.min) has an lse without room for its sum, and gradients that are off. Hide keys
    with -inf or with a bool mask.

    Example:
        >>> q = torch.randn(1, 5, 4, 64); k = v = torch.randn(1, 9, 2, 64)
        >>> flashinfer_lite.attention(q, k, v, causal=True).shape
        torch.Size([1, 5, 4, 64])
    """
    if (
        mask is alibi_slopes is sink is phi is None
        and softmax == "auto"
        and impl == "auto"
        and dropout_p == 0
    ):
        scores = causal, window, softmax_scale, softcap
        plain = _plain.call(_unrecorded, q, k, v, *scores, kv_start, seqlens_kv)
        if plain is not None:
            return plain if return_lse else plain[0]
    q, k, v = _check.under_autocast(q, k, v)
    arguments = prepare(q, k, v, causal, window, softmax_scale, softcap, mask, kv_start, seqlens_kv)
    phi_of_op = _check.unified(softmax, phi, q)
    _check.sink(sink, q)
    _check.alibi_slopes(alibi_slopes, q, q.shape[0])
    _check.not_landed(dropout_p)
    as_reference = _check.impl(impl, q)
    tensors = dict(zip(("q", "k", "v", "mask"), arguments[:4], strict=True))
    tensors |= {"sink": sink, "alibi_slopes": alibi_slopes}
    if not as_reference:
        _check.no_forward_ad("attention", "; impl='reference' has", **tensors)
    others = {"kv_start": kv_start, "seqlens_kv": seqlens_kv, "phi": phi}
    if _dtensor.given(*tensors.values(), *others.values()):
        op = functools.partial(
            attention,
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            softmax=softmax,
            deterministic=deterministic,
            impl=impl,
        )
        out, lse = _dtensor.call(op, **tensors, **others)
    elif as_reference:
        out, lse = run_reference(arguments, sink, None, alibi_slopes)
    else:
        out, lse = _ops.attention_fwd(*arguments, *phi_of_op, bool(deterministic), alibi_slopes)
        if sink is not None:
            out, lse = _sink.fold(out, lse, sink, return_lse)
    return (out, lse) if return_lse else out


def _unrecorded(*arguments):
    """attention_fwd of tensors that need no gradient: autograd's detour by Python is half of a
    small call."""
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.attention_fwd(*arguments)


def prepare(
    q,
    k,
    v,
    causal,
    window,
    softmax_scale,
    softcap,
    mask,
    kv_start,
    seqlens_kv,
    names=("q", "k", "v"),
    block_table=None,
):
    """Check the common arguments and put them in the order of the ops' schemas."""
    _check.qkv(q, k, v, names, paged=block_table is not None)
    _check.block_table(block_table, q, k, q.shape[0])
    scores = _check.scores(q, causal, window, softmax_scale, softcap)
    seqlen_kv = k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]
    mask = _check.mask(mask, q, seqlen_kv)
    _check.lengths("kv_start", kv_start, q, q.shape[0])
    _check.lengths("seqlens_kv", seqlens_kv, q, q.shape[0])
    return q, k, v, mask, kv_start, seqlens_kv, *scores


def run_reference(arguments, sink, block_table, alibi_slopes):
    """The eager oracle on prepared arguments."""
    q, k, v, mask, kv_start, seqlens_kv, softmax_scale, softcap, causal, left, right = arguments
    if block_table is not None:
        k, v = (reference.gather_pages(x, block_table) for x in (k, v))
    return reference.attention(
        q,
        k,
        v,
        causal=(False, "bottom_right", "top_left")[causal],
        window=(left, right),
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sink=sink,
        kv_start=kv_start,
        seqlens_kv=seqlens_kv,
        return_lse=True,
    )
