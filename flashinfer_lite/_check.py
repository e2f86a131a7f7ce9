"""Argument checks of the public functions. Each message: argument, what is wanted, what came."""

import math
import os

import torch
from torch.autograd import forward_ad

from flashinfer_lite import _ops

CAUSAL = {False: 0, True: 1, "bottom_right": 1, "top_left": 2}
ELEMENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = ELEMENT_DTYPES[1:]
MAX_HEAD_DIM = 256


def not_landed(dropout_p=0.0, **arguments):
    """Refuse arguments that exist in the signature but have no kernel yet."""
    if dropout_p != 0:
        arguments["dropout_p"] = dropout_p
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not implemented yet, got {_short(value)}")


def _short(value):
    return f"a tensor of shape {list(value.shape)}" if torch.is_tensor(value) else repr(value)


def tensor(name, x):
    if not torch.is_tensor(x):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def qkv(q, k, v, names=("q", "k", "v"), ragged=False, paged=False):
    """Types, shapes, dtypes, devices and strides of the three tensors. Of a ragged batch they are
    [total, num_heads, head_dim]; paged: k and v are [num_pages, page_size, num_heads, head_dim],
    of a ragged batch too."""
    for name, x in zip(names, (q, k, v), strict=True):
        tensor(name, x)
        dims, layout = (3, "[total") if ragged else (4, "[batch, seqlen")
        if paged and name != names[0]:
            dims, layout = 4, "[num_pages, page_size"
        if x.dim() != dims:
            raise ValueError(
                f"{name}: expected {dims} dimensions {layout}, num_heads, head_dim], "
                f"got shape {list(x.shape)}"
            )
        if x.dtype not in ELEMENT_DTYPES:
            raise TypeError(
                f"{name}: expected dtype float64, float32, bfloat16 or float16, got {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
        if x.shape[-1] % 8 or not 8 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: expected head_dim a multiple of 8 in [8, {MAX_HEAD_DIM}], "
                f"got {x.shape[-1]}"
            )
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected the last dimension contiguous (stride 1), got stride "
                f"{x.stride(-1)}"
            )
    num_heads_q, num_heads_kv = q.shape[-2], k.shape[-2]
    wanted = [*(k if paged else q).shape[:-3], *k.shape[-3:-1], q.shape[-1]]
    if list(k.shape) != wanted:
        raise ValueError(f"{names[1]}: expected shape {wanted} to fit q, got {list(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{names[2]}: expected shape {[*wanted[:-1], 'head_dim_v']} like {names[1]}, "
            f"got {list(v.shape)}"
        )
    if num_heads_q % num_heads_kv if num_heads_kv else num_heads_q:
        raise ValueError(
            f"q: expected num_heads a multiple of {names[1]}'s num_heads {num_heads_kv}, "
            f"got {num_heads_q}"
        )


def scores(q, causal, window, softmax_scale, softcap):
    """(softmax_scale, softcap, causal, window_left, window_right) as the ops take them."""
    if not isinstance(causal, (bool, str)) or causal not in CAUSAL:
        raise ValueError(
            f"causal: expected False, True, 'bottom_right' or 'top_left', got {causal!r}"
        )
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(
            f"window: expected (left, right), each >= 0 or -1 for open, got {window!r}"
        )
    for side in window:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window: expected integers, got {window!r}")
        if side < -1:
            raise ValueError(f"window: expected each side >= 0 or -1 for open, got {window!r}")
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    elif not finite(number("softmax_scale", softmax_scale)):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale!r}")
    if softcap is None:
        softcap = 0.0
    elif not (number("softcap", softcap) > 0 and finite(softcap)):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap!r}")
    return float(softmax_scale), float(softcap), CAUSAL[causal], window[0], window[1]


