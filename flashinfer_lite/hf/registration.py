"""Registers the attention function and its mask function under two names.

"fi_lite" needs public API only. transformers branches on the substrings flash, sdpa, flex and eager
of a name, so this one contains none of them. "flashinfer_lite" contains "flash", which continuous
batching asks for: transformers then wants to import a flash-attn package of that name, and one
private function has to be told where it is.
"""

import functools

import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AttentionInterface, AttentionMaskInterface

import flashinfer_lite
from flashinfer_lite.hf.attention import attention_forward
from flashinfer_lite.hf.masks import key_mask

NAME = "fi_lite"
FLASH_NAME = "flashinfer_lite"


def register() -> None:
    """Register both names with transformers; a second call changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)
    supported = _install_hook()
    AttentionInterface.register(FLASH_NAME, attention_forward if supported else _unsupported)
    AttentionMaskInterface.register(FLASH_NAME, key_mask if supported else _unsupported)


def _install_hook() -> bool:
    """Teach transformers where FLASH_NAME's functions are; False if its loader is missing."""
    names = ("_lazy_imports", "_pad_input", "_unpad_input")
    inner, pad, unpad = (getattr(flash_utils, name, None) for name in names)
    if inner is None or pad is None or unpad is None:
        return False
    if getattr(inner, "_flashinfer_lite_hook", False):
        return True

    @functools.wraps(inner)
    def _lazy_imports(implementation, *args, **kwargs):
        if implementation is not None and implementation.removeprefix("paged|") == FLASH_NAME:
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
        f"this version of transformers cannot use the name {FLASH_NAME!r} (its flash-attention "
        f"loader has changed); use attn_implementation={NAME!r}, which runs the same kernels"
    )
