"""Hugging Face transformers: importing this module registers `attn_implementation="fi_lite"`,
`"flashinfer_lite"` and `"flashinfer_lite_fa2"`.

    import flashinfer_lite.hf
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fi_lite")
    model.generate(**inputs, past_key_values=flashinfer_lite.hf.Cache(config=model.config))

or, for a model that exists already, both in one call: `flashinfer_lite.hf.patch(model)`. See
docs/huggingface.md.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    text = 'flashinfer_lite.hf needs transformers: pip install "flashinfer-lite[hf]"'
    raise ModuleNotFoundError(text, name="transformers") from error

from flashinfer_lite.hf.attention import APPLIED, INERT, REFUSED, attention_forward
from flashinfer_lite.hf.cache import Cache
from flashinfer_lite.hf.linear import FlatLinear
from flashinfer_lite.hf.masks import key_mask
from flashinfer_lite.hf.patching import Patch, patch
from flashinfer_lite.hf.registration import BATCHING_NAME, FLASH_NAME, NAME, register

__all__ = [
    "APPLIED",
    "BATCHING_NAME",
    "FLASH_NAME",
    "INERT",
    "NAME",
    "REFUSED",
    "Cache",
    "FlatLinear",
    "Patch",
    "attention_forward",
    "key_mask",
    "patch",
    "register",
]

register()