def unified(softmax, phi, q):
    """(phi, phi_heads) as the ops take them; both None for the online softmax."""
    choice("softmax", softmax, ("auto", "online", "unified"))
    if phi is None:
        return (0.0 if softmax == "unified" else None), None
    if softmax == "online":
        raise ValueError("phi: expected None with softmax='online', got one")
    if not torch.is_tensor(phi):
        if not finite(number("phi", phi, "a number or a float32 tensor [num_heads_q]")):
            raise ValueError(f"phi: expected a finite number, got {phi!r}")
        return float(phi), None
    if phi.dtype != torch.float32:
        raise TypeError(f"phi: expected dtype float32, got {phi.dtype}")
    if phi.shape != q.shape[-2:-1]:
        raise ValueError(
            f"phi: expected a number or shape [{q.shape[-2]}] (num_heads_q), got {list(phi.shape)}"
        )
    if phi.device != q.device:
        raise ValueError(f"phi: expected q's device {q.device}, got {phi.device}")
    return None, phi.detach().contiguous()


def finite(x):
    """math.isfinite, also of the symbolic numbers of torch.compile."""
    return -math.inf < x < math.inf


def number(name, x, wanted="a number"):
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected {wanted}, got {type(x).__name__}")
    return x


def lengths(name, x, like, batch_size, whose="q's"):
    if x is None:
        return
    _integers(name, x, like, whose)
    if x.shape != (batch_size,):
        raise ValueError(f"{name}: expected shape [{batch_size}] (batch), got {list(x.shape)}")


def offsets(cu_seqlens_q, cu_seqlens_kv, q):
    """Where the sequences of a ragged batch begin, as far as that shows without reading it."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        _integers(name, x, q)
        if x.dim() != 1 or x.shape[0] == 0:
            raise ValueError(f"{name}: expected shape [batch + 1], got {list(x.shape)}")
    if cu_seqlens_kv.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_kv: expected shape {list(cu_seqlens_q.shape)} like cu_seqlens_q, "
            f"got {list(cu_seqlens_kv.shape)}"
        )


def _integers(name, x, like, whose="q's"):
    tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected {whose} device {like.device}, got {x.device}")


def max_seqlen(name, x):
    if x is None:
        return
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected None or an integer, got {type(x).__name__}")
    if x < 0:
        raise ValueError(f"{name}: expected None or an integer >= 0, got {x}")


def block_table(x, like, k, batch_size, whose="q's"):
    """The table of a paged cache, whose k is [num_pages, page_size, ...]."""
    if x is None:
        return
    _integers("block_table", x, like, whose)
    if x.dim() != 2 or x.shape[0] != batch_size:
        raise ValueError(
            f"block_table: expected shape [{batch_size}, pages] (batch first), got {list(x.shape)}"
        )
    if k.shape[1] == 0:
        raise ValueError(f"block_table: expected pages of 1 slot or more, got {list(k.shape)}")


def mask(x, q, seqlen_kv):
    """The mask with four dimensions, as the ops take it: a view."""
    if x is None:
        return None
    tensor("mask", x)
    if x.dtype != torch.bool and x.dtype not in ELEMENT_DTYPES:
        raise TypeError(f"mask: expected dtype bool or floating point, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"mask: expected q's device {q.device}, got {x.device}")
    full = (q.shape[0], q.shape[2], q.shape[1], seqlen_kv)
    if not 1 <= x.dim() <= 4 or any(
        size not in (1, want) for size, want in zip(x.shape, full[4 - x.dim() :], strict=True)
    ):
        raise ValueError(
            f"mask: expected a shape that broadcasts to {list(full)} "
            f"(batch, num_heads_q, seqlen_q, seqlen_kv), got {list(x.shape)}"
        )
    return x[(None,) * (4 - x.dim())]


def sink(x, q):
    if x is None:
        return
    tensor("sink", x)
    if x.dtype not in ELEMENT_DTYPES:
        raise TypeError(
            f"sink: expected dtype float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    if x.device != q.device:
        raise ValueError(f"sink: expected q's device {q.device}, got {x.device}")
    if x.shape != (q.shape[-2],):
        raise ValueError(f"sink: expected shape [{q.shape[-2]}] (num_heads_q), got {list(x.shape)}")


def alibi_slopes(x, q, batch_size):
    if x is None:
        return
    tensor("alibi_slopes", x)
    if x.dtype != torch.float32:
        raise TypeError(f"alibi_slopes: expected dtype float32, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"alibi_slopes: expected q's device {q.device}, got {x.device}")
    num_heads = q.shape[-2]
    if x.shape not in ((num_heads,), (batch_size, num_heads)):
        raise ValueError(
            f"alibi_slopes: expected shape [{num_heads}] (num_heads_q) or "
            f"[{batch_size}, {num_heads}] (batch, num_heads_q), got {list(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "alibi_slopes: expected a tensor that does not require grad, got one that does: no "
            "gradient reaches it but in reference.attention; detach() it"
        )


def choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def under_autocast(*tensors):
    """The tensors as autocast wants them: fp64 stays, other floating dtypes become its dtype."""
    if not all(torch.is_tensor(x) for x in tensors):
        return tensors  # the checks that follow name the culprit
    device = tensors[0].device.type
    # Autocast knows no device such as "meta", and says so with an error.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in ELEMENT_DTYPES[1:] else x for x in tensors)


def impl(value, q):
    """Whether the reference runs instead of the kernel of q's device."""
    if value == "sm90":
        raise NotImplementedError("impl: not implemented yet, got 'sm90'; 'sm80' runs there")
    choice("impl", value, ("auto", "reference", "cpu", "sm80"))
    for name, device in (("cpu", "cpu"), ("sm80", "cuda")):
        if value == name and q.device.type != device:
            raise ValueError(f"impl: {name!r} expects {device.upper()} tensors, got {q.device}")
    if value == "reference":
        return True
    native("q", q, "; impl='reference' runs there")
    return False


