"""The contract: every op's schema, its fake kernel, and autograd for the ops that train.

Native kernels register themselves when their library is loaded; the Python functions above them
validate, fill in defaults and call these ops positionally.
"""

from pathlib import Path

import torch

_HERE = Path(__file__).parent
NOT_BUILT = (
    'flashinfer_lite is not built: run "make build" '
    "(or: pip install --no-build-isolation --no-deps -e .)"
)

# Schemas. causal: 0 none, 1 bottom_right, 2 top_left. softcap 0 is off. A window of -1 is open.
# phi or phi_heads (never both) is the unified maximum; neither is the online softmax.
_LENGTHS = "Tensor? kv_start, Tensor? seqlens_kv"
_INPUTS = f"Tensor? mask, {_LENGTHS}"
_RAGGED = f"Tensor cu_seqlens_q, Tensor cu_seqlens_kv, {_LENGTHS}"
_SCORES = "float softmax_scale, float softcap, int causal, int window_left, int window_right"
_PHI = "float? phi=None, Tensor? phi_heads=None"
_PAGED = f"{_PHI}, Tensor? block_table=None"
# float32 [num_heads_q] or [batch, num_heads_q]; it gets no gradient.
_ALIBI = "Tensor? alibi_slopes=None"
# On CUDA the gradients' bits differ from run to run without it.
_DETERMINISTIC = "bool deterministic=False"
SCHEMAS = {
    "attention_fwd": f"(Tensor q, Tensor k, Tensor v, {_INPUTS}, {_SCORES}, {_PHI}, "
    f"{_DETERMINISTIC}, {_ALIBI}) -> (Tensor, Tensor)",
    "attention_bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_INPUTS}, {_SCORES}, bool wants_dmask, {_DETERMINISTIC}, "
    f"{_ALIBI}) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_varlen_fwd": f"(Tensor q, Tensor k, Tensor v, {_RAGGED}, {_SCORES}, "
    f"SymInt? max_seqlen_q, SymInt? max_seqlen_kv, {_PAGED}, {_ALIBI}, {_DETERMINISTIC}) "
    "-> (Tensor, Tensor)",
    "attention_varlen_bwd": "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_RAGGED}, {_SCORES}, {_ALIBI}, {_DETERMINISTIC}) "
    "-> (Tensor, Tensor, Tensor)",
    "decode": f"(Tensor q, Tensor k_cache, Tensor v_cache, {_INPUTS}, {_SCORES}, int kv_splits, "
    f"bool batch_invariant, {_PAGED}, {_ALIBI}) -> (Tensor, Tensor)",
    "decode.out": f"(Tensor q, Tensor k_cache, Tensor v_cache, {_INPUTS}, {_SCORES}, "
    f"int kv_splits, bool batch_invariant, Tensor(a!) out, Tensor(b!) lse, {_PAGED}, {_ALIBI}) "
    "-> ()",
    "merge_states": "(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    "append_kv": "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor seqlens_kv, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved) -> ()",
    "flat_linear": "(Tensor x, Tensor weight, Tensor? bias, str kernel) -> Tensor",
    "flat_linear.out": "(Tensor x, Tensor weight, Tensor? bias, str kernel, Tensor(a!) out) -> ()",
    "plan": "(Tensor q, Tensor k, Tensor v, str kernel, int longest, int kv_splits, "
    "bool batch_invariant) -> Tensor",
    "cpu_isa": "(str? name=None) -> str",
    "cpu_isas": "(bool with_tests=False) -> str",
    "stats": "(bool reset=False) -> Tensor",
    # Of the CUDA half, whose absence leaves them without a kernel.
    "cuda_version_error": "() -> str",
    "cuda_instances": "() -> str",
    "cuda_stats": "(bool reset=False) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"flashinfer_lite::{_name}", _schema)


def _load(stem: str) -> str | None:
    """Load a native library of the package; None, or why it is not there."""
    path = _HERE / f"{stem}.abi3.so"
    if not path.exists():
        return "not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"failed to load: {error}"
    return None


_namespace = torch.ops.flashinfer_lite
_cpu_error = _load("_C_cpu")
built = _cpu_error is None
# Registration is wanted for export and fake tensors too, so torch's build decides, not a device.
_cuda_error = "torch without CUDA" if torch.version.cuda is None else _load("_C_cuda")
cuda_status = _cuda_error or _namespace.cuda_version_error.default() or "loaded"
# How to get a CUDA half; a driver that is too old says it in its status.
cuda_way_out = ""
if _cuda_error is not None:
    cuda_way_out = (
        f"{'install a torch with CUDA, then ' if torch.version.cuda is None else ''}"
        'run "make build CUDA=1" (without nvcc: CUDA=pip) or reinstall the package where nvcc is'
    )

