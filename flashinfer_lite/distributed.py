"""decode over a KV cache that the processes of a group hold in parts, cut along the sequence.

Every rank attends to its own keys, by the same kernels as without a group, and what comes out, one
(out, lse) a row, is merged. Two ways, as two softmaxes:

    online    all ranks gather all states and merge them by merge_states, in the order of ranks
    unified   one all-reduce of [out exp(lse - phi), exp(lse - phi), overflow, alive]; the quotient
              is the row. A row for which that was not safe is gathered and merged as above.

docs/distributed.md has the reasons.
"""

import contextlib
import sys

import torch
import torch.distributed as dist

from flashinfer_lite import _check, _ops, _sink, reference

# exp(lse - phi) below it fits float32 with room for the sum over the ranks. A row that the guard of
# the kernels lets through is: its maximum is below phi + 44, its keys fewer than 2^30.
LARGEST_EXPONENT = 65.0
# A window beyond any sequence; positions with it added still fit 64 bits.
FARTHEST = 2**48


def is_unified(phi):
    """Of (phi, phi_heads) as the ops take them."""
    return phi[0] is not None or phi[1] is not None


def check_group(group, q):
    """Whether these processes can talk about q."""
    if torch.compiler.is_compiling():  # without fullgraph=True this breaks the graph, no more
        raise NotImplementedError("process_group: expected None inside a compiled graph, got one")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup that this process belongs "
            f"to, got {group!r}"
        )
    backends = dist.get_backend_config(group)
    if torch.is_tensor(q) and f"{q.device.type}:" not in backends:
        raise ValueError(
            f"process_group: expected a backend for q's device {q.device}, got {backends}"
        )


@contextlib.contextmanager
def refusals_told(group, q):
    """Tell the other ranks of an error raised in here: they wait for this one in `decode`."""
    try:
        yield
    except Exception as error:
        if _check.wants_values(q):
            _gather_objects(group, f"{type(error).__name__}: {error}")
        raise


def decode(*arguments):
    """`_decode`, of which a graph break makes no graphs."""
    disabled = "torch._dynamo" in sys.modules  # which is slow to load
    return (torch.compiler.disable(_decode) if disabled else _decode)(*arguments)


def _decode(
    group, run, arguments, block_table, alibi_slopes, sink, phi, batch_invariant, as_reference
):
    """(out, lse) over all ranks' keys; run(arguments, None, None) is those of this rank's."""
    q = arguments[0]
    shared = {"phi": phi[1], "sink": sink, "alibi_slopes": alibi_slopes}
    _agree(group, arguments, block_table, phi, shared, batch_invariant, as_reference)
    here = _on_this_rank(group, arguments, block_table, alibi_slopes)
    if block_table is not None and _check.wants_values(q):
        with refusals_told(group, q):  # only the op knows which pages it reads
            state = run(here, None, None)
        _raise_what_is_told(_gather_objects(group, None))
    else:
        state = run(here, None, None)
    state = _merge(group, *state, phi, batch_invariant, as_reference)
    return state if sink is None else _sink.fold(*state, sink)


def _agree(group, arguments, block_table, phi, shared, batch_invariant, as_reference):
    """Fail on every rank alike if the ranks do not make the same call."""
    q, k_cache, v_cache, _, _, _, softmax_scale, softcap, causal, *window = arguments
    if not _check.wants_values(q):
        return
    number, heads = phi
    call = [
        ("FLASHINFER_LITE_CHECK", "setting", _check.compares_values()),
        ("q", "shape", list(q.shape)),
        ("q", "dtype", q.dtype),
        ("k_cache", "num_heads", k_cache.shape[2]),
        ("v_cache", "head_dim_v", v_cache.shape[3]),
        ("softmax_scale", "value", softmax_scale),
        ("softcap", "value", softcap or None),
        ("causal", "value", (False, "bottom_right", "top_left")[causal]),
        ("window", "value", tuple(window)),
        ("softmax", "value", "unified" if is_unified(phi) else "online"),
        ("phi", "value", number if heads is None else "a tensor"),
        ("sink", "value", None if shared["sink"] is None else "a tensor"),
        ("alibi_slopes", "value", None if shared["alibi_slopes"] is None else "a tensor"),
        ("block_table", "value", None if block_table is None else "a tensor"),
        ("batch_invariant", "value", bool(batch_invariant)),
        ("impl", "value", "reference" if as_reference else "a kernel"),
    ]
    if _check.compares_values():
        for name, x in {"q": q, **shared}.items():
            call.append((name, "values", None if x is None else f"those of sum {_checksum(x)}"))
    calls = _gather_objects(group, call)
    _raise_what_is_told(calls)
    for rank, other in enumerate(calls):
        for (name, what, first), (*_, value) in zip(calls[0], other, strict=False):
            if value != first:
                raise ValueError(
                    f"{name}: expected the same {what} on every rank of process_group, got "
                    f"{first} on rank 0 and {value} on rank {rank}"
                )


