"""Timing of kernels, as far as a CPU shows it: who gets a speed and who a reason, and for the same work."""

import importlib
import importlib.util
import json
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.bench import arms, commands, kernels, peers, step, work
from attnres_jax.bench.arms import Ready, Unsupported
from attnres_jax.bench.work import Work

SMALL = Work("mix", 300, 16, 3, 2, True)
WORKS = [
    SMALL,
    SMALL._replace(task="merge", reads=1),
    SMALL._replace(task="block", reads=3),
    SMALL._replace(sources=1, reads=1),
    SMALL._replace(task="block", reads=1, dtype="float32"),
    SMALL._replace(task="block", backward=False),
]
GIVEN = [pytest.param(w, marks=pytest.mark.slow if i > 2 else ()) for i, w in enumerate(WORKS)]


def identify(value):
    return f"{value.task}-S{value.reads}-{value.dtype}{'' if value.backward else '-forward'}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little input, a small copy."""
    monkeypatch.setitem(kernels.SCALES, "cpu", kernels.Scale(1, 0, 1 << 16, 0.0))


def test_inputs_of_many_reads():
    drawn = work.draw(Work("block", 2, 4, 2, 64, True), 0)
    assert len(drawn.arguments["y"]) == 64


def test_a_step_with_kernels_of_another_device():
    """Said before a corpus is read."""
    with pytest.raises(configs.UserError, match="--implementation=gpu runs on gpu, this is cpu"):
        step.measure(configs.base.get_config(), 1, implementation="gpu")


def speed(found):
    return found.get("median_seconds")


def changed(change, work, sets, repeats):
    """The arm "xla" with its results changed."""
    arm = arms.make("xla", work, sets, repeats)
    return arm._replace(results=lambda inputs: change(arm.results(inputs)))


@pytest.mark.parametrize("given", GIVEN, ids=map(identify, WORKS))
def test_our_ops_are_the_equations(given):
    found = kernels.measure(given, kernels.makers(["xla"]), rounds=2)["arms"]["xla"]
    assert speed(found) > 0
    assert max(found["errors"].values()) < (5e-3 if given.dtype == "bfloat16" else 1e-6)
    names = {"mix": "mixture", "merge": "x stream", "block": "x summary"}[given.task].split()
    wanted = {"mix": "w sources", "merge": "w scale lse mixture stream", "block": "w scale sources y"}
    names += [f"d_{name}" for name in wanted[given.task].split()] if given.backward else []
    assert set(found["errors"]) == set(names)


CHANGES = {
    "a result is off": lambda r: r | {"mixture": r["mixture"] * 1.05},
    "a cotangent is off": lambda r: r | {"d_w": r["d_w"] * 0.95},
    "not a number": lambda r: r | {"d_sources": r["d_sources"].at[0, 0, 0].set(jnp.nan)},
    "a token is missed": lambda r: r | {"mixture": r["mixture"].at[:, -1].set(0)},
    # Of 300 tokens 256 are compared: this one is not, and nothing may come from it.
    "another token has one": lambda r: r | {"d_sources": r["d_sources"].at[:, unseen()].set(9)},
}


def unseen():
    return min(set(range(SMALL.tokens)) - set(work.places(SMALL.tokens)))


@pytest.fixture(scope="module")
def right():
    """Results of a right arm, and the truth."""
    inputs = work.sampled(work.draw(SMALL, 0), SMALL)
    return arms.make("xla", SMALL, [inputs], 1).results(inputs), work.truth(inputs, SMALL)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_wrong_is_seen(change, right):
    results, want = right
    assert not kernels._wrong(work.errors(results, want, SMALL), work.LIMIT["bfloat16"])
    found = kernels._wrong(work.errors(change(results), want, SMALL), work.LIMIT["bfloat16"])
    assert found.startswith("wrong: ")


def raises(error, work, sets, repeats):
    raise error


def test_what_fails_stays_with_its_reason():
    chosen = kernels.makers(["xla", "tpu"]) | {
        "off": partial(changed, CHANGES["a result is off"]),
        "broken": partial(raises, ZeroDivisionError("no\nsuch kernel")),
        "elsewhere": partial(raises, Unsupported("D must be a power of two")),
        "incomplete": partial(changed, lambda r: {"mixture": r["mixture"]}),
        "misshapen": partial(changed, lambda r: r | {"d_w": r["d_w"][:1]}),
    }
    row = kernels.measure(SMALL, chosen, rounds=2)
    reasons = {name: found.get("reason") for name, found in row["arms"].items()}
    assert reasons["xla"] is None
    assert reasons["tpu"] == "runs on tpu, this is cpu"
    assert reasons["off"] == "wrong: mixture is off by 0.047, the limit is 0.02"  # 1.05 in bf16
    assert "over_fastest_peer" not in row["arms"]["xla"]
    assert reasons["broken"] == "ZeroDivisionError: no"
    assert reasons["elsewhere"] == "D must be a power of two"
    assert "['d_sources', 'd_w'] are missing" in reasons["incomplete"]
    assert "d_w must be (2, 16)" in reasons["misshapen"]
    assert [bool(speed(found)) for found in row["arms"].values()] == [True] + [False] * 6
    table = "\n".join(kernels.lines(row))
    assert all(reason in table for reason in reasons.values() if reason)


