"""Registers the attention function and its mask function under three names.

"fi_lite" needs public API only. transformers branches on the substrings flash, sdpa, flex and eager
of a name, so this one contains none of them. "flashinfer_lite" contains "flash", which continuous
batching asks for, and "flashinfer_lite_fa2" also the 2 that its decode path over pages asks for on
CUDA. For these transformers wants to import a flash-attn package of that name, and one private
function has to be told where it is.
"""

import functools

import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AttentionInterface, AttentionMaskInterface

import flashinfer_lite
from flashinfer_lite.hf.attention import attention_forward
from flashinfer_lite.hf.masks import key_mask

NAME = "fi_lite"
FLASH_NAME = "flashinfer_lite"
BATCHING_NAME = "flashinfer_lite_fa2"
_HOOKED = (FLASH_NAME, BATCHING_NAME)


def register() -> None:
    """Register the names with transformers; a second call changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)
    supported = _install_hook()
    for name in _HOOKED:
        AttentionInterface.register(name, attention_forward if supported else _unsupported)
        AttentionMaskInterface.register(name, key_mask if supported else _unsupported)


def _install_hook() -> bool:
    """Teach transformers where the functions of _HOOKED are; False if its loader is missing."""
    names = ("_lazy_imports", "_pad_input", "_unpad_input")
    inner, pad, unpad = (getattr(flash_utils, name, None) for name in names)
    if inner is None or pad is None or unpad is None:
        return False
    if getattr(inner, "_flashinfer_lite_hook", False):
        return True

    @functools.wraps(inner)
    def _lazy_imports(implementation, *args, **kwargs):
        if implementation is not None and implementation.removeprefix("paged|") in _HOOKED:
            return (
                flashinfer_lite.flash_attn_func,
                flashinfer_lite.flash_attn_varlen_func,
                flashinfer_lite.flash_attn_with_kvcache,
                pad,
                unpad,
            )
        return inner(implementation, *args, **kwargs)

    _lazy_imports._flashinfer_lite_hook = True
    flash_utils._lazy_imports = _lazy_imports
    return True


def _unsupported(*args, **kwargs):
    raise RuntimeError(
        f"this version of transformers cannot use the names {_HOOKED} (its flash-attention loader "
        f"has changed); use attn_implementation={NAME!r}, which runs the same kernels"
    )
