"""DTensors in attention and decode: cut along batch and heads, each rank runs what it has.

No row needs what belongs to another sequence or head, so nothing is communicated, forward or
backward, but what the caller's placements ask for: a tensor that lies otherwise is redistributed.
It is done around the op and not by a sharding rule of it: a rule sees one dimension of the mesh at
a time, and whether the heads of q stay with their KV heads is a matter of all of them.
"""

import sys

import torch

# What a mesh dimension cuts -> the dimension of each tensor that it shards. A tensor that lacks it
# is the same on all of those ranks, and its gradient is the sum of theirs.
ROWS = {"batch": 0, "heads": 2}
PAGES = {"heads": 2}  # of k and v in pages, which any sequence may share
DIMS = {
    "mask": {"batch": 0, "heads": 1},
    "lse": {"batch": 0, "heads": 1},
    "sink": {"heads": 0},
    "alibi_slopes": {"batch": 0, "heads": 1},
    "phi": {"heads": 0},
    "kv_start": {"batch": 0},
    "seqlens_kv": {"batch": 0},
    "block_table": {"batch": 0},
}


def given(*values):
    """Whether any is a DTensor; whoever has one has imported its module, which is slow to load."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in values)


def call(op, **tensors):
    """op's (out, lse) as DTensors; q, k and v come first, the others may be None or a number."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = next(x.device_mesh for x in tensors.values() if isinstance(x, DTensor))
    for name, x in tensors.items():
        if torch.is_tensor(x) and not isinstance(x, DTensor):
            raise TypeError(f"{name}: expected a DTensor, as others are, got a torch.Tensor")
        if torch.is_tensor(x) and x.device_mesh != mesh:
            raise ValueError(f"{name}: expected the others' mesh {mesh}, got {x.device_mesh}")
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"q: expected a mesh that this process belongs to, got {mesh}")

    q, k, v = list(tensors.values())[:3]
    dims_kv = ROWS if tensors.get("block_table") is None else PAGES
    cuts, cuts_kv, heads_kv = _cut(q, k, v, dims_kv, mesh)
    names_kv = list(tensors)[1:3]

    def local(name, x):
        if not torch.is_tensor(x):
            return x
        placements, gradients = [], []
        is_kv = name in names_kv
        dims = dims_kv if is_kv else DIMS.get(name, ROWS)
        if name == "alibi_slopes" and x.dim() == 1:  # the same for every sequence
            dims = DIMS["sink"]
        for cut in cuts_kv if is_kv else cuts:
            dim = dims.get(cut)
            whole = dim is None or (name == "mask" and x.shape[dim] == 1)
            placements.append(Replicate() if whole else Shard(dim))
            gradients.append(Partial() if whole and cut else placements[-1])
        if list(x.placements) != placements:
            x = x.redistribute(placements=placements)
        return x.to_local(grad_placements=gradients)

    def of_all_ranks(x, dims, *shape):
        placements = [Shard(dims[cut]) if cut else Replicate() for cut in cuts]
        stride = torch.empty(shape, device="meta").stride()
        options = {"run_check": False, "shape": torch.Size(shape), "stride": stride}
        return DTensor.from_local(x, mesh, placements, **options)

    inputs = {name: local(name, x) for name, x in tensors.items()}
    for name in names_kv:
        inputs[name] = inputs[name][:, :, heads_kv]
    out, lse = op(**inputs, return_lse=True)
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    return (
        of_all_ranks(out, ROWS, batch_size, seqlen_q, num_heads_q, v.shape[3]),
        of_all_ranks(lse, DIMS["lse"], batch_size, num_heads_q, seqlen_q),
    )


def _cut(q, k, v, dims_kv, mesh):
    """What each mesh dimension cuts, of q and of K and V, and which of its KV heads a rank reads.

    A dimension that shards q (else k, else v) along batch or heads cuts all three so. Heads are cut
    where every rank gets as many, and whole groups or parts of one. Where ranks share a group, they
    have all KV heads; where there is no such cut the dimension cuts nothing.
    """
    from torch.distributed.tensor import Shard

    num_heads, num_heads_kv = q.shape[2], k.shape[2]
    group_size = num_heads // max(num_heads_kv, 1)
    first, first_kv, shared = 0, 0, False
    cuts, cuts_kv = [], []
    for dim, size in enumerate(mesh.shape):
        cut = None
        for x, dims in ((v, dims_kv), (k, dims_kv), (q, ROWS)):
            placed = x.placements[dim]
            along = [name for name in dims if type(placed) is Shard and placed.dim == dims[name]]
            cut = along[0] if along else cut
        cut_kv = cut
        if cut == "heads":
            share = num_heads // size
            splits_groups = shared or num_heads_kv % size != 0
            fits = share % max(group_size, 1) == 0 or (share > 0 and group_size % share == 0)
            if num_heads % size or (splits_groups and not fits):
                cut = cut_kv = None
            else:
                num_heads, shared = share, splits_groups
                first += mesh.get_coordinate()[dim] * share
                if splits_groups:
                    cut_kv = "group"
                else:
                    num_heads_kv //= size
                    first_kv += mesh.get_coordinate()[dim] * num_heads_kv
        cuts.append(cut)
        cuts_kv.append(cut_kv)
    if not shared:
        return cuts, cuts_kv, slice(None)
    begin = first // group_size - first_kv
    return cuts, cuts_kv, slice(begin, begin + max(num_heads // group_size, 1))
