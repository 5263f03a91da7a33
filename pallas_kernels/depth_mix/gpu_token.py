"""The kernels of a single read in Mosaic GPU, as one warpgroup sees them; see gpu_single.py."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import BF16, F32
from pallas_kernels.mosaic import LANES, PROCESSORS, WARPS, SharedRow

# [rows, warps]: of each row, in one lane, a number from each warp; the same in all warps.
PARTS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, LANES, WARPS),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
).reduce(0)
BY_LANE = PARTS.reduce(1)  # [rows]


@dataclass(frozen=True)
class Tile(SharedRow):
    """How a call is cut: warpgroups of a program, slots of its rings, programs that share a processor.

    `together` rows are summed or mixed in one step, so that one waits while another is added up.
    """

    tokens: int
    D: int
    groups: int
    slots: int
    given_slots: int
    resident: int
    together: int

    @property
    def programs(self):
        """Size of the grid."""
        return min(PROCESSORS * self.resident, self.tokens)

    @property
    def vector(self):
        """Columns of one access of a lane; of eight, more of the sum would be left to add up in the end."""
        return next(v for v in (4, 2) if self.D // self.groups % (WARPS * LANES * v) == 0)

    def ring(self, slots):
        """Shared memory for `slots` rows, and a barrier for each warpgroup and slot."""
        return plgpu.SMEM((slots, *self.folded), BF16), plgpu.Barrier(num_barriers=self.groups * slots)


class Stream:
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
        """Start the copy of the next row, into the slot released longest ago; returns where to go on."""
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

    def of_row(self, row, use):
        """`use` that row of the array it is in."""

        def branch(k):
            return lambda: use(self.arrays[k].at[row - self.first[k]])

        which = sum(((row >= first).astype(jnp.int32) for first in self.first[1:-1]), jnp.int32(0))
        lax.switch(which, [branch(k) for k in range(len(self.arrays))])


class Single:
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

    def chunks(self, ref):
        """The same, a chunk at a time: what is summed over a row is then one chain of additions each."""
        count, *_ = self.tile.part
        parts = [ref.at[self.group * count + k] for k in range(count)]
        return [plgpu.load(part, layout=self.tile.layout, optimized=False).astype(F32) for part in parts]

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

    def sum_rows(self, stream, slot, turn, other, squares):
        """Leave `other . v` (and `v . v`) of a token's rows from `slot` on where all warpgroups find them."""

        def dot(a, b):
            return jnp.sum(sum(x * y for x, y in zip(a, b, strict=True)), 1)

        @pl.loop(0, self.steps_over_rows())
        def _(i):
            for row, present in self.several(i):
                pl.when(present)(partial(stream.arrived, stream.slot(slot + row)))
            rows = [self.chunks(self.r.rows.at[stream.slot(slot + row)]) for row, _ in self.several(i)]
            sums = [[dot(v, other), dot(v, v)] if squares else [dot(v, other)] for v in rows]
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
        r, stream = self.r, Stream(self, self.sources, self.lengths, self.r.rows, self.r.full)
        front = stream.fill(self.tile.slots)
        w = self.chunks(r.w)

        def step(b, carry):
            slot, front = carry
            turn, t = lax.rem(b, 2), self.token(b)
            self.sum_rows(stream, slot, turn, w, squares=True)
            self.softmax(t, *self.exchanged(turn), eps)

            def mix(i, carry):
                total, front = carry
                for row, present in self.several(i):
                    weight = jnp.where(present, r.numbers[self.group, 0, row], 0.0)
                    total += weight * self.load(r.rows.at[stream.slot(slot + row)])
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
        """Of step b: logits, rstd, lse and its cotangent. Beyond the last step, of the last token."""
        r, t = self.r, lax.min(self.token(b), self.tile.tokens - 1)
        return self.lanes(r.stats.at[0, t]), self.lanes(r.stats.at[1, t]), r.lse[t], r.d_lse[t]

    def backward(self, given):
        """All tokens of this program, then its sum of dw."""
        r = self.r
        outs = [getattr(r, f"d_source{k}") for k in range(len(self.sources))]
        # A token's first row is its cotangent. One slot is left empty: the first token releases two.
        self.stream = Stream(self, [r.d_mixture, *self.sources], [1, *self.lengths], r.rows, r.full)
        front = self.stream.fill(self.tile.slots - 1)
        ring = (r.given, r.given_full) if given else (r.rows, r.full)
        self.results = Stream(self, outs, self.lengths, *ring)
        behind = (*self.results.fill(self.tile.given_slots), jnp.int32(0)) if given else ()
        w = self.load(r.w)

        def step(b, carry):
            kept, slot, front, behind, dw = carry
            following = self.kept(b + 1)  # one step ahead: its latency is hidden
            self.stream.arrived(slot)
            d = self.load(r.rows.at[slot])
            first = self.stream.slot(slot + 1)
            self.sum_rows(self.stream, first, lax.rem(b, 2), self.chunks(r.rows.at[slot]), squares=False)
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
            plgpu.copy_smem_to_gmem(self.r.rows.at[at, self.cols], out.at[t, self.cols], commit_group=False)

        self.results.of_row(i, copy)
        plgpu.commit_smem_to_gmem_group()
