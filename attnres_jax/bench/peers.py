"""PyTorch's kernels for attention residuals as arms of `bench kernels`, each called as its own README says.

What a peer does for a work, which is the same function of the same inputs (shared memory, nothing is copied):

    fla-core         one fused read over separate sources, with its output norm; S reads are S calls. Twice:
                     its Triton kernels, and those in Gluon, which it offers beside them
    fast-attnres     one read over separate sources, PyTorch's norm; S reads of mix are one call of its own
    flash-attn-res   two phases, PyTorch's norm; its buffer is the one array of sources; D a power of two
    liger-kernel     one read over one array, PyTorch's norm; in a block the sources are stacked for each read

Whoever has no merge does not take part in that task, and in a block reads all n + 1 sources S times. Sums are
PyTorch's, and so is what autograd adds up. All is captured in a CUDA graph and replayed, so that no arm waits
for Python; where a graph is refused, the calls are made one by one, and the row says so.
"""

import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnres_jax.bench.arms import Ready, Unsupported
from attnres_jax.bench.work import EPS, Inputs, Work, named_gradients

WARM = 3
"""Calls before a graph is captured: what tunes itself does it then."""


class Peer(NamedTuple):
    """One package's calls, of torch tensors; sources are a list, or one array if `whole`."""

    read: Callable[[Any, Any], Any]
    """w [D], sources -> mixture."""
    norm: Callable[[Any, Any], Any]
    """mixture, scale -> x."""
    whole: bool = False
    query: str = "float32"
    """The dtype that it takes queries in."""
    reads: Callable[[Any, Any], Any] | None = None
    """[S, D], sources -> mixtures; None: one after the other."""
    normed: Callable[[Any, Any, Any], Any] | None = None
    """w, sources, scale -> x in one call; None: a read, then the norm."""
    phases: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    """ws, sources -> mixtures, lse; and p, w, mixture, lse -> mixture."""


def _fla(torch: Any, gluon: bool = False) -> Peer:
    fused = importlib.import_module("fla.ops.attnres").fused_attnres
    backends = importlib.import_module("fla.ops.attnres.backends")
    if gluon and not (
        hasattr(backends, "AttnResGluonBackend") and backends.AttnResGluonBackend.is_available()
    ):
        raise Unsupported("its Gluon backend is not available")

    ones = _ones(torch)

    def read(w, sources, scale=None):
        os.environ["FLA_ATTNRES_GLUON"] = str(int(gluon))  # how it is chosen, read at each call
        how = {"output_rms_weight": scale, "rms_eps": EPS, "checkpoint_level": 0}  # its faster backward
        return fused(w, sources, ones(w), **how)

    return Peer(read, _norm(torch), normed=read)


def _ones(torch: Any) -> Callable[[Any], Any]:
    """A key scale like `w`, made once and not in each timed call."""
    made: dict[Any, Any] = {}

    def like(w):
        key = w.shape, w.dtype, w.device
        if key not in made:
            made[key] = torch.ones_like(w)
        return made[key]

    return like


def _fast(torch: Any) -> Peer:
    package = importlib.import_module("attnres")

    def read(w, sources):
        return package.attnres(tuple(sources), w, eps=EPS)

    def reads(w, sources):
        return package.attnres_multi(tuple(sources), list(w), eps=EPS)

    return Peer(read, _norm(torch), query="bfloat16", reads=reads)


def _flash(torch: Any) -> Peer:
    package = importlib.import_module("flash_attn_res")

    def first(w, sources):
        mixtures, lse = package.phase_1_batched_attention_triton_op(
            sources[:, None], torch.stack(list(w)), EPS
        )
        return mixtures[:, 0], lse[:, 0]

    def second(p, w, mixture, lse):
        merge = package.phase_2_online_softmax_merge_triton_op
        return merge(p[None], w, mixture[None], lse[None], EPS)[0]

    def reads(w, sources):
        return first(w, sources)[0]

    return Peer(lambda w, v: reads([w], v)[0], _norm(torch), whole=True, reads=reads, phases=(first, second))


def _liger(torch: Any) -> Peer:
    read = importlib.import_module("liger_kernel.transformers.functional").liger_attn_res

    ones = _ones(torch)

    def one(w, sources):
        sources = sources if torch.is_tensor(sources) else torch.stack(sources)
        return read(sources[:, None], w, ones(w), eps=EPS)[0]

    return Peer(one, _norm(torch), whole=True)


def _norm(torch):
    return lambda h, scale: torch.nn.functional.rms_norm(h, (h.shape[-1],), scale.to(h.dtype), EPS)


PEERS = {
    "fla-core": ("fla.ops.attnres", _fla),
    "fla-core-gluon": ("fla.ops.attnres", partial(_fla, gluon=True)),
    "fast-attnres": ("attnres", _fast),
    "flash-attn-res": ("flash_attn_res", _flash),
    "liger-kernel": ("liger_kernel.transformers.functional", _liger),
}


def make(name: str, work: Work, sets: Sequence[Inputs], repeats: int) -> Ready:
    """A `Maker`, but for its first argument. Raises `Unsupported`, and whatever the package raises."""
    module, build = PEERS[name]
    for package in ("torch", module.partition(".")[0]):
        if importlib.util.find_spec(package) is None:
            raise Unsupported(f"{package} is not installed")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Unsupported("PyTorch finds no NVIDIA GPU")
    if os.environ.get("TRITON_CACHE_DIR") == "":
        # jax-triton 0.3 empties it, and Triton then has no place for a cache.
        del os.environ["TRITON_CACHE_DIR"]
    return ready(torch, build(torch), work, sets, repeats)


