"""Phase 1 of one query in Pallas Mosaic GPU: every row of the sources is read once in each direction.

A program is a few warpgroups that share a token at a time (each D / groups columns) and walks over tokens
in strides of the grid. The visible rows of its tokens stream through a ring of shared memory, one row a
slot, as many rows ahead as there are slots: a token needs no whole number of slots.

    forward     v.w and v.v of each row as it arrives, softmax, the mixture from the same slots
    backward    dO.v of each row as it arrives, d_logits, then each row's cotangent in the slot of the row,
                from where it is copied out; what was given streams through a ring of its own

Bytes per token, in rows of D, for n visible rows: forward n + 1, backward 2n + 1, and n more where
cotangents were given. Sums of a row stay inside a warp until they are in `exchange`; there a lane takes
the sums of one row from all warps, and softmax and its cotangent are a few operations on 32 lanes. dw is
summed in registers and leaves as [programs, D]: fixed order, no atomics. A row beyond its array's count is
in no slot and costs nothing.

stats: logits and rstd of the visible rows, in their order, [2, tokens, 32] fp32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import BF16, COLUMNS, F32, named
from pallas_kernels.depth_mix.vjp import Forward
from pallas_kernels.mosaic import PROCESSORS, SHARED_BYTES, run, shaped

WARPS, LANES = 4, 32  # of a warpgroup, of a warp
BARRIERS, REGISTERS = 32, 65536  # of one scratch, at most; of a processor
WIDEST = 32  # columns of a thread: w, dO and dw of more would spill
# [rows, warps]: of each row, in one lane, a number from each warp; the same in all warps.
PARTS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANES, WARPS),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
).reduce(0)
BY_LANE = PARTS.reduce(1)  # [rows]


class Tile(NamedTuple):
    """How a call is cut: warpgroups of a program, slots of its rings, programs that share a processor.

    `together` rows are summed or mixed in one step, so that one waits while another is added up. `synced` is
    Mosaic's own barrier before and after every store; the kernels place those that they need themselves.
    """

    tokens: int
    D: int
    groups: int
    slots: int
    given_slots: int
    resident: int
    together: int
    synced: bool = True

    @property
    def programs(self):
        """Size of the grid."""
        return min(PROCESSORS * self.resident, self.tokens)

    @property
    def vector(self):
        """Columns of one access of a lane; of eight, more of the sum would be left to add up in the end."""
        return next(v for v in (4, 2) if self.D // self.groups % (WARPS * LANES * v) == 0)

    @property
    def folded(self):
        """A row as [chunks, warps, columns of a warp]."""
        columns = LANES * self.vector
        return self.D // (WARPS * columns), WARPS, columns

    @property
    def part(self):
        """What one warpgroup has of `folded`."""
        chunks, *rest = self.folded
        return chunks // self.groups, *rest

    @property
    def layout(self):
        """Registers of one warpgroup's columns, so that sums over columns need no other warp."""
        tiling = plgpu.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def fold(self, a):
        """[..., D] as `folded`."""
        return a.reshape(*a.shape[:-1], *self.folded)

    def ring(self, slots):
        """Shared memory for `slots` rows, and a barrier for each warpgroup and slot."""
        return plgpu.SMEM((slots, *self.folded), BF16), plgpu.Barrier(num_barriers=self.groups * slots)


