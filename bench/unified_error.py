"""Print the mean error of decode against float64 where phi lies far from the rows' maxima: a table
of docs/flashdecoding_pp.md.

    python bench/unified_error.py
"""

import torch

import flashinfer_lite
from flashinfer_lite import reference

DISTANCES = (-1, 1, 4, 10, 22, 43)  # row_max - phi, about: a head's rows differ by one or two
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(q, k, v, exact, phi=None):
    """(the mean error, the rows checked and computed again)."""
    flashinfer_lite.stats(reset=True)
    out = flashinfer_lite.decode(q, k, v, phi=phi)
    counted = flashinfer_lite.stats()
    mean = (out.double() - exact).abs().mean().item()
    return mean, counted.rows_checked, counted.rows_recomputed


def main():
    print("row_max - phi   " + "".join(f"{str(dtype)[6:]:>26}" for dtype in DTYPES))
    columns = []
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(16, 1, 8, 64, generator=generator).to(dtype)  # 16 rows a head
        k, v = torch.randn(2, 16, 4096, 2, 64, generator=generator).to(dtype).unbind()
        exact = reference.attention(q.double(), k.double(), v.double())
        keys = k.double().repeat_interleave(4, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhk", q.double(), keys) / 8
        middle = scores.amax(-1).mean(0).float()  # of each head's row maxima
        rows = [error(q, k, v, exact)]
        rows += [error(q, k, v, exact, middle - distance) for distance in DISTANCES]
        columns.append(rows)
    for i, name in enumerate(("online softmax", *DISTANCES)):
        cells = [column[i] for column in columns]
        print(
            f"{name!s:16}"
            + "".join(f"{e:12.3g}, {again:3} of {checked:3}" for e, checked, again in cells)
        )


if __name__ == "__main__":
    main()
