"""The GPU kernels on a GPU against the equations in fp64: `python tests/on_gpu.py gpu`, or `triton`.

Large and odd shapes, then those of test_kernels_gpu.py; one line each, exit code 1 if any is off. A second
argument is the seconds after which no other row is begun; a third, as 2/4, the second of four equal parts of
the rows, for several processes at once. A kernel that waits for ever has to be stopped from outside.
"""

import importlib
import sys
import time
import traceback
from itertools import islice, zip_longest

import jax
import test_kernels_gpu as checks
from test_kernels_gpu import BF16

LARGE_MERGE = [  # tokens, D, S, dtype, norm, y, j, first, keep
    (1023, 2048, 6, BF16, True, False, 3, False, False),
    (513, 7168, 6, BF16, True, False, 3, False, False),
    (1023, 2304, 6, BF16, True, True, 5, False, True),
    (513, 4096, 3, BF16, True, False, 0, True, False),
    (1023, 4096, 3, BF16, True, False, 1, False, False),
]
LARGE_MIX = [  # S, rows of each array, visible of them, tokens, D, given; first those that no GPU has run
    (1, [1, 1, 8], [None, None, 7], 2047, 2048, True),
    (1, [1, 8], [None, 7], 1023, 4096, True),
    (1, [9], [None], 513, 7168, False),
    (6, [1, 1, 6], [None, None, 4], 1023, 2304, False),
    (1, [16], [None], 67, 7168, True),
    (16, [16], [None], 259, 1024, True),
    (12, [9], [7], 513, 7168, True),
    (17, [9], [None], 1023, 2048, True),
    (1, [9], [None], 1023, 4096, False),
    (1, [9], [None], 1023, 2048, False),
    (1, [9], [None], 1023, 2304, True),
    (1, [9], [None], 513, 7168, True),
    (1, [16], [None], 259, 4096, True),
]
TRITON_ONLY = [(3, [4], [3], 63, 1000, True), (2, [2], [None], 8191, 960, False)]


def rows(backend):
    """A name, the check, and its arguments."""
    merge = importlib.import_module(f"pallas_kernels.depth_merge.{backend}")
    mix = importlib.import_module(f"pallas_kernels.depth_mix.{backend}")

    def read(tokens, D, S, dtype, norm, y, j, first, keep):
        a = checks.merge_inputs(tokens, D, S, dtype, norm=norm, y=y)
        return f"merge {tokens} x {D} {a.stream.dtype}", checks.check_merge, (merge, a, j, first, keep)

    def reads(S, lengths, counts, tokens, D, given):
        roundings = -(-S // 16) if backend == "gpu" else 1
        arguments = (mix, S, lengths, counts, tokens, D, BF16, given, jax.jit, roundings)
        return f"mix {lengths} S={S} {tokens} x {D}", checks.check_mix, arguments

    odd = TRITON_ONLY if backend == "triton" else ()
    for one, several in zip_longest(LARGE_MERGE, (*LARGE_MIX, *odd)):  # both early
        yield from ([read(*one)] if one else []) + ([reads(*several)] if several else [])
    yield from (read(*row) for row in values(checks.MERGE))
    yield from (reads(*row) for row in values(checks.MIX))


def values(parameters):
    """Of pytest's parameters."""
    return [p.values for p in parameters]


def main(backend, seconds="inf", part="1/1"):
    """Check every row; the number of those that are off."""
    first, parts = map(int, part.split("/"))
    begun = time.monotonic()
    jax.config.update("jax_default_matmul_precision", "highest")  # of the equations
    checks.SUMS[checks.F32] = 2e-5  # tensor cores cut off what their sums do not hold
    print(f"{backend} on {jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    failed, late = 0, 0
    for name, check, arguments in islice(rows(backend), first - 1, None, parts):
        start = time.monotonic()
        if start - begun > float(seconds):
            late += 1
            print(f"no time for {name}", flush=True)
            continue
        try:
            check(*arguments)
        except Exception as error:  # every row is to be seen
            failed += 1
            reason = str(error).strip().partition("\n")[0] or traceback.format_exc().splitlines()[-3].strip()
            print(f"FAILED {name}: {type(error).__name__} {reason[:300]}", flush=True)
        else:
            print(f"ok {name} {time.monotonic() - start:.1f} s", flush=True)
    print(f"{failed} failed, {late} not run", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