def late(seconds, work, sets, repeats):
    """An arm whose every call takes so long more."""
    arm = arms.make("xla", work, sets, repeats)

    def wait(handle):
        arm.wait(handle)
        time.sleep(seconds * arm.calls)

    return arm._replace(wait=wait)


def test_the_fastest_peer_is_the_measure():
    chosen = {"slow": partial(late, 0.2), "peer": partial(late, 0.05), **kernels.makers(["xla"])}
    row = kernels.measure(SMALL, chosen, rounds=3)
    found = row["arms"]
    assert speed(found["peer"]) < speed(found["slow"])  # which sleep
    over = found["xla"]["over_fastest_peer"]
    assert over["peer"] == "peer"
    assert over["median"] > 1
    assert over["95_percent"][0] <= over["median"] <= over["95_percent"][1]
    peer = found["peer"]
    assert peer["bytes_per_second"] * speed(peer) == pytest.approx(SMALL.bytes)
    assert peer["share_of_copy"] == pytest.approx(peer["bytes_per_second"] / row["copy_bytes_per_second"])
    assert np.shape(peer["seconds"]) == (3, 2)


def test_seconds_are_of_one_call():
    """Of two starts of three calls, 60 ms each: 20 ms."""
    arm = Ready(lambda _: {}, lambda: time.sleep(0.06), lambda _: None, 3)
    seconds = kernels.time_in_turns({"a": arm}, rounds=2, least=0.09)["a"]
    assert 0.02 <= np.median(seconds) < 0.06  # of one, not of three


def test_turns_last_long_enough(monkeypatch):
    started = []  # each takes 0.01 s
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: 0.01 * len(started))
    arm = Ready(lambda _: {}, lambda: started.append(0), lambda _: None, 1)
    kernels.time_in_turns({"a": arm}, rounds=1, least=0.045)
    assert len(started) == 2 + 2 * 5


def test_calls_are_chained_through_the_sets():
    """A program of several calls does each: as many kernels' worth of work as it says."""
    few = SMALL._replace(backward=False)
    sets = [work.draw(few, seed) for seed in range(2)]
    assert arms.make("xla", few, sets[:1], 1).calls == 1
    arm = arms.make("xla", few, sets, 3)
    assert arm.calls == 6
    last = sets[0]._replace(arguments=jax.tree.map(lambda a: 0 * a, sets[0].arguments))
    first = [arm.start(), arms.make("xla", few, [sets[1], sets[0]], 3).start()]
    assert first[0] != first[1]  # by the last set's results
    assert arms.make("xla", few, [sets[1], last], 1).start() == 0


def test_the_inputs_exceed_a_cache():
    """Small works take several sets and starts of several calls; a large one is enough by itself."""
    scale = kernels.Scale(1 << 29, 1 << 31, 0, 0)
    small, large = Work("merge", 8192, 2048, 8, 1, False), Work("block", 32768, 7168, 8, 12, True)
    sets, repeats = kernels.plan(small, scale)
    assert sets * 4 * 8192 * 2048 * 2 >= 1 << 29  # mixture, stream and the cotangents
    assert sets * repeats * small.bytes >= 1 << 31
    assert kernels.plan(large, scale) == (1, 1)


def test_least_bytes_by_hand():
    array = 300 * 16 * 2
    assert SMALL._replace(backward=False).bytes == (3 + 2) * array
    assert SMALL.bytes == (3 + 2 + 3 + 2 + 3) * array
    assert SMALL._replace(task="merge").bytes == (3 + 6) * array
    block = SMALL._replace(task="block", reads=2)
    phase_1, first, other, add = 3 + 2, 2, 3, 3
    assert block._replace(backward=False).bytes == (phase_1 + first + other + add) * array
    assert block.bytes == (phase_1 + first + other + add + 6 + 3 + 3 + 2 + 3) * array


def test_works_are_each_once_and_the_blocks_first():
    args = {"tokens": [8, 16], "width": [4, 8], "sources": 8, "reads": [6, 12], "tasks": kernels.TASKS}
    found = list(kernels.works(args))
    assert len(found) == len(set(found)) == 2 * 2 * 2 * (2 + 3 + 1)
    assert found[0] == Work("block", 8, 4, 8, 12, True)
    assert {w.sources for w in found if w.reads == 1 and w.task == "mix"} == {9}
    assert {w.task for w in kernels.works(args | {"tasks": ["merge"]})} == {"merge"}