def _raise_what_is_told(gathered):
    """Raise the error of another rank, of `refusals_told`."""
    for rank, other in enumerate(gathered):
        if isinstance(other, str):
            raise RuntimeError(
                f"process_group: expected a valid call on every rank, got on rank {rank} {other}"
            )


def _gather_objects(group, mine):
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def _checksum(x):
    """Of the bits, and of where they stand."""
    bits = x.contiguous().flatten().view(torch.uint8).long()
    return int((bits * torch.arange(1, len(bits) + 1, device=x.device)).sum())


def check_call(arguments, block_table, phi):
    """Check on this rank what without a group the ops check, and what no op can."""
    q, k_cache, _, _, kv_start, seqlens_kv = arguments[:6]
    if is_unified(phi) and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "softmax: expected 'online' with process_group while a CUDA graph is captured, got "
            "'unified', whose merge reads on the host which rows to merge again"
        )
    if q.device.type != "cpu" or kv_start is seqlens_kv is None:
        return
    # Before another rank counts on this one's lengths.
    capacity, batch_size = _capacity(k_cache, block_table), len(q)
    ends = [capacity] * batch_size if seqlens_kv is None else seqlens_kv.tolist()
    starts = [0] * batch_size if kv_start is None else kv_start.tolist()
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not 0 <= end <= capacity:
            raise RuntimeError(
                f"seqlens_kv: expected values in [0, {capacity}], got {end} at batch {b}"
            )
        if not 0 <= start <= end:
            raise RuntimeError(
                f"kv_start: expected values in [0, seqlens_kv = {end}], got {start} at batch {b}"
            )


def _capacity(k_cache, block_table):
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _on_this_rank(group, arguments, block_table, alibi_slopes):
    """The prepared arguments for this rank's keys alone: causal and window, which count positions
    in the whole sequence, become bounds of the lengths and, for more than one query, a mask; ALiBi,
    which does too, becomes a mask."""
    q, k_cache, v_cache, mask, kv_start, seqlens_kv, scale, softcap, causal, left, right = arguments
    seqlen_q, capacity = q.shape[1], _capacity(k_cache, block_table)
    if causal:
        right = 0
    left, right = min(left, FARTHEST), min(right, FARTHEST)
    every_key = left < 0 and (right < 0 or (seqlen_q == 1 and causal != 2))
    if every_key and alibi_slopes is None:
        return (*arguments[:8], 0, -1, -1)

    end = torch.full((len(q),), capacity, device=q.device)
    if seqlens_kv is not None:
        end = seqlens_kv.long().clamp(0, capacity)
    start = torch.zeros_like(end) if kv_start is None else kv_start.long().clamp(min=0)
    lengths = _gather(group, end)
    # Query i stands at this rank's slot i + diagonal, which may be another rank's.
    diagonal = -lengths[: dist.get_rank(group)].sum(0)
    if causal != 2:
        diagonal = diagonal + lengths.sum(0) - seqlen_q
    if right >= 0:
        end = torch.minimum(end, diagonal + seqlen_q + right).clamp(min=0)
    if left >= 0:
        start = torch.maximum(start, diagonal - left)
    start = torch.minimum(start, end)
    if seqlen_q > 1 or alibi_slopes is not None:
        slot = torch.arange(capacity, device=q.device)
        position = (torch.arange(seqlen_q, device=q.device) + diagonal[:, None])[..., None]
    if alibi_slopes is not None:
        distance = (position - slot).abs().to(_ops.accumulator_dtype(q.dtype)).unsqueeze(1)
        mask = _plus(mask, -alibi_slopes[..., None, None] * distance)
    if seqlen_q > 1 and not every_key:
        visible = torch.ones(len(q), seqlen_q, capacity, dtype=torch.bool, device=q.device)
        if right >= 0:
            visible &= slot <= position + right
        if left >= 0:
            visible &= slot >= position - left
        mask = _also(mask, visible.unsqueeze(1))
    return q, k_cache, v_cache, mask, start, end, scale, softcap, 0, -1, -1


