"""Strings of sublayer kinds and trees of what belongs to them: cut into blocks, runs and single sublayers."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def runs(seq: Any) -> Iterator[tuple[Any, int]]:
    """Spell `seq` as periods and how often each repeats: "bkmkm" -> ("b", 1), ("km", 2)."""

    def repeats(p):
        return next(r for r in range(1, len(seq) + 1) if seq[r * p : (r + 1) * p] != seq[:p])

    while seq:
        # The fewest bodies: a period's, and one for each sublayer that its repeats leave over.
        bodies = {p: p + len(seq) - p * repeats(p) for p in range(1, len(seq)) if repeats(p) > 1}
        period = min(bodies, key=lambda p: (bodies[p], p)) if bodies else 1
        yield seq[:period], repeats(period)
        seq = seq[period * repeats(period) :]


def periods(kinds: str) -> tuple[tuple[str, int], ...]:
    """`runs` of a block, but two turns of a pair are no loop: its ends would cost more than it saves."""
    return tuple((p * 2, 1) if reps == 2 and len(p) <= 2 else (p, reps) for p, reps in runs(kinds))


def starts(spans: tuple, begins: Any = True) -> Any:
    """`begins` as `Scheme.open` takes it: True only where the first sublayer is not one of a loop."""
    return begins if spans[0][1] == 1 else jnp.asarray(begins)


def belonging(kinds, at, span, whole):
    """Of (leaves [L, ...], kind -> leaves [n, ...]), those of the sublayers `kinds[at : at + len(span)]`."""
    each, by_kind = whole
    return cut(each, at, len(span)), {
        k: cut(by_kind[k], kinds[:at].count(k), span.count(k)) for k in sorted(set(span))
    }


def segments(spans, own):
    """For each period and each sublayer of it, the slot and share, [reps, ...]."""
    found, at, kinds = [], 0, "".join(period * reps for period, reps in spans)
    for period, reps in spans:
        slots, shares = fold(belonging(kinds, at, period * reps, own), reps)
        places = [(j, k, period[:j].count(k)) for j, k in enumerate(period)]
        found.append([(_at(slots, j), _at(shares[k], i)) for j, k, i in places])
        at += len(period) * reps
    return found


def _at(tree, place):
    return jax.tree.map(lambda a: a[:, place], tree)


def cut(tree, at, size):
    """Rows of every leaf."""
    return jax.tree.map(lambda a: a[at : at + size], tree)


def fold(tree, reps):
    """Leaves [n, ...] as [reps, n / reps, ...]."""
    return jax.tree.map(lambda a: a.reshape(reps, -1, *a.shape[1:]), tree)


def unfold(tree):
    """The inverse of `fold`."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def stack(trees):
    """Equal trees as one, of stacked leaves."""
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def by_kind(spans, ys, lead=0):
    """Aux of each period and sublayer of it, [*lead, reps, ...], as kind -> [*lead, n, ...]."""

    def merge(*a):
        return jnp.stack(a, lead + 1).reshape(*a[0].shape[:lead], -1, *a[0].shape[lead + 1 :])

    parts = []
    for (period, _), y in zip(spans, ys, strict=True):
        of = {k: [a for a, kind in zip(y, period, strict=True) if kind == k] for k in period}
        parts.append({k: jax.tree.map(merge, *v) for k, v in of.items()})
    return join(parts, lead)


def join(parts, axis=0):
    """Aux of consecutive spans, by kind, along the axis of layers."""
    kinds = sorted({k for part in parts for k in part})
    by_kind = {k: [part[k] for part in parts if k in part] for k in kinds}
    return {k: jax.tree.map(lambda *a: jnp.concatenate(a, axis), *v) for k, v in by_kind.items()}


def check_layers(kinds, layers):
    """Raises `ValueError` where a kind has no layer, or not as many as it stands in `kinds`."""
    if not kinds:
        raise ValueError("kinds is empty: spell at least one sublayer, such as 'am'")
    for kind in sorted(set(kinds)):
        if kind not in layers:
            known = ", ".join(map(repr, sorted(layers)))
            raise ValueError(f"kinds spells {kind!r}, which layers does not have (it has {known})")
        for path, leaf in jax.tree.leaves_with_path((layers[kind].params, layers[kind].inputs)):
            if jnp.shape(leaf)[:1] != (kinds.count(kind),):
                raise ValueError(
                    f"layers[{kind!r}] leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: its "
                    f"first axis must be {kinds.count(kind)}, how often {kind!r} stands in kinds"
                )
