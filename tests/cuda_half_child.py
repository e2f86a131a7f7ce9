"""Loads the real `_C_cuda` into CPU-only torch, and prints as JSON what it registers and refuses.

A stub stands in for the few functions that only CUDA torch defines. It also says of every tensor
that it is on a CUDA device while `tensors_are_cuda` is set, so that the ops' own checks run on
tensors in host memory; calls that pass every check end where the driver is asked for the device.
test_cuda_half.py compiles the stub, runs this program, and judges.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

SCALARS = (0.25, 0.0, 1, -1, -1)
KEYS = ("CPU", "CUDA", "Meta", "CompositeExplicitAutograd")
WINDOW = ("window_left", "window_right")

STUB = r"""
#include <stdint.h>
#include <stddef.h>
int tensors_are_cuda = 0;
int (*offset_of)(void* tensor, int64_t* offset) = NULL;
static char guard;
int aoti_torch_get_device_type(void* tensor, int32_t* type) { *type = tensors_are_cuda; return 0; }
int aoti_torch_get_device_index(void* tensor, int32_t* index) {
  int64_t offset = 0;
  int error = offset_of(tensor, &offset);
  *index = offset == 1;
  return error;
}
int aoti_torch_create_device_guard(int32_t index, void** out) { *out = &guard; return 0; }
int aoti_torch_delete_device_guard(void* guard) { return 0; }
int aoti_torch_get_current_cuda_stream(int32_t index, void** out) { *out = NULL; return 0; }
int torch_c10_cuda_check_msg(int32_t e, const char* f, const char* n, uint32_t l, _Bool a,
                             char** out) { *out = NULL; return 0; }
void torch_c10_cuda_free_error_msg(char* text) {}
"""


def on_cuda_1(*shape, dtype=torch.float32):
    """A tensor with storage offset 1, which the stub takes for one on the second device."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + 1, dtype=dtype)[1:].view(shape)


def good():
    """Batch 2, 3 queries, 7 keys, 4 heads over 2, head_dim 16, head_dim_v 24."""
    q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((3, 4), (7, 2), (7, 2)))
    return {"q": q, "k": k, "v": torch.cat([v, v[..., :8]], -1)}


