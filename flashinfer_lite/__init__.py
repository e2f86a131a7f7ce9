"""Attention kernels for PyTorch that can be installed in minutes, read in an hour and trusted.

>>> import torch, flashinfer_lite
>>> q, k, v = (torch.randn(1, 128, 8, 64) for _ in range(3))
>>> out = flashinfer_lite.attention(q, k, v, causal=True)
"""

from flashinfer_lite._introspect import explain, stats
from flashinfer_lite._ops import built, cuda_status
from flashinfer_lite.append import append_kv
from flashinfer_lite.attention import attention
from flashinfer_lite.decode import decode, merge_states
from flashinfer_lite.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashinfer_lite.gemm import flat_linear
from flashinfer_lite.sdpa import scaled_dot_product_attention
from flashinfer_lite.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "append_kv",
    "attention",
    "attention_varlen",
    "built",
    "cuda_status",
    "decode",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flat_linear",
    "merge_states",
    "scaled_dot_product_attention",
    "stats",
]
