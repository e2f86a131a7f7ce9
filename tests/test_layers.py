"""Who may include or import whom. CONTRIBUTING.md has the rule in words, this file holds it.

Native code is read by regular expression: `#include` lines, and the few tokens that belong to one
layer alone. Python is read by `ast`. Each rule is proven to bite by a planted violation.
"""

import ast
import posixpath
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folder of csrc/ -> (layers of ours it may include, families of foreign headers it may include).
# A file belongs to the longest folder that holds it.
NATIVE_LAYERS = {
    "common": ({"common"}, {"std"}),
    "cpu/isa": ({"common", "cpu/isa"}, {"std", "intrinsics"}),
    # May include intrinsics (ahead of a target region, so that no level owns them), not use them.
    "cpu/kernels": ({"common", "cpu/isa", "cpu/kernels"}, {"std", "intrinsics"}),
    "cuda/arch": ({"common", "cuda/arch", "simt"}, {"std", "cuda"}),
    "cuda/tile": ({"common", "cuda/arch", "cuda/tile"}, {"std"}),
    "cuda/kernels": ({"common", "cuda/arch", "cuda/tile", "cuda/kernels"}, {"std"}),
    # Host code: from an op's parameters to a launch.
    "cuda": ({"common", "cuda", "cuda/arch"}, {"std"}),
    "simt": ({"common", "simt", "cuda", "cuda/arch", "cuda/kernels"}, {"std", "Python"}),
    # Stands in for a CUDA that torch knows.
    "simt/fake_cuda": ({"simt", "simt/fake_cuda", "cuda"}, {"std", "Python", "torch internals"}),
    "ops": ({"common", "cpu/kernels", "cuda", "ops"}, {"std", "torch", "cuda"}),
}
HEADER_FAMILIES = {
    "torch": r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch)/",
    "torch internals": r"(torch|ATen|c10)/",
    "Python": r"pybind11/|Python\.h",
    "cuda": r"cuda|cooperative_groups|mma\.h|cub/|thrust/",
    "intrinsics": r"\w*intrin\.h|arm_\w+\.h",
    "std": r"",
}
# What is written -> the layers where it may be.
TOKENS = {
    r"\basm\b|\b__asm__\b": {"cuda/arch", "simt"},
    r"<<<": {"cuda/arch"},
    r"\b_mm\d*_\w+|\b__m\d+\w*|\b_tile_\w+": {"cpu/isa"},
    r"\bblockIdx\b|\bgridDim\b": {"cuda/arch", "cuda/kernels", "simt"},
    r"\bprintf\s*\(|\bstd::c(out|err)\b|\b(exit|abort)\s*\(": {"simt"},
}
# Tests of the contract itself; every other test, bench and example uses the public names only.
MAY_IMPORT_PRIVATE = {"tests/test_registration.py", "tests/test_layers.py"}


def layer_of(path):
    folders = [folder for folder in NATIVE_LAYERS if path.startswith(folder + "/")]
    return max(folders, key=len, default=None)


def native_violations(path, text):
    """Broken rules in a file of csrc/; `path` is relative to csrc/."""
    layer = layer_of(path)
    if layer is None:
        return [f"{path}: in no layer"]
    own_layers, families = NATIVE_LAYERS[layer]
    found = []
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    for header in re.findall(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', code, re.MULTILINE):
        # The include path is csrc/; a header beside the file may be named by itself.
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), header))
        ours = header if layer_of(header) else beside
        family = next(name for name, start in HEADER_FAMILIES.items() if re.match(start, header))
        target = layer_of(ours) if f'"{header}"' in code else None
        if target is None or family.startswith(("torch", "Python")):
            if family not in families:
                found.append(f"{path}: {layer} may not include {family} header {header}")
        elif target not in own_layers:
            found.append(f"{path}: {layer} may not include {target} ({header})")
        elif target == layer == "cuda/kernels" and ours.split("/")[2] != path.split("/")[2]:
            found.append(f"{path}: a kernel may not include another kernel ({header})")
        elif layer == "cuda/tile" and ours.startswith("common/params/"):
            found.append(f"{path}: cuda/tile may not know a kernel's parameters ({header})")
        elif target == "simt" and layer == "cuda/arch" and not path.endswith("/cpu.cuh"):
            found.append(f"{path}: only cpu.cuh may include simt ({header})")
    for token, layers in TOKENS.items():
        if layer not in layers and (hit := re.search(token, code)):
            found.append(f"{path}: {hit[0]!r} may not be in {layer}")
    return found