def native(name, x, otherwise=""):
    """Whether this installation has kernels for x's device and dtype; `otherwise` ends the text."""
    if not _ops.built:
        raise RuntimeError(_ops.NOT_BUILT)
    if x.device.type != "cuda":
        return
    if _ops.cuda_status != "loaded":
        way_out = f"; {_ops.cuda_way_out}" if _ops.cuda_way_out else ""
        raise RuntimeError(
            f"{name}: expected the CUDA half for a tensor on {x.device}, got: "
            f"{_ops.cuda_status}{way_out}{otherwise}"
        )
    if x.dtype not in CUDA_DTYPES:
        raise TypeError(
            f"{name}: expected dtype float32, bfloat16 or float16 on CUDA, got {x.dtype}{otherwise}"
        )


def wants_values(q):
    """On CUDA a check would wait for the device, so it must be asked for."""
    if torch.is_tensor(q) and q.is_cuda:
        return compares_values() and not torch.cuda.is_current_stream_capturing()
    return True


def compares_values():
    return os.environ.get("FLASHINFER_LITE_CHECK") == "1"


def no_grad(op, **tensors):
    """Refuse inputs of inference that require grad, while grad mode is on."""
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise RuntimeError(
                f"{name}: {op} is for inference and got a tensor that requires grad; "
                "use attention to train, or torch.no_grad()"
            )


def no_forward_ad(op, otherwise, **tensors):
    """Refuse tangents, which the op would drop without a word; `otherwise` ends the text."""
    if forward_ad._current_level < 0:
        return
    for name, x in tensors.items():
        if x is not None and _has_tangent(x):
            raise NotImplementedError(
                f"{name}: expected a tensor without a tangent, got one: {op} has no "
                f"forward-mode AD (torch.autograd.forward_ad, torch.func.jvp){otherwise}"
            )


def _has_tangent(x):
    """Whether x is a dual tensor, under whatever transforms of torch.func it is wrapped in."""
    wrappers = torch._C._functorch
    while wrappers.is_batchedtensor(x) or forward_ad.unpack_dual(x).tangent is None:
        if not wrappers.is_functorch_wrapped_tensor(x):
            return False
        x = wrappers.get_unwrapped(x)
    return True