if not built:

    def _not_built(*args, **kwargs):
        raise RuntimeError(NOT_BUILT if _cpu_error == "not built" else f"_C_cpu {_cpu_error}")

    for _name in (name for name in SCHEMAS if not name.startswith("cuda_")):
        torch.library.impl(f"flashinfer_lite::{_name}", "CompositeExplicitAutograd")(_not_built)

attention_fwd = _namespace.attention_fwd.default
attention_bwd = _namespace.attention_bwd.default
attention_varlen_fwd = _namespace.attention_varlen_fwd.default
attention_varlen_bwd = _namespace.attention_varlen_bwd.default
decode = _namespace.decode.default
decode_out = _namespace.decode.out
plan = _namespace.plan.default
merge_states = _namespace.merge_states.default
append_kv = _namespace.append_kv.default
flat_linear = _namespace.flat_linear.default
flat_linear_out = _namespace.flat_linear.out


def stats(reset: bool) -> list[int]:
    """[calls, rows_checked, rows_recomputed], summed over both halves."""
    counted = _namespace.stats.default(reset)
    if _cuda_error is None:
        counted += _namespace.cuda_stats.default(reset)
    return counted.tolist()


def cuda_instances() -> list[str]:
    """The compiled CUDA kernels, in the order that plan counts them."""
    return _namespace.cuda_instances.default().split()


def cpu_isa() -> str:
    """The CPU level in force: baseline, avx2, avx512, avx512-bf16 or amx."""
    return _namespace.cpu_isa.default()


def cpu_isas(with_tests: bool = False) -> list[str]:
    """The CPU levels that are compiled in and that this processor has, ascending; behind them, if
    asked for, those that are there for tests alone."""
    return _namespace.cpu_isas.default(with_tests).split()


