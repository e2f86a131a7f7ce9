"""What this machine is and whether the library is sound on it; a stage of test_gpu.py.

python scripts/gpu/doctor.py --device cuda --json FILE
"""

import argparse
import json
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
PACKAGES = ("numpy", "triton", "pytest", "hypothesis", "xdist")


def version_of(name):
    try:
        return getattr(__import__(name), "__version__", "present")
    except ImportError:
        return None


def last_line(*command):
    path = shutil.which(command[0])
    if path is None:
        return None
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30)
    return (done.stdout.strip().splitlines() or [None])[-1]


def describe_gpu():
    from smi import smi

    properties = torch.cuda.get_device_properties(0)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "smem_optin_bytes": shared,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "devices": torch.cuda.device_count(),
        "smi": smi(),
    }


def describe(device):
    import flashinfer_lite

    found = describe_gpu() if device == "cuda" else {"gpu": "none (dry run)", "smi": {}}
    return found | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flashinfer_lite": flashinfer_lite.__version__,
        "cuda_status": flashinfer_lite.cuda_status,
        "packages": {name: version_of(name) for name in PACKAGES},
        "nvcc": last_line("nvcc", "--version"),
        "compute_sanitizer": last_line("compute-sanitizer", "--version"),
    }


def self_test():
    """`python -m flashinfer_lite doctor`, in this process; whether it found the library sound."""
    sys.argv = ["flashinfer_lite", "doctor"]
    try:
        runpy.run_module("flashinfer_lite", run_name="__main__")
    except SystemExit as status:
        return not status.code
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = describe(arguments.device)
    for name, value in found.items():
        print(f"{name:18} {value}", flush=True)
    found["self_test"] = self_test()
    arguments.json.write_text(json.dumps(found))
    loaded = arguments.device == "cpu" or found["cuda_status"] == "loaded"
    sys.exit(0 if found["self_test"] and loaded else 1)


if __name__ == "__main__":
    main()