def _plus(mask, bias):
    """An additive mask: `mask`, and the finite bias where it hides nothing."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _also(mask, visible):
    """A mask that hides what `visible` does not show, too."""
    if mask is None:
        return visible
    return visible & mask if mask.dtype == torch.bool else torch.where(visible, mask, -torch.inf)


def _merge(group, out, lse, phi, batch_invariant, as_reference):
    """The state of every row over all ranks' keys, the same bits on each rank."""
    merge_states = reference.merge_states if as_reference else _ops.merge_states
    if lse.numel() == 0:
        return out, lse
    # Where in its buffer a row lies may decide in which order an all-reduce adds it up.
    if as_reference or batch_invariant or not is_unified(phi):
        return merge_states(*_gather_states(group, out, lse))
    return _merge_by_sums(group, out, lse, phi)


def _merge_by_sums(group, out, lse, phi):
    number, heads = phi
    base = number if heads is None else heads.to(lse.dtype)[:, None]
    above = lse - base
    alive = lse != -torch.inf
    safe = alive & (above < LARGEST_EXPONENT)  # not where it is NaN
    weight = torch.where(safe, above, -torch.inf).exp()
    # [batch, seqlen_q, num_heads_q, head_dim_v + 3], as out lies
    columns = torch.stack([weight, (alive & ~safe).to(weight), alive.to(weight)], -1)
    numerators = out * weight.transpose(1, 2).unsqueeze(-1)
    numerators = numerators.masked_fill(~safe.transpose(1, 2).unsqueeze(-1), 0.0)
    sums = torch.cat([numerators, columns.transpose(1, 2)], -1)
    dist.all_reduce(sums, group=group)

    numerators, (denominator, overflows, alive) = sums[..., :-3], sums[..., -3:].unbind(-1)
    merged = (numerators / denominator.unsqueeze(-1)).to(out.dtype)
    # Above 1 no weight is smaller than in a merge by the largest lse, so nothing more vanishes.
    good = (overflows == 0) & (denominator > 1) & merged.isfinite().all(-1)
    dead = alive == 0
    merged = merged.masked_fill(dead.unsqueeze(-1), 0.0)
    merged_lse = base + denominator.log().transpose(1, 2)
    merged_lse = merged_lse.masked_fill(dead.transpose(1, 2), -torch.inf).contiguous()

    rows = (~(good | dead)).nonzero(as_tuple=True)  # waits for the device, here alone
    if len(rows[0]):
        batch, query, head = rows
        state = out[rows][:, None, None], lse[batch, head, query][:, None, None]
        again, again_lse = _ops.merge_states(*_gather_states(group, *state))
        merged[rows] = again[:, 0, 0]
        merged_lse[batch, head, query] = again_lse[:, 0, 0]
    return merged, merged_lse


def _gather_states(group, out, lse):
    """(outs, lses) with the ranks first, in one exchange."""
    parts = [x.contiguous().flatten().view(torch.uint8) for x in (out, lse)]
    gathered = _gather(group, torch.cat(parts))
    outs, lses = gathered.split([len(part) for part in parts], 1)
    outs = outs.view(out.dtype).unflatten(1, out.shape)
    return outs, lses.view(lse.dtype).unflatten(1, lse.shape)


def _gather(group, x):
    """[num_ranks, *x.shape], in the order of ranks."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
    return gathered