def ready(torch: Any, peer: Peer, work: Work, sets: Sequence[Inputs], repeats: int) -> Ready:
    """An arm of one peer, on the device that the inputs lie on."""
    if work.task == "merge" and not peer.phases:
        raise Unsupported("has no merge: its reads take all sources")
    task = {"mix": _mix, "merge": _merge, "block": _block}[work.task]
    given = [jax.tree.map(torch.from_dlpack, inputs) for inputs in sets]

    def call(inputs):
        return _both(torch, peer, partial(task, torch, peer), work.backward, inputs)

    def results(inputs):
        found = call(jax.tree.map(torch.from_dlpack, inputs))
        _synchronize(torch)
        return jax.tree.map(
            lambda t: jnp.from_dlpack(t.detach().contiguous()), found, is_leaf=torch.is_tensor
        )

    def every():
        for inputs in given * repeats:
            call(inputs)

    start, note = _graph(torch, every, work) if torch.cuda.is_available() else (every, "")
    return Ready(results, start, lambda _: _synchronize(torch), repeats * len(sets), note)


def _synchronize(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _graph(torch, every, work):
    """What replays the calls, and what there is to say of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            every()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=_pool(torch, work)):
            every()
    except RuntimeError as refused:
        torch.cuda.synchronize()
        return every, f"no CUDA graph: {str(refused).splitlines()[0]}"
    return graph.replay, "CUDA graph"


@functools.cache
def _pool(torch, work):
    """One for all arms of a work: nothing of a replay is used after it, and no two run at once."""
    return torch.cuda.graph_pool_handle()


def release() -> None:
    """Gives memory back that arms which are gone have left with PyTorch."""
    _pool.cache_clear()
    if torch := sys.modules.get("torch"):
        gc.collect()
        torch.cuda.empty_cache()


def _both(torch, peer, task, backward, inputs):
    leaves = _leaves(torch, peer, inputs.arguments, backward)
    results = task(leaves)
    if not backward:
        return results
    outputs, cotangents = [], []
    for name, value in results.items():
        outputs += _list(torch, value)
        cotangents += _list(torch, inputs.cotangents[name], like=value)
    wanted = {k: v[:1] if k == "y" else v for k, v in leaves.items()}  # the later y are not asked for
    names = [name for name, value in wanted.items() for _ in _list(torch, value)]
    flat = [leaf for value in wanted.values() for leaf in _list(torch, value)]
    grads = torch.autograd.grad(outputs, flat, cotangents)
    found = {name: [g for n, g in zip(names, grads, strict=True) if n == name] for name in wanted}
    found = {k: v if isinstance(leaves[k], list) else v[0] for k, v in found.items()}
    return results | named_gradients(found)


def _list(torch, value, like=None):
    """A tensor alone, or all of several; one of rows beside a list is taken apart."""
    if torch.is_tensor(value) and not isinstance(like, list | tuple):
        return [value]
    return [*value]


def _leaves(torch, peer, arguments, backward):
    """Tensors that share the inputs' memory, one for each array that autograd is to see."""

    def leaf(t, grad=backward):
        return t.detach().requires_grad_(grad)

    leaves = {}
    for name, value in arguments.items():
        if name == "y":
            leaves[name] = [leaf(t, backward and not j) for j, t in enumerate(value)]
        elif name in ("w", "scale"):
            t = value.to(getattr(torch, peer.query)) if name == "w" else value
            leaves[name] = leaf(t) if t.ndim == 1 else [leaf(row) for row in t]
        elif name == "sources" and not peer.whole:
            leaves[name] = [leaf(row) for row in value]
        else:
            leaves[name] = leaf(value)
    return leaves


def _mix(torch, peer, a):
    reads = peer.reads if peer.reads and len(a["w"]) > 1 else lambda ws, v: [peer.read(w, v) for w in ws]
    return {"mixture": reads(a["w"], a["sources"])}


def _merge(torch, peer, a):
    _, merge = peer.phases
    x = peer.norm(merge(a["stream"], a["w"], a["mixture"], a["lse"]), a["scale"])
    return {"x": x, "stream": a["stream"].view_as(a["stream"])}


def _block(torch, peer, a):
    read, (p, *later) = _reader(torch, peer, a["w"], a["sources"]), a["y"]
    x = [read(0, None, a["scale"][0])]
    for j, y in enumerate(later, 1):
        x.append(read(j, p, a["scale"][j]))
        p = p + y
    # The sum of a block of one is its input, and autograd wants a result of its own.
    return {"x": x, "summary": p.view_as(p)}


def _reader(torch, peer, w, sources):
    """The j-th read of a block, normed: of the sources and of p, if there is one."""
    if peer.phases:
        first, merge = peer.phases
        mixtures, lse = (rows.unbind() for rows in first(w, sources))
        return lambda j, p, scale: peer.norm(
            mixtures[j] if p is None else merge(p, w[j], mixtures[j], lse[j]), scale
        )
    rows = sources.unbind() if torch.is_tensor(sources) else tuple(sources)

    def read(j, p, scale):
        # One array stays one while nothing is added to it.
        seen = sources if p is None else [*rows, p]
        return peer.normed(w[j], seen, scale) if peer.normed else peer.norm(peer.read(w[j], seen), scale)

    return read