# Good ones of a ragged batch.
RAGGED = {name: x[0] for name, x in good().items()}
# name of a case -> (op, what differs from a good call, the error)
INT = torch.int32
REFUSALS = {
    "float64": (
        "attention_fwd",
        {n: t.double() for n, t in good().items()},
        "q: expected dtype float32, bfloat16 or float16 on CUDA, got float64",
    ),
    "dtypes": (
        "attention_fwd",
        {"k": good()["k"].half()},
        "k: expected dtype float32, got float16",
    ),
    "head_dim": (
        "attention_fwd",
        {"q": torch.zeros(2, 3, 4, 12), "k": torch.zeros(2, 7, 2, 12)},
        "q: expected head_dim a multiple of 8 in [8, 256], got 12",
    ),
    "heads": (
        "decode",
        {"q": torch.zeros(2, 3, 3, 16)},
        "q: expected num_heads a multiple of k's num_heads 2, got 3",
    ),
    "device of k": (
        "attention_fwd",
        {"k": on_cuda_1(2, 7, 2, 16)},
        "k: expected q's device cuda:0, got cuda:1",
    ),
    "device of mask": (
        "decode",
        {"mask": on_cuda_1(1, 1, 1, 7)},
        "mask: expected q's device cuda:0, got cuda:1",
    ),
    "device of lengths": (
        "attention_fwd",
        {"seqlens_kv": on_cuda_1(2, dtype=INT)},
        "seqlens_kv: expected q's device cuda:0, got cuda:1",
    ),
    "device of out": (
        "decode.out",
        {"out": on_cuda_1(2, 3, 4, 24)},
        "out: expected q's device cuda:0, got cuda:1",
    ),
    "device of lses": (
        "merge_states",
        {"lses": on_cuda_1(3, 2, 4, 3)},
        "lses: expected outs' device cuda:0, got cuda:1",
    ),
    "mask": (
        "attention_fwd",
        {"mask": torch.zeros(1, 1, 1, 6)},
        "mask: expected a shape that broadcasts to [2, 4, 3, 7], got [1, 1, 1, 6]",
    ),
    "lengths": (
        "decode",
        {"kv_start": torch.zeros(2, dtype=torch.int16)},
        "kv_start: expected dtype int32 or int64, got another dtype",
    ),
    "length of lengths": (
        "decode",
        {"kv_start": torch.zeros(3, dtype=INT)},
        "kv_start: expected shape [2], got [3]",
    ),
    "softcap": (
        "attention_fwd",
        {"softcap": -1.0},
        "softcap: expected a finite number > 0, or 0 for none, got -1",
    ),
    "kv_splits": (
        "decode",
        {"kv_splits": 5000},
        "kv_splits: expected 0 (automatic) to 4096, got 5000",
    ),
    "out": (
        "decode.out",
        {"out": torch.zeros(1, 3, 4, 24).expand(2, 3, 4, 24)},
        "out: expected its own memory for every element, got stride 0 in dimension 0",
    ),
    "lse": (
        "decode.out",
        {"lse": torch.zeros(2, 3, 4).mT},
        "lse: expected a contiguous tensor, got other strides",
    ),
    "states": (
        "merge_states",
        {"outs": torch.zeros(3, 2, 3, 4, 24).double()},
        "outs: expected dtype float32, bfloat16 or float16 on CUDA, got float64",
    ),
    "kernel": (
        "plan",
        {"kernel": "softmax"},
        "kernel: expected attention_fwd or decode, got softmax",
    ),
    "device of dout": (
        "attention_bwd",
        {"dout": on_cuda_1(2, 3, 4, 24)},
        "dout: expected q's device cuda:0, got cuda:1",
    ),
    "shape of dlse": (
        "attention_bwd",
        {"dlse": torch.zeros(2, 3, 4)},
        "dlse: expected shape [2, 4, 3], got [2, 3, 4]",
    ),
    "gradient of no mask": (
        "attention_bwd",
        {"wants_dmask": True},
        "wants_dmask: expected an additive mask to differentiate",
    ),
    "gradient of a shared mask": (
        "attention_bwd",
        {"wants_dmask": True, "mask": torch.zeros(1, 4, 3, 7), "deterministic": True},
        "deterministic: expected a mask of shape [2, 4, 3, 7] where wants_dmask is True, got "
        "[1, 4, 3, 7]",
    ),
    "pages of varlen": (
        "attention_varlen_fwd",
        {**RAGGED, "block_table": torch.zeros(2, 3, dtype=INT)},
        "block_table: expected none on CUDA, where Python's attention_varlen joins the pages",
    ),
    "ALiBi of varlen": (
        "attention_varlen_fwd",
        {**RAGGED, "alibi_slopes": torch.zeros(3)},
        "alibi_slopes: expected shape [4] or [2, 4], got [3]",
    ),
    "offsets": (
        "attention_varlen_fwd",
        {**RAGGED, "cu_seqlens_kv": torch.zeros(2, dtype=INT)},
        "cu_seqlens_kv: expected shape [3], got [2]",
    ),
    "device of offsets": (
        "attention_varlen_fwd",
        {**RAGGED, "cu_seqlens_q": on_cuda_1(3, dtype=INT)},
        "cu_seqlens_q: expected q's device cuda:0, got cuda:1",
    ),
    "shape of a ragged lse": (
        "attention_varlen_bwd",
        {**RAGGED, "dout": torch.zeros(3, 4, 24), "out": torch.zeros(3, 4, 24)},
        "lse: expected shape [4, 3], got [2, 4, 3]",
    ),
    "phi": (
        "decode",
        {"phi_heads": torch.zeros(3)},
        "phi_heads: expected shape [4], got [3]",
    ),
    "alibi": (
        "attention_fwd",
        {"alibi_slopes": torch.zeros(3)},
        "alibi_slopes: expected shape [4] or [2, 4], got [3]",
    ),
    "alibi backward": (
        "attention_bwd",
        {"alibi_slopes": torch.zeros(2, 4).double()},
        "alibi_slopes: expected dtype float32, got float64",
    ),
    "device of alibi_slopes": (
        "decode",
        {"alibi_slopes": on_cuda_1(4)},
        "alibi_slopes: expected q's device cuda:0, got cuda:1",
    ),
    "flat_linear": (
        "flat_linear",
        {"x": torch.zeros(5, 16), "kernel": "gemv"},
        "x: expected dtype bfloat16 or float16 on CUDA, got float32",
    ),
    # Good calls, on a machine without a device.
    "attention_fwd": ("attention_fwd", {}, "cuda:0: no device properties: "),
    "attention_bwd": ("attention_bwd", {}, "cuda:0: no device properties: "),
    "attention_varlen_fwd": (
        "attention_varlen_fwd",
        {**RAGGED, "cu_seqlens_q": torch.tensor([5, -1, 9])},
        "cuda:0: no device properties: ",
    ),
    "attention_varlen_bwd": (
        "attention_varlen_bwd",
        {
            **RAGGED,
            **{name: torch.zeros(3, 4, 24) for name in ("dout", "out")},
            "lse": torch.zeros(4, 3),
        },
        "cuda:0: no device properties: ",
    ),
    "decode": ("decode", {"seqlens_kv": torch.tensor([9, -9])}, "cuda:0: no device properties: "),
    "decode.out": ("decode.out", {"kv_splits": 3}, "cuda:0: no device properties: "),
    "merge_states": ("merge_states", {}, "cuda:0: no device properties: "),
    "plan": ("plan", {}, "cuda:0: no device properties: "),
    "unified": ("decode", {"phi": 2.0}, "cuda:0: no device properties: "),
    "gemv": (
        "flat_linear.out",
        {"kernel": "gemv", "out": torch.zeros(5, 24, dtype=torch.bfloat16)},
        "cuda:0: no device properties: ",
    ),
}


