"""The README's Python examples run, in order, as a reader would paste them."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_python_examples(device, capsys):
    from hf_models import make_model

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {"model": make_model("llama").eval(), "inputs": {"input_ids": torch.arange(5)[None]}}
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    assert names["out"].shape == (2, 8, 128, 64)
    assert names["tokens"].shape[1] > 5
    assert "decode cpu" in capsys.readouterr().out