def imports_of(tree, path):
    """Dotted names of everything imported, `from x import y` as x.y, relative ones resolved."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def is_private(module):
    """flashinfer_lite._ops and below, but not flashinfer_lite.__version__."""
    parts = module.split(".")
    return parts[0] == "flashinfer_lite" and any(re.match(r"_[^_]", part) for part in parts)


def python_violations(path, text):
    """Broken rules in a Python file; `path` is relative to the repository."""
    tree = ast.parse(text)
    imports = list(imports_of(tree, path))
    found = []
    if path.startswith("flashinfer_lite/"):
        outside = {"tests", "bench", "examples"}
        if not path.startswith("flashinfer_lite/testing/"):
            outside.add("flashinfer_lite.testing")
        for module in imports:
            if any(f"{module}.".startswith(f"{name}.") for name in outside):
                found.append(f"{path}: the package may not import {module}")
            if path.endswith(("/_ops.py", "/reference.py")) and not is_private(module):
                if module.startswith("flashinfer_lite"):
                    found.append(f"{path}: is below the public modules, may not import {module}")
        chains = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        if path != "flashinfer_lite/_ops.py" and any(
            ast.unparse(node) == "torch.ops" for node in chains
        ):
            found.append(f"{path}: torch.ops is for flashinfer_lite/_ops.py alone")
    elif path not in MAY_IMPORT_PRIVATE:
        found += [f"{path}: may not import private {name}" for name in imports if is_private(name)]
    return found


def native_files():
    suffixes = {".h", ".cuh", ".cpp", ".cu", ".inc"}
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


def python_files():
    folders = ("flashinfer_lite", "tests", "bench", "examples")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_native_layers():
    files = native_files()
    assert files, "no native sources found"
    found = []
    for path in files:
        found += native_violations(path.relative_to(ROOT / "csrc").as_posix(), path.read_text())
    assert not found, "\n".join(found)


def test_python_layers():
    found = []
    for path in python_files():
        found += python_violations(path.relative_to(ROOT).as_posix(), path.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("common/types.h", "#include <torch/csrc/stable/tensor.h>"),
        ("common/types.h", '#include "cpu/isa/avx2.h"'),
        ("common/types.h", "#include <cuda_bf16.h>"),
        ("cpu/kernels/attention.h", "auto x = _mm256_setzero_ps();"),
        ("ops/attention_cpu.cpp", "#include <immintrin.h>"),
        ("cpu/kernels/attention.h", '#include "../../ops/attention.h"'),
        ("cpu/isa/avx2.h", '#include "cpu/kernels/attention.h"'),
        ("cpu/kernels/attention.h", 'void f() { asm volatile(""); }'),
        ("cuda/tile/mask.cuh", '#include "common/params/attention.h"'),
        ("cuda/tile/mask.cuh", "int i = blockIdx.x;"),
        ("cuda/dispatch.cpp", '#include "cuda/kernels/decode/sm80.cuh"'),
        ("cuda/kernels/decode/sm80.cuh", '#include "cuda/kernels/combine/sm80.cuh"'),
        ("cuda/kernels/decode/sm80.cuh", "body<<<1, 1>>>();"),
        ("cuda/arch/ptx.cuh", '#include "simt/fiber.h"'),
        ("ops/attention_cpu.cpp", "#include <ATen/ATen.h>"),
        ("ops/attention_cpu.cpp", "#  include <Python.h>"),
        ("ops/attention_cpu.cpp", '#include "cpu/isa/avx2.h"'),
        ("ops/attention_cpu.cpp", "if (bad) exit(1);"),
        ("helpers/misc.h", ""),
    ],
)
def test_native_rule_bites(path, text):
    assert len(native_violations(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cpu/isa/avx2.h", '#include <immintrin.h>\n#include "vector.h"'),
        ("cpu/kernels/attention.cpp", '#include "attention.h"\n#include "../isa/avx2.h"'),
        ("cuda/arch/cpu.cuh", '#include "simt/fiber.h"'),
        (
            "cuda/kernels/decode/sm80.cuh",
            '#include "common/params/decode.h"\n#include "stages.cuh"',
        ),
        (
            "ops/decode_cpu.cpp",
            '#include <torch/csrc/stable/ops.h>\n#include "cpu/kernels/decode.h"',
        ),
        ("common/types.h", "// asm, printf(...) and <<<>>> are only spoken of\n#include <cmath>"),
    ],
)
def test_native_rule_allows(path, text):
    assert native_violations(path, text) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("flashinfer_lite/decode.py", "import torch\ntorch.ops.flashinfer_lite.decode(1)"),
        ("flashinfer_lite/decode.py", "from . import testing"),
        ("flashinfer_lite/hf/cache.py", "from ..testing.poison import poison"),
        ("flashinfer_lite/_ops.py", "from .attention import attention"),
        ("flashinfer_lite/reference.py", "import flashinfer_lite.decode"),
        ("tests/test_decode.py", "from flashinfer_lite import (\n    decode,\n    _ops,\n)"),
        ("bench/bench.py", "import flashinfer_lite._introspect"),
    ],
)
def test_python_rule_bites(path, text):
    assert len(python_violations(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("flashinfer_lite/decode.py", "from . import _ops\nfrom .reference import attention"),
        ("flashinfer_lite/_ops.py", "import torch\ntorch.ops.load_library('x')"),
        ("flashinfer_lite/testing/isa.py", "from flashinfer_lite import _ops"),
        ("tests/test_decode.py", "import flashinfer_lite\nfrom flashinfer_lite.testing import x"),
    ],
)
def test_python_rule_allows(path, text):
    assert python_violations(path, text) == []