def arguments_of(schema, changes):
    call = {
        **good(),
        "k_cache": good()["k"],
        "v_cache": good()["v"],
        "mask": None,
        "kv_start": None,
        "seqlens_kv": None,
        **dict(zip(("softmax_scale", "softcap", "causal", *WINDOW), SCALARS, strict=True)),
        "kv_splits": 0,
        "batch_invariant": False,
        "out": torch.full((2, 3, 4, 24), torch.nan),
        "lse": torch.full((2, 4, 3), torch.nan),
        "dout": torch.zeros(2, 3, 4, 24),
        "dlse": None,
        "wants_dmask": False,
        "deterministic": False,
        "outs": torch.zeros(3, 2, 3, 4, 24),
        "lses": torch.zeros(3, 2, 4, 3),
        "kernel": "decode",
        "longest": 7,
        "phi": None,
        "phi_heads": None,
        "block_table": None,
        "alibi_slopes": None,
        "cu_seqlens_q": torch.tensor([0, 2, 3]),
        "cu_seqlens_kv": torch.tensor([0, 3, 7]),
        "max_seqlen_q": None,
        "max_seqlen_kv": None,
        "x": torch.zeros(5, 16, dtype=torch.bfloat16),
        "weight": torch.zeros(24, 16, dtype=torch.bfloat16),
        "bias": None,
        **changes,
    }
    return {argument.name: call[argument.name] for argument in schema.arguments}


