"""CUDA tensors and GPUs for the CUDA ops on a machine that has neither.

`make simt` compiles the ops of csrc/ops/*_cuda.cpp with the kernels on the executor and a made-up
CUDA runtime (csrc/simt/fake_cuda). A CudaTensor is host memory that says it is on a CUDA device;
an op that gets one runs its CUDA kernel, in a session of the executor, on guarded memory.

Only for a process that `start` started: the package loads its CUDA half once, when imported.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import flashinfer_lite

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "simt" / f"_C_cuda_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def start(folder, program):
    """A Python process whose flashinfer_lite, in `folder`, has our library as its CUDA half."""
    if not LIBRARY.exists():
        raise RuntimeError(
            f"the CUDA ops are not built for the executor ({LIBRARY}): run make simt"
        )
    package = Path(folder) / "flashinfer_lite"
    package.mkdir()
    for path in (ROOT / "flashinfer_lite").iterdir():
        if not path.name.startswith("_C_cuda"):
            (package / path.name).symlink_to(path)
    (package / "_C_cuda.abi3.so").symlink_to(LIBRARY)
    # torch's version decides whether the package loads its CUDA half.
    program = f"import torch; torch.version.cuda = '13.0'; {program}"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,  # where -c looks for modules first
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "FLASHINFER_LITE_CHECK": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def guarded(module, shape, dtype):
    """Contiguous and NaN all over, before an unmapped page."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = torch.frombuffer(module.GuardedBuffer(nbytes), dtype=torch.uint8, count=nbytes)
    return memory.view(dtype).view(shape)


class CudaTensor(torch.Tensor):
    """Says that it is on a CUDA device; `memory` is the tensor with the data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, gpus, memory, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), dtype=memory.dtype, device=device
        )

    def __init__(self, gpus, memory, device):
        self.gpus, self.memory = gpus, memory

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, CudaTensor)]
        gpus, device = tensors[0].gpus, tensors[0].device
        memory, options = tree_map_only(CudaTensor, lambda x: x.memory, (args, kwargs or {}))
        if op.namespace == "flashinfer_lite":
            places = {x.memory.data_ptr(): x.device.index for x in tensors}
            result = gpus.run(op, memory, options, places)
        else:
            result = op(*memory, **options)
        if op is torch.ops.aten._to_copy.default and options.get("device") == torch.device("cpu"):
            return result
        if op.name() == "flashinfer_lite::plan":  # for the host
            return result
        return tree_map_only(torch.Tensor, lambda x: cls(gpus, x, device), result)


class Allocations(TorchDispatchMode):
    """What an op asks of torch while it runs; new tensors come from guarded memory."""

    def __init__(self, module, session):
        super().__init__()
        self.module, self.session = module, session
        self.asked = []  # names of ops

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.asked.append(op.name())
        zeros = op is torch.ops.aten.new_zeros.default
        if zeros or op is torch.ops.aten.new_empty.default:
            like, shape = args
            dtype = kwargs.get("dtype") or like.dtype
        elif op is torch.ops.aten.empty_strided.default:
            shape, strides = args
            dtype = kwargs["dtype"]
            assert torch.empty_strided(shape, strides, device="meta").is_contiguous()
        else:
            return op(*args, **kwargs)
        memory = guarded(self.module, shape, dtype)
        name = f"{op.overloadpacket.__name__} {len(self.asked)}"
        self.session.register_buffer(memory.data_ptr(), memory.nbytes, name, True, zeros)
        return memory.zero_() if zeros else memory


class Gpus:
    """The machine of this process.

    Attributes:
        machine: devices, streams, errors and launches: FakeCuda of csrc/simt/fake_cuda.
        asked: names of the torch ops that the last op called.
    """

    def __init__(self):
        assert flashinfer_lite.cuda_status == "loaded", flashinfer_lite.cuda_status
        spec = importlib.util.spec_from_file_location("_C_cuda_simt", LIBRARY)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.machine = self.module.machine
        self.asked = []

    def put(self, x, device="cuda:0"):
        """A copy with the same strides, in guarded memory that ends where x ends."""
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = guarded(self.module, (span if x.numel() else 0,), x.dtype)
        if x.numel():
            memory.copy_(torch.as_strided(x, (span,), (1,)))
        return CudaTensor(self, torch.as_strided(memory, x.shape, x.stride()), device)

    def run(self, op, args, kwargs, places):
        """An op's CUDA kernel; fails on whatever the executor finds."""
        self.machine.tensors = places
        self.machine.launches = []
        session = self.module.Session(seed=1)
        self.register(session, op, args)
        with session, Allocations(self.module, session) as allocations:
            result = op.redispatch(KEYS, *args, **kwargs)
        self.asked = allocations.asked
        report = session.report()
        assert not report.errors, report.errors
        if self.machine.launch_error == 0:
            assert report.totals["launches"] == len(self.machine.launches)
        return result

    @staticmethod
    def register(session, op, args):
        """Tell the executor of the tensors' memory; only what the schema mutates is writable."""
        known = set()
        # Arguments left to their defaults are not among args.
        for argument, x in zip(op._schema.arguments, args, strict=False):
            if not torch.is_tensor(x) or x.untyped_storage().data_ptr() in known:
                continue
            storage = x.untyped_storage()
            known.add(storage.data_ptr())
            writable = argument.alias_info is not None and argument.alias_info.is_write
            session.register_buffer(
                storage.data_ptr(), storage.nbytes(), argument.name, writable, not writable
            )
