"""append_kv on the executor: `simt.Executor.append_kv` is this."""

import torch


def append_kv(
    executor,
    memory,
    k_cache,
    v_cache,
    k,
    v,
    *,
    seqlens_kv,
    block_table=None,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
):
    """The arguments of `flashinfer_lite.append_kv`; the caches stay as they are.

    Returns:
        (params, k_cache, v_cache): what to launch, and the copies that it then writes to.
    """
    p = executor.module.AppendKvParams()
    batch_size, seqlen_new, num_heads_kv, head_dim = k.shape
    capacity = k_cache.shape[1]
    if block_table is not None:
        num_pages, page_size = k_cache.shape[:2]
        capacity = block_table.shape[1] * page_size
        x = memory.copy_of("block_table", block_table)
        p.set_block_table((x.data_ptr(), x.dtype == torch.int64, *x.stride()), num_pages, page_size)
    p.set_sizes(batch_size, seqlen_new, num_heads_kv, head_dim, v.shape[3], capacity)
    p.set_new(*(_strided(memory.copy_of(name, x)) for name, x in (("k", k), ("v", v))))
    caches = [
        memory.copy_of(name, x, writable=True)
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache))
    ]
    p.set_caches(*map(_strided, caches))
    used = memory.copy_of("seqlens_kv", seqlens_kv)
    p.set_seqlens_kv((used.data_ptr(), used.dtype == torch.int64, used.stride(0)))
    if rotary_cos is not None:
        cos, sin = memory.copy_of("cos", rotary_cos), memory.copy_of("sin", rotary_sin)
        rows = cos.data_ptr(), sin.data_ptr(), cos.stride(0), sin.stride(0)
        wide = cos.dtype == torch.float32
        p.set_rotary(*rows, cos.shape[0], 2 * cos.shape[1], wide, rotary_interleaved)
    return p, *caches


def _strided(x):
    return (x.data_ptr(), *x.stride()[:3])
