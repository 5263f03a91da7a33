"""Kill a run with SIGKILL at random moments, start it again, and look at what is left each time.

    python tests/sigkill.py --kills=100 --seed=0 --folder=/tmp/killed

After every kill no checkpoint that was finished is lost but by the rule of those kept, all are whole, and
the next start goes on from the newest. At last the run equals one that was never killed, bit for bit.
"""

import argparse
import random
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cluster

from attnres_jax.train import checksums, workdir

KEEP = 3
CHANGES = {"train__steps": 1_000_000, "checkpoint__every": 5, "checkpoint__keep": KEEP}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="empty or not there yet")
    args = parser.parse_args()
    start = time.monotonic()
    kill(args.folder / "killed", args.kills, args.seed)
    compare(args.folder)
    print(f"{args.kills} kills in {time.monotonic() - start:.0f} s: nothing lost, the same bits", flush=True)


def kill(folder, kills, seed):
    """Start and kill; a third of the kills come before the first update, most of the others soon after."""
    rng, newest = random.Random(seed), 0
    for number in range(1, kills + 1):
        early = rng.random() < 1 / 3
        process, said = cluster.start(cluster.command(folder, **CHANGES)), ""
        if early:
            time.sleep(rng.uniform(0, 6))
        else:
            while "compiled the step" not in said:
                line = process.stdout.readline()
                assert line, f"start {number} failed:\n{said}"
                said += line
            begun = re.search(r"updates (\d+) to", said)
            assert int(begun[1]) == newest, f"started from {begun[1]}, {newest} was there"
            time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        newest = look(folder, newest, number, "early" if early else "running")


def look(folder, before, number, when):
    """What is finished is whole, and nothing that should be kept is gone; the newest."""
    steps = cluster.finished(folder)
    for step in steps[-KEEP:]:  # one that is too many may have been half deleted
        damage = checksums.damage(folder / workdir.CHECKPOINTS / str(step))
        assert damage is None, f"kill {number}: checkpoint {step} is damaged: {damage}"
    newest = max(steps, default=0)
    assert newest >= before, f"kill {number}: checkpoint {before} is lost, there are {steps}"
    assert len(steps) >= min(KEEP, newest // CHANGES["checkpoint__every"]) - 1, f"kill {number}: only {steps}"
    print(f"kill {number:>3} ({when}): finished {steps}", flush=True)
    return newest


def compare(folder):
    """A last start, and a run of the same length that was never killed."""
    end = max(cluster.finished(folder / "killed")) + 7
    for name in ("killed", "whole"):
        words = cluster.command(folder / name, **CHANGES, train__stop_after=end)
        code, said = cluster.run(words)
        assert code == 0, said
    assert cluster.losses(folder / "killed") == cluster.losses(folder / "whole")
    written = [folder / name / workdir.CHECKPOINTS / str(end) for name in ("killed", "whole")]
    killed, whole = (arrays(path) for path in written)
    assert killed == whole


def arrays(checkpoint):
    """The bytes of every array."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        found = [reader.restore(checkpoint / item) for item in ("params", "optimizer")]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]


if __name__ == "__main__":
    main()