def test_the_command_names_what_there_is():
    """It declares its choices without importing what makes them."""
    parser = __main__._Parser()
    commands._kernels_arguments(parser)
    args = parser.parse_args([])
    assert tuple(args.arms) == kernels.OURS + kernels.PEERS
    assert tuple(args.tasks) == kernels.TASKS


def test_the_session_names_what_there_is():
    """The script for a GPU is sound, and what it asks for exists."""
    script = Path(__file__).with_name("h200_session.sh")
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text().replace("\\\n", " ")
    (words,) = re.findall(r"-m attnres_jax (bench kernels .*)", text)
    args = __main__._parse([w for w in words.split() if w != '"${runs[@]}"'])
    assert tuple(args.arms) == kernels.PEERS
    (words,) = re.findall(r"-m attnres_jax (bench step .*)", text)
    keys = re.search(r"keys=\((.*?=8)\)\n", text, re.DOTALL)[1]
    keys = re.sub(r"\$\(\(.*?\)\)", "128", keys.replace("$width", "2304"))
    shown = words.replace('"${keys[@]}"', keys).replace('"$implementation"', "gpu")
    args = __main__._parse(shown.replace('"', "").split())
    assert configs.load(args.config, args.overrides).model.width == 2304


def test_end_to_end(tmp_path, capsys, monkeypatch):
    """One JSON line a work, and the table; what there is no time for is in both."""
    out, now = tmp_path / "new" / "kernels.jsonl", iter([0.0, 1.0, 2.0, 3.0, 100.0])
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(now, 1000.0))
    words = "bench kernels --tokens 40 --width 16 --sources 2 --reads 2 --tasks merge --rounds 2 --minutes 1"
    assert __main__.main([*words.split(), "--arms", "xla", "fla-core", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["backward"] for row in rows] == [True, False]
    assert speed(rows[0]["arms"]["xla"]) > 0
    assert not speed(rows[0]["arms"]["fla-core"])
    assert rows[1]["reason"] == "not run: out of time"
    assert rows[0].keys() >= {"device", "versions", "commit", "least_bytes", "copy_bytes_per_second"}
    printed, table = capsys.readouterr().out, out.with_suffix(".md").read_text()
    assert table in printed
    assert "| merge forward, D=16, 40 tokens, R=2, S=1 | | | | | | | | not run: out of time |" in table


@pytest.mark.parametrize("name", kernels.PEERS)
def test_a_peer_that_cannot_run_says_why(name):
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")
    with pytest.raises(Unsupported, match=r"is not installed|finds no NVIDIA GPU"):
        peers.make(name, SMALL, [work.draw(SMALL, 0)], 1)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def plain(torch, **changes):
    """The read in PyTorch's own ops, in the place of a peer's."""
    eps, norm = work.EPS, peers._norm(torch)

    def rows(sources):
        return sources if torch.is_tensor(sources) else torch.stack(sources)

    def scores(w, v):
        v = v.float()
        return (w.float() * v).sum(-1) * (v.square().mean(-1) + eps).rsqrt()

    def read(w, sources):
        v = rows(sources)
        return (scores(w, v).softmax(0)[..., None] * v.float()).sum(0).to(v.dtype)

    def first(ws, sources):
        lse = [scores(w, rows(sources)).logsumexp(0) for w in ws]
        return torch.stack([read(w, sources) for w in ws]), torch.stack(lse)

    def second(p, w, mixture, lse):
        gate = (scores(w, p) - lse).sigmoid()[..., None]
        return (mixture.float() + gate * (p.float() - mixture.float())).to(p.dtype)

    made = {
        "reads": {"reads": lambda ws, v: torch.stack([read(w, v) for w in ws])},
        "normed": {"normed": lambda w, v, scale: norm(read(w, v), scale)},
        "phases": {"phases": (first, second), "whole": True},
    }
    return peers.Peer(read, norm, **(made.get(changes.pop("how", "")) or changes))


FORMS = [{}, {"whole": True}, {"query": "bfloat16"}, {"how": "reads"}, {"how": "normed"}, {"how": "phases"}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=map(identify, WORKS))
def test_peers_do_the_same_work(form, given, torch):
    """All ways of calling a peer, with PyTorch's ops in the place of its kernels."""
    peer = plain(torch, **form)
    chosen = {"peer": partial(peers.ready, torch, peer)}
    found = kernels.measure(given, chosen, rounds=2)["arms"]["peer"]
    if given.task == "merge" and not peer.phases:
        assert found["reason"] == "has no merge: its reads take all sources"
        return
    if peer.query == "bfloat16" and given.dtype == "float32":
        assert found["reason"].startswith("wrong: d_w is off by 0.00")  # of the query's rounded gradient
        return
    assert "reason" not in found, found
    assert speed(found) > 0
    assert max(found["errors"].values()) < (1e-2 if given.dtype == "bfloat16" else 1e-5)