def tile_of(tokens, D, R, *, backward, given=False):
    """The tile of one direction, or None where a token's rows do not fit shared memory.

    Programs of a processor hide each other's latencies: as many as leave a few rows of a next token in flight.
    """
    needed = R + 2 if backward else R + 1  # slots: backward a token has its dO; one is on its way
    wanted = 4 if given else 2  # of them more than that, where programs share a processor
    for resident in range(max(3, 6144 // D), 0, -1):
        # A lone program hides latencies among its own warps.
        groups = next((g for g in _splits(D, needed) if resident > 1 or g > 1), min(_splits(D, needed), default=0))
        if not groups or resident * groups * WARPS * LANES * _registers(D // groups, backward) > REGISTERS:
            continue
        rows = (SHARED_BYTES // resident - 2048 - 2048 * groups) // (2 * D) - (not backward)  # one is staged
        spare, most = rows - needed, BARRIERS // groups
        others = min(R, most, max(2, spare // 2)) if given else 0
        if spare >= others and (resident == 1 or spare >= wanted):
            together = next((n for n in (3, 4, 2) if R % n == 0), 3)
            return Tile(tokens, D, groups, min(most, rows - others), others, resident, together)
    return None


def _splits(D, slots):
    """Numbers of warpgroups that can share a row and have barriers for so many slots; few: sums have few parts."""
    return [
        g
        for g in range(1, 9)
        if D // COLUMNS % g == 0 and D // g <= WIDEST * WARPS * LANES and BARRIERS // g >= slots
    ]


def _registers(columns, backward):
    """At most of a thread, by ptxas, for so many columns of a warpgroup."""
    each = columns // (WARPS * LANES)
    return 50 + 6 * each if backward else 44 + 3 * each


def fits(D, R):
    """Whether both directions have a tile: then a single read runs here."""
    return R <= LANES // 2 and all(
        tile_of(1, D, R, backward=b, given=g) for b, g in ((0, 0), (1, 0), (1, 1))
    )


def forward(w, sources, counts, *, eps, interpret=None):
    """Mixture and lse of the query [1, D]; see the contract in the README of this folder."""
    _, tokens, D = sources[0].shape
    tile = tile_of(tokens, D, sum(map(len, sources)), backward=False)
    rows, full = tile.ring(tile.slots)
    out = run(
        lambda r: _Single(r, tile, sources, counts).forward(eps),
        named([tile.fold(v) for v in sources], counts) | {"w": tile.fold(w[0]), "lane": _lanes()},
        {
            "mixture": shaped((tokens, *tile.folded), BF16),
            "lse": shaped((tokens,)),
            "stats": shaped((2, tokens, LANES)),
        },
        {
            "rows": rows,
            "full": full,
            "out": plgpu.SMEM(tile.folded, BF16),
            **_scratch(tile, sums=2, numbers=1),
        },
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_mix_single_forward",
        interpret=interpret,
        synced=tile.synced,
    )
    return Forward(out.mixture.reshape(1, tokens, D), out.lse[None], out.stats)


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, *, interpret=None):
    """(dw, d_sources), the latter added to what was given, in place."""
    _, tokens, D = sources[0].shape
    if d_sources is None and any(n is not None for n in counts):
        d_sources = tuple(map(jnp.zeros_like, sources))  # of rows that nobody reads
    given = d_sources is not None
    tile = tile_of(tokens, D, sum(map(len, sources)), backward=True, given=given)
    names = [f"d_source{k}" for k in range(len(sources))]
    refs = [jax.new_ref(tile.fold(d)) for d in d_sources] if given else []
    fresh = [] if given else [shaped(tile.fold(v).shape, BF16) for v in sources]
    scratch = dict(zip(("rows", "full"), tile.ring(tile.slots), strict=True))
    if given:
        scratch |= dict(zip(("given", "given_full"), tile.ring(tile.given_slots), strict=True))
    out = run(
        lambda r: _Single(r, tile, sources, counts).backward(given),
        {
            **named([tile.fold(v) for v in sources], counts),
            "w": tile.fold(w[0]),
            "lane": _lanes(),
            "lse": lse[0],
            "d_lse": d_lse[0],
            "stats": stats,
            "d_mixture": tile.fold(d_mixture),
            **dict(zip(names, refs, strict=False)),
        },
        {"dw": shaped((tile.programs, *tile.folded)), **dict(zip(names, fresh, strict=False))},
        scratch | _scratch(tile, sums=1, numbers=3),
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_mix_single_backward",
        interpret=interpret,
        synced=tile.synced,
    )
    results = [ref[...] for ref in refs] if given else [getattr(out, name) for name in names]
    results = tuple(d.reshape(v.shape) for d, v in zip(results, sources, strict=True))
    return jnp.sum(out.dw, 0).reshape(1, D), results


def _lanes():
    return jnp.arange(LANES, dtype=jnp.int32)


def _scratch(tile, sums, numbers):
    """What rows are summed through, two slots in turn, and the numbers of a token's rows."""
    return {
        "exchange": plgpu.SMEM((2, tile.groups, sums, LANES, WARPS), F32),
        "exchanged": plgpu.Barrier(num_arrivals=tile.groups),
        "numbers": plgpu.SMEM((tile.groups, numbers, LANES), F32),
    }


class _Stream:
    """The visible rows of a program's tokens, one after the other, through the slots of a ring."""

    def __init__(self, single, arrays, lengths, ring, full):
        self.single, self.arrays, self.ring, self.full = single, arrays, ring, full
        self.slots = ring.shape[0]
        self.first = [jnp.int32(0)]  # row of each array, and how many there are in all
        for n in lengths:
            self.first.append(self.first[-1] + n)

    def fill(self, slots):
        """Start the first copies; where to go on: the next one's token, row and slot."""
        start = self.single.token(0), jnp.int32(0), jnp.int32(0)
        return lax.fori_loop(0, slots, lambda _, at: self.fetch(at), start)

    def slot(self, at):
        """Of a position less than twice around."""
        return jnp.where(at >= self.slots, at - self.slots, at)

    def arrived(self, slot):
        """Wait for what a slot is to hold."""
        plgpu.barrier_wait(self.full.at[self.single.group * self.slots + slot])

    def fetch(self, at, wanted=True):
        """Start the copy of the next row, into the slot that was released longest ago; then where to go on."""
        token, row, slot = at
        single, more = self.single, token < self.single.tile.tokens
        full = self.full.at[single.group * self.slots + slot]

        def copy(source):
            plgpu.copy_gmem_to_smem(source.at[token, single.cols], self.ring.at[slot, single.cols], full)

        pl.when(more if wanted is True else more & wanted)(lambda: self.of_row(row, copy))
        step = 1 if wanted is True else wanted.astype(jnp.int32)
        row, slot = row + step, self.slot(slot + step)
        last = row == self.first[-1]
        return jnp.where(last, token + single.tile.programs, token), jnp.where(last, 0, row), slot

    def of_row(self, row, use, k=0):
        """`use` the array's row, of array k or one behind it."""
        if k + 1 == len(self.arrays):
            use(self.arrays[k].at[row - self.first[k]])
            return
        here = lambda: use(self.arrays[k].at[row - self.first[k]])
        lax.cond(row < self.first[k + 1], here, lambda: self.of_row(row, use, k + 1))


class _Single:
    """One warpgroup inside a kernel: its columns, its walk over the tokens."""

    def __init__(self, refs, tile, sources, counts):
        self.r, self.tile = refs, tile
        self.group, self.program = lax.axis_index("group"), lax.axis_index("program")
        self.steps = (tile.tokens - self.program + tile.programs - 1) // tile.programs
        self.cols = pl.ds(self.group * tile.part[0], tile.part[0])
        self.sources = [getattr(refs, f"source{k}") for k in range(len(sources))]
        self.lengths = [
            len(v) if n is None else refs.counts[k]
            for k, (v, n) in enumerate(zip(sources, counts, strict=True))
        ]
        self.rows = sum(self.lengths)  # visible ones
        lane = plgpu.load(refs.lane, layout=BY_LANE, optimized=False)
        self.used = lane < self.rows

    def token(self, b):
        """Of step b."""
        return self.program + b * self.tile.programs

    def load(self, ref):
        """This warpgroup's columns, in fp32."""
        return plgpu.load(ref.at[self.cols], layout=self.tile.layout, optimized=False).astype(F32)

    def zeros(self):
        """Of this warpgroup's columns."""
        return plgpu.layout_cast(jnp.zeros(self.tile.part, F32), self.tile.layout)

    def several(self, i):
        """The rows of step i, each with whether there is such a row: else it is the last one again."""
        rows = [i * self.tile.together + u for u in range(self.tile.together)]
        if isinstance(self.rows, int) and self.rows % self.tile.together == 0:
            return [(row, True) for row in rows]
        return [(lax.min(row, self.rows - 1), row < self.rows) for row in rows]

    def steps_over_rows(self):
        """Steps of `several` rows."""
        return (self.rows + self.tile.together - 1) // self.tile.together

    def sum_rows(self, stream, slot, turn, products):
        """Leave sums over each row, of a token's rows from `slot` on, where all warpgroups find them."""

        @pl.loop(0, self.steps_over_rows())
        def _(i):
            for row, present in self.several(i):
                pl.when(present)(partial(stream.arrived, stream.slot(slot + row)))
            rows = [self.load(self.r.rows.at[stream.slot(slot + row)]) for row, _ in self.several(i)]
            sums = [[jnp.sum(jnp.sum(x, 0), 1) for x in products(v)] for v in rows]
            for (row, _), values in zip(self.several(i), sums, strict=True):
                for m, x in enumerate(values):
                    self.r.exchange[turn, self.group, m, row] = x

    def exchanged(self, turn):
        """The sums of all rows, a lane each, once every warpgroup has left its own.

        Two turns: a warpgroup may leave the next sums before another has read these.
        """
        plgpu.barrier_arrive(self.r.exchanged)
        plgpu.barrier_wait(self.r.exchanged)
        _, groups, sums, *_ = self.r.exchange.shape
        return [sum(self.over_warps(turn, g, m) for g in range(groups)) for m in range(sums)]

    def over_warps(self, turn, g, m):
        """What one warpgroup left of all rows."""
        parts = plgpu.load(self.r.exchange.at[turn, g, m], layout=PARTS, optimized=False)
        return jnp.sum(parts, 1)

    def lanes(self, ref):
        """A number for each row."""
        return plgpu.load(ref, layout=BY_LANE, optimized=False)

    def forward(self, eps):
        """All tokens of this program."""
        r, stream = self.r, _Stream(self, self.sources, self.lengths, self.r.rows, self.r.full)
        front = stream.fill(self.tile.slots)
        w = self.load(r.w)

        def step(b, carry):
            slot, front = carry
            turn, t = lax.rem(b, 2), self.token(b)
            self.sum_rows(stream, slot, turn, lambda v: (v * w, v * v))
            self.softmax(t, *self.exchanged(turn), eps)

            def mix(i, carry):
                total, front = carry
                for row, present in self.several(i):
                    weight = r.numbers[self.group, 0, row]
                    total += (weight if present is True else jnp.where(present, weight, 0.0)) * self.load(r.rows.at[stream.slot(slot + row)])
                plgpu.commit_smem()
                for _, present in self.several(i):
                    front = stream.fetch(front, present)
                return total, front

            mixture, front = lax.fori_loop(0, self.steps_over_rows(), mix, (self.zeros(), front))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.out[self.cols] = mixture.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r.out.at[self.cols], r.mixture.at[t, self.cols])
            return stream.slot(slot + self.rows), front

        lax.fori_loop(0, self.steps, step, (jnp.int32(0), front))
        plgpu.wait_smem_to_gmem(0)

    def softmax(self, t, dots, squares, eps):
        """Leave the weights of a token's rows in `numbers`, and its statistics in memory."""
        r = self.r
        rstd = lax.rsqrt(squares * (1.0 / self.tile.D) + eps)
        logits = jnp.where(self.used, dots * rstd, -jnp.inf)
        top = jnp.max(logits)
        lse = top + jnp.log(jnp.sum(jnp.exp(logits - top)))
        r.numbers[self.group, 0] = jnp.exp(logits - lse)
        plgpu.commit_smem()

        @pl.when(self.group == 0)
        def _():
            r.lse[t] = lse
            r.stats[0, t] = logits
            r.stats[1, t] = rstd

    def kept(self, b):
        """Statistics of step b: logits, rstd, lse and its cotangent; of the last token beyond the last step."""
        r, t = self.r, lax.min(self.token(b), self.tile.tokens - 1)
        return self.lanes(r.stats.at[0, t]), self.lanes(r.stats.at[1, t]), r.lse[t], r.d_lse[t]

    def backward(self, given):
        """All tokens of this program, then its sum of dw."""
        r = self.r
        outs = [getattr(r, f"d_source{k}") for k in range(len(self.sources))]
        # A token's first row is its cotangent. One slot is left empty: the first token releases two.
        self.stream = _Stream(self, [r.d_mixture, *self.sources], [1, *self.lengths], r.rows, r.full)
        front = self.stream.fill(self.tile.slots - 1)
        ring = (r.given, r.given_full) if given else (r.rows, r.full)
        self.results = _Stream(self, outs, self.lengths, *ring)
        behind = (*self.results.fill(self.tile.given_slots), jnp.int32(0)) if given else ()
        w = self.load(r.w)

        def step(b, carry):
            kept, slot, front, behind, dw = carry
            following = self.kept(b + 1)  # one step ahead: its latency is hidden
            self.stream.arrived(slot)
            d = self.load(r.rows.at[slot])
            first = self.stream.slot(slot + 1)
            self.sum_rows(self.stream, first, lax.rem(b, 2), lambda v: (v * d,))
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            front = self.stream.fetch(self.stream.fetch(front))  # over the last row, and the cotangent
            self.through_softmax(b, *kept)

            def row(i, carry):
                dw, front, behind = carry
                at = self.stream.slot(slot + 1 + i)
                share = self.cotangent(i, at, w, d, behind)
                plgpu.commit_smem()
                self.send(i, at, self.token(b))
                if behind:
                    behind = (*self.results.fetch(behind[:3]), self.results.slot(behind[3] + 1))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                return dw + share, self.stream.fetch(front, i > 0), behind

            dw, front, behind = lax.fori_loop(0, self.rows, row, (dw, front, behind))
            return following, self.stream.slot(slot + 1 + self.rows), front, behind, dw

        start = (self.kept(0), jnp.int32(0), front, behind, self.zeros())
        r.dw.at[self.program][self.cols] = lax.fori_loop(0, self.steps, step, start)[-1]
        plgpu.wait_smem_to_gmem(0)

    def through_softmax(self, b, logits, rstd, lse, d_lse):
        """Leave a, c and along of a token's rows in `numbers`."""
        (d_weights,) = self.exchanged(lax.rem(b, 2))
        d_weights = jnp.where(self.used, d_weights, 0.0)
        a = jnp.exp(logits - lse)
        c = a * (d_weights - (jnp.sum(a * d_weights) - d_lse)) * rstd
        along = c * logits * rstd * (1.0 / self.tile.D)
        for m, x in enumerate((a, c, along)):
            self.r.numbers[self.group, m] = x
        plgpu.commit_smem()

    def cotangent(self, i, at, w, d, behind):
        """Put the cotangent of row i in the row's slot; returns its share of dw."""
        r = self.r
        a, c, along = (r.numbers[self.group, m, i] for m in range(3))
        v = self.load(r.rows.at[at])
        z = a * d + c * w - along * v
        if behind:
            self.results.arrived(behind[3])
            z += self.load(r.given.at[behind[3]])
        r.rows.at[at][self.cols] = z.astype(BF16)
        return c * v

    def send(self, i, at, t):
        """Start the copy of row i to memory."""

        def copy(out):
            plgpu.copy_smem_to_gmem(
                self.r.rows.at[at, self.cols], out.at[t, self.cols], commit_group=False
            )

        self.results.of_row(i, copy)
        plgpu.commit_smem_to_gmem_group()