def set_cpu_isa(name: str | None) -> None:
    """Force a CPU level for this process; None goes back to the default choice."""
    _namespace.cpu_isa.default(name or "")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What lse and sums are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _one_device(*tensors):
    """A meta tensor among real ones is dispatched to the fake, which would return empty memory."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise RuntimeError(f"expected all tensors on one device, got {sorted(map(str, devices))}")


def _tensors(arguments):
    return [x for x in arguments if torch.is_tensor(x)]


def _fake_attention(q, v, *others):
    _one_device(q, v, *others)
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    out = q.new_empty(batch_size, seqlen_q, num_heads_q, v.shape[-1])
    lse = q.new_empty(batch_size, num_heads_q, seqlen_q, dtype=accumulator_dtype(q.dtype))
    return out, lse


@torch.library.register_fake("flashinfer_lite::attention_fwd")
def _(q, k, v, mask, kv_start, seqlens_kv, *rest):
    return _fake_attention(q, v, k, mask, kv_start, seqlens_kv, *_tensors(rest))


@torch.library.register_fake("flashinfer_lite::attention_varlen_fwd")
def _(q, k, v, cu_seqlens_q, cu_seqlens_kv, *rest):
    _one_device(q, k, v, cu_seqlens_q, cu_seqlens_kv, *_tensors(rest))
    total_q, num_heads_q, _ = q.shape
    out = q.new_empty(total_q, num_heads_q, v.shape[-1])
    return out, q.new_empty(num_heads_q, total_q, dtype=accumulator_dtype(q.dtype))


@torch.library.register_fake("flashinfer_lite::attention_varlen_bwd")
def _(dout, dlse, q, k, v, *rest):
    _one_device(dout, dlse, q, k, v, *_tensors(rest))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("flashinfer_lite::decode")
def _(q, k_cache, v_cache, mask, kv_start, seqlens_kv, *rest):
    return _fake_attention(q, v_cache, k_cache, mask, kv_start, seqlens_kv, *_tensors(rest))


@torch.library.register_fake("flashinfer_lite::decode.out")
def _(q, k_cache, v_cache, mask, kv_start, seqlens_kv, *rest):
    _one_device(q, k_cache, v_cache, mask, kv_start, seqlens_kv, *_tensors(rest))


@torch.library.register_fake("flashinfer_lite::plan")
def _(q, k, v, *rest):
    _one_device(q, k, v)
    return torch.empty(4, dtype=torch.int64, device="cpu")


@torch.library.register_fake("flashinfer_lite::merge_states")
def _(outs, lses):
    _one_device(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


@torch.library.register_fake("flashinfer_lite::append_kv")
def _(k_cache, v_cache, k, v, seqlens_kv, *rest):
    _one_device(k_cache, v_cache, k, v, seqlens_kv, *_tensors(rest))


@torch.library.register_fake("flashinfer_lite::flat_linear")
def _(x, weight, bias, kernel):
    _one_device(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("flashinfer_lite::flat_linear.out")
def _(x, weight, bias, kernel, out):
    _one_device(x, weight, bias, out)


@torch.library.register_fake("flashinfer_lite::attention_bwd")
def _(dout, dlse, q, k, v, out, lse, mask, kv_start, seqlens_kv, *rest):
    _one_device(dout, dlse, q, k, v, out, lse, mask, kv_start, seqlens_kv, *_tensors(rest))
    wants_dmask = rest[5]
    dmask = mask.new_empty(mask.shape, dtype=lse.dtype) if wants_dmask else lse.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask


def _save_attention(ctx, inputs, output):
    # lse is true whatever the softmax stood on: the backward does not see phi.
    q, k, v, mask, kv_start, seqlens_kv, *scalars = inputs[:11]
    ctx.deterministic, alibi_slopes = inputs[13:]
    ctx.save_for_backward(q, k, v, mask, kv_start, seqlens_kv, alibi_slopes, *output)
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)


def _as_read(dout, dlse, out):
    """The gradients of out and lse as the backward reads them; one of them is there."""
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:  # the gradient of a sum is one number, expanded
        dout = dout.contiguous()
    return dout, None if dlse is None else dlse.contiguous()


def _attention_backward(ctx, dout, dlse):
    q, k, v, mask, kv_start, seqlens_kv, alibi_slopes, out, lse = ctx.saved_tensors
    none = [None] * 12  # of the inputs from mask on
    if dout is None and dlse is None:
        return None, None, None, *none
    dout, dlse = _as_read(dout, dlse, out)
    wants_dmask = mask is not None and ctx.needs_input_grad[3]
    shape = mask.shape if wants_dmask else None
    deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
    if wants_dmask and deterministic and q.device.type == "cuda":
        # Rows that share an element of the mask would add to it in any order.
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    inputs = dout, dlse, q, k, v, out, lse, mask, kv_start, seqlens_kv
    options = wants_dmask, deterministic, alibi_slopes
    dq, dk, dv, dmask = attention_bwd(*inputs, *ctx.scalars, *options)
    if not wants_dmask:
        return dq, dk, dv, *none
    return dq, dk, dv, dmask.sum_to_size(shape).to(mask.dtype), *none[1:]


torch.library.register_autograd(
    "flashinfer_lite::attention_fwd", _attention_backward, setup_context=_save_attention
)


def _save_varlen(ctx, inputs, output):
    block_table, alibi_slopes, deterministic = inputs[-3:]
    if block_table is not None:
        raise RuntimeError(
            "block_table: expected None with inputs that require grad: pages are for inference"
        )
    ctx.save_for_backward(*inputs[:7], alibi_slopes, *output)
    ctx.scalars = inputs[7:12]
    ctx.deterministic = bool(deterministic)
    ctx.set_materialize_grads(False)


def _varlen_backward(ctx, dout, dlse):
    q, k, v, *offsets, alibi_slopes, out, lse = ctx.saved_tensors
    none = [None] * 16  # of the inputs from cu_seqlens_q on
    if dout is None and dlse is None:
        return None, None, None, *none
    dout, dlse = _as_read(dout, dlse, out)
    deterministic = ctx.deterministic or torch.are_deterministic_algorithms_enabled()
    inputs = dout, dlse, q, k, v, out, lse, *offsets
    return *attention_varlen_bwd(*inputs, *ctx.scalars, alibi_slopes, deterministic), *none


torch.library.register_autograd(
    "flashinfer_lite::attention_varlen_fwd", _varlen_backward, setup_context=_save_varlen
)


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "flashinfer_lite has no second derivative: use reference.attention for double backward"
    )


for _name in ("attention_bwd", "attention_varlen_bwd"):
    torch.library.register_autograd(f"flashinfer_lite::{_name}", _refuse_double_backward)


def _save_merge(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _merge_backward(ctx, dout, dlse):
    # out = sum_s w_s out_s and lse = log sum_s exp(lse_s), with w_s = exp(lse_s - lse).
    outs, lses, out, lse = ctx.saved_tensors
    empty = lses == -torch.inf
    weight = torch.where(empty, 0.0, (lses - lse).exp())
    rows = weight.transpose(-1, -2).unsqueeze(-1)  # [num_states, batch, seqlen_q, num_heads_q, 1]
    douts = torch.where(rows == 0, 0.0, rows * dout).to(outs.dtype)
    towards = ((outs.to(lses.dtype) - out) * dout).sum(-1).transpose(-1, -2)
    dlses = torch.where(empty, 0.0, weight * (dlse + towards))
    return douts, dlses


torch.library.register_autograd(
    "flashinfer_lite::merge_states", _merge_backward, setup_context=_save_merge
)