class Child:
    """The process that has the stub."""

    def __init__(self, stub):
        self.stub = ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        offset_of = ctypes.cast(torch_cpu.aoti_torch_get_storage_offset, ctypes.c_void_p)
        ctypes.c_void_p.in_dll(self.stub, "offset_of").value = offset_of.value
        torch.version.cuda = "13.0"  # what decides whether the CUDA half is loaded

        import flashinfer_lite

        self.library = flashinfer_lite
        self.ops = torch.ops.flashinfer_lite

    def call(self, name, changes, tensors_are_cuda=True):
        """Call an op's CUDA kernel; returns its arguments and its result."""
        packet, _, overload = name.partition(".")
        op = getattr(getattr(self.ops, packet), overload or "default")
        arguments = arguments_of(op._schema, changes)
        flag = ctypes.c_int.in_dll(self.stub, "tensors_are_cuda")
        flag.value = tensors_are_cuda
        try:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            return arguments, op.redispatch(keys, **arguments)
        finally:
            flag.value = False

    def registered(self):
        """{op: [takes tensors, *its dispatch keys]}"""
        found = {}
        for name in torch._C._dispatch_get_all_op_names():
            if not name.startswith("flashinfer_lite::"):
                continue
            packet, _, overload = name.removeprefix("flashinfer_lite::").partition(".")
            schema = getattr(getattr(self.ops, packet), overload or "default")._schema
            takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            keys = [key for key in KEYS if has(name, key)]
            found[name.removeprefix("flashinfer_lite::")] = [takes_tensors, *keys]
        return found

    def refusals(self):
        refused = {}
        for name, (op, changes, _) in REFUSALS.items():
            try:
                self.call(op, changes)
                refused[name] = "nothing"
            except RuntimeError as error:
                refused[name] = str(error)
        try:
            self.call("decode", {}, tensors_are_cuda=False)
        except RuntimeError as error:
            refused["not on CUDA"] = str(error)
        return refused

    def without_keys(self):
        """{case: [shape of out, whether it is 0, shape of lse, whether it is -inf]}"""
        nothing = {"k": torch.zeros(2, 0, 2, 16), "v": torch.zeros(2, 0, 2, 24)}
        caches = {"k_cache": nothing["k"], "v_cache": nothing["v"]}
        states = {"outs": torch.zeros(0, 2, 3, 4, 24), "lses": torch.zeros(0, 2, 4, 3)}
        cases = {
            "attention_fwd": nothing,
            "attention_varlen_fwd": {"q": RAGGED["q"], **{n: x[0] for n, x in nothing.items()}},
            "decode": caches,
            "decode.out": {**caches, "out": torch.full((2, 4, 3, 24), torch.nan).transpose(1, 2)},
            "merge_states": states,
        }
        results = {}
        for op, changes in cases.items():
            arguments, result = self.call(op, changes)
            out, lse = result or (arguments["out"], arguments["lse"])
            results[op] = [
                list(out.shape),
                not out.any().item(),
                list(lse.shape),
                (lse == -torch.inf).all().item(),
            ]
        _, (out, lse) = self.call("attention_fwd", {"q": torch.zeros(2, 0, 4, 16)})
        results["no queries"] = [list(out.shape), True, list(lse.shape), True]
        return results

    def calls_counted(self):
        self.library.stats(reset=True)
        self.library.attention(**good())
        self.call("attention_fwd", {"q": torch.zeros(2, 0, 4, 16)})
        return [self.library.stats(reset=True).calls, self.library.stats().calls]

    def public_functions(self):
        """What the public functions do with fake CUDA tensors: a shape, or an error."""
        attention, decode = self.library.attention, self.library.decode

        def tensors(**options):
            return [torch.empty_like(x, device="cuda", **options) for x in good().values()]

        seen = {}
        with FakeTensorMode():
            calls = {
                "attention": lambda: attention(*tensors()),
                "sm80": lambda: attention(*tensors(), impl="sm80"),
                "decode": lambda: decode(*tensors(dtype=torch.bfloat16), kv_splits=2),
                "float64": lambda: attention(*tensors(dtype=torch.float64)),
                "no_grad": lambda: torch.no_grad()(attention)(*tensors(requires_grad=True)),
                "cpu": lambda: decode(*tensors(), impl="cpu"),
                "sm90": lambda: attention(*tensors(), impl="sm90"),
                "states": lambda: self.library.merge_states(
                    torch.empty(3, 2, 3, 4, 24, device="cuda", dtype=torch.float64),
                    torch.empty(3, 2, 4, 3, device="cuda", dtype=torch.float64),
                ),
            }
            for name, call in calls.items():
                try:
                    out = call()
                    seen[name] = f"{out.device} {list(out.shape)}"
                except Exception as error:
                    seen[name] = f"{type(error).__name__}: {error}"
        return seen

    def report(self):
        return {
            "status": self.library.cuda_status,
            "registered": self.registered(),
            "refusals": self.refusals(),
            "without_keys": self.without_keys(),
            "calls": self.calls_counted(),
            "public": self.public_functions(),
            "instances": self.ops.cuda_instances().split(),
        }


if __name__ == "__main__":
    print(json.dumps(Child(sys.argv[1]).report()))
