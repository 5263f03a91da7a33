"""Sweeps: tables of runs that are pairs, shapes of equal size, and processes that stop and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import cluster
import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.analysis import compare, inspect
from attnres_jax.configs import base, shapes, sweeps
from attnres_jax.train import runs, sweep, workdir

FAKE = """
import json, pathlib, signal, sys, time
folder, steps, how = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with (folder / "times").open("a") as times: times.write(f"start {time.time()}\\n")
if how == "fail": sys.exit("out of luck")
with (folder / "metrics.jsonl").open("a") as rows: rows.write('{"step": 1}\\n')
while how == "wait" and not stopped: time.sleep(0.01)
time.sleep(0.3)
if not stopped: (folder / "eval.json").write_text(f'{{"step": {steps}}}')
with (folder / "times").open("a") as times: times.write(f"end {time.time()}\\n")
"""
"""In place of training: one row, then the evaluation, at once or never."""


def job(folder, name, how="ok"):
    config = configs.load("quick", ["--config.train.steps=10", "--config.train.log_every=1"])
    path = folder / name
    words = [sys.executable, "-c", FAKE, str(path), "10", how]
    return sweep.Job(path, sweeps.Member(name, config, ()), words)


def starts(job):
    file = job.folder / "times"
    return file.read_text().count("start") if file.is_file() else 0


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_every_row_is_a_legal_config_with_the_keys_it_names(name):
    chosen = sweeps.SWEEPS[name]
    members = sweeps.members(chosen, "quick", ["--config.train.log_every=3"])
    assert len(members) == len({m.name for m in members}) == chosen.seeds * len(chosen.rows)
    for member in members:
        row, seed = member.name.rsplit("-", 1)
        flat = configs.to_flat(member.config)
        expected = chosen.common | chosen.rows[row] | {"seed": int(seed), "train.log_every": 3}
        assert {key: flat[key] for key in expected} == pytest.approx(expected)
        assert re.fullmatch(r"[\w.-]+", member.name)
    flat = [configs.to_flat(member.config) for member in members]
    assert len({json.dumps(each) for each in flat}) == len(flat)


@pytest.mark.parametrize("name", ["table4", "others", "block_size"])
def test_rows_of_a_seed_are_pairs(name):
    """What differs is the scheme alone: initial weights, data and their order are the seed's."""
    members = sweeps.members(sweeps.SWEEPS[name], "quick", seeds=2)
    pairs = [compare.pair(configs.to_flat(member.config)) for member in members]
    half = len(pairs) // 2
    assert len(set(pairs[:half])) == len(set(pairs[half:])) == 1
    assert pairs[0] != pairs[half]


def test_sizes_and_cells_see_the_same_data_in_the_same_order():
    """What `train_batches` is made of: the text, the length, the batch and the seed."""
    for name in ("scaling", "depth_width"):
        members = sweeps.members(sweeps.SWEEPS[name], "quick", seeds=1)
        data = {(c.data.corpus, c.data.length, c.data.batch, c.seed) for c in (m.config for m in members)}
        assert len(data) == 1
    schemes = [m for m in sweeps.members(sweeps.SWEEPS["scaling"], "quick", seeds=1) if "-d8-" in m.name]
    assert len({compare.pair(configs.to_flat(member.config)) for member in schemes}) == 1
    assert len(schemes) == 3


def test_every_scheme_is_a_row():
    """Of Table 4 or beside it, and beside it none twice but the plain residual."""
    rows = [keys["residual"] for name in ("table4", "others") for keys in sweeps.SWEEPS[name].rows.values()]
    assert set(rows) == set(base.KEYS["residual"].legal.options)
    assert len(rows) == len(set(rows)) + 1  # plain is in both


def test_table_4_is_the_papers():
    rows = sweeps.TABLE4
    assert rows["baseline"] == {"residual": "plain"}
    assert rows["block-s4"] == {"residual": "block", "block_size": 4}
    assert rows["window"]["window"] == 8
    assert rows["mhc"]["streams"] == 4
    assert rows["block-heads"]["depth_heads"] == 16
    assert len(rows) == 12


@pytest.mark.parametrize("override", ["--config.block_size=2", "--config.seed=7"])
def test_what_a_sweep_varies_is_not_overridden(override):
    with pytest.raises(configs.ConfigError, match=r"is what this sweep varies"):
        sweeps.members(sweeps.SWEEPS["block_size"], "quick", [override])


RATIOS = [(width, heads) for width in (15, 30, 45, 60, 75) for heads in (0.3, 0.4, 0.5, 0.6, 0.7)]


@pytest.mark.parametrize(("width", "heads"), RATIOS)
def test_the_papers_grid_has_equal_parameters(width, heads):
    """Figure 7's 25 cells, as dense models: 2.3e8 parameters, F/D = 0.45."""
    shape = shapes.solve(2.3e8, width, heads, 0.45)
    assert shape.parameters == pytest.approx(2.3e8, rel=shapes.TOLERANCE)
    assert shape.width % (2 * shape.heads) == 0
    assert shape.width / shape.blocks == pytest.approx(width, rel=0.06)
    assert shape.heads / shape.blocks == pytest.approx(heads, rel=0.08)
    assert shape.mlp_width / shape.width == pytest.approx(0.45, rel=0.35)


def test_cells_of_the_sweep_have_equal_parameters_and_compute():
    """Counted by `inspect`: matrices to 1 %, and C = 6 x active parameters x tokens of Block to 2 %."""
    found = []
    for member in sweeps.members(sweeps.SWEEPS["depth_width"], "quick"):
        if not member.name.startswith("block-"):
            continue
        model, shape = configs.model_config(member.config, 256), sweeps.CELLS[member.name[6:-2]]
        assert inspect.totals(inspect.parameters(model))["matrix"] == shape.parameters
        assert shape.parameters == pytest.approx(420_000, rel=0.01)
        found.append(inspect.active(model) * member.config.train.steps)
    assert len(found) == 9
    np.testing.assert_allclose(found, np.mean(found), rtol=0.02)
    widths = [shape.width / shape.blocks for shape in sweeps.CELLS.values()]
    np.testing.assert_allclose(widths, np.repeat([4, 8, 16], 3), rtol=0.2)


def test_a_shape_that_cannot_be():
    with pytest.raises(configs.ConfigError, match=r"no shape has 500 parameters with D/L_b = 75"):
        shapes.solve(500, 75, 0.5)


def test_finished_runs_are_left_alone_and_others_made_in_order(tmp_path):
    made = [job(tmp_path, name) for name in ("a", "b", "c")]
    made[0].folder.mkdir()
    (made[0].folder / "eval.json").write_text('{"step": 10}')
    made[1].folder.mkdir()
    (made[1].folder / "eval.json").write_text('{"step": 7}')  # of updates that were lost since
    assert sweep.run(made, 1) == ""
    assert [starts(each) for each in made] == [0, 1, 1]
    assert all(each.finished() for each in made)
    b, c = [(each.folder / "times").read_text().split() for each in made[1:]]
    assert float(b[3]) < float(c[1])  # one after the other
    assert sweep.run(made, 1) == ""
    assert [starts(each) for each in made] == [0, 1, 1]


def test_two_at_a_time(tmp_path):
    made = [job(tmp_path, name) for name in ("a", "b")]
    sweep.run(made, 2)
    (a, b) = [(each.folder / "times").read_text().split() for each in made]
    assert max(float(a[1]), float(b[1])) < min(float(a[3]), float(b[3]))


def test_a_failed_run_is_told_with_its_reason_after_the_others(tmp_path, capsys):
    made = [job(tmp_path, "a", "fail"), job(tmp_path, "b")]
    with pytest.raises(sweep.SweepError, match=r"1 of 2 runs did not finish: a\. .*'out of luck'"):
        sweep.sweep(sweeps.SWEEPS["block_size"], made, 1, tmp_path)
    assert made[1].finished()
    assert f"{made[0].folder}: failed (1), 1 runs left\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["table4", "block_size"])
def test_one_seed_makes_no_pages_and_says_so(name, tmp_path, capsys, monkeypatch):
    compared = []
    monkeypatch.setattr(runs, "compare", lambda *words: compared.append(words))
    made = [job(tmp_path, "a")]
    sweep.sweep(sweeps.SWEEPS[name], made, 1, tmp_path)
    said = "no pages of evidence: their intervals take two seeds (--seeds=2)"
    assert capsys.readouterr().err.count(f"{said}\n") == (name == "table4")
    (tmp_path / "README.md").touch()
    sweep.sweep(sweeps.SWEEPS[name], made, 1, tmp_path)
    again = f"{said}; {tmp_path / 'README.md'} is an earlier sweep's\n"
    assert capsys.readouterr().err.count(again) == (name == "table4")
    assert len(compared) == 2
    assert compared[1][1:4] == (tmp_path, 1, sweeps.SWEEPS[name].page)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_children_and_starts_no_more(number, tmp_path, capsys):
    made = [job(tmp_path, "a", "wait"), job(tmp_path, "b")]

    def tell():
        while not (made[0].folder / "metrics.jsonl").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=tell).start()
    sweep.sweep(sweeps.SWEEPS["block_size"], made, 1, tmp_path)
    assert signal.getsignal(number) == before
    assert f"{number.name}: 2 of 2 runs are not finished" in capsys.readouterr().err
    assert "end" in (made[0].folder / "times").read_text()  # it was let finish what it does on a signal
    assert starts(made[1]) == 0
    sweep.run([job(tmp_path, "a"), made[1]], 1)
    assert all(each.finished() for each in made)


def test_a_folder_of_another_run_is_refused_before_anything_runs(tmp_path):
    flat = configs.to_flat(configs.load("quick:plain"))
    (tmp_path / "s8-1").mkdir()
    (tmp_path / "s8-1/config.json").write_text(json.dumps(flat))
    with pytest.raises(workdir.RunError, match="s8-1 holds a run with seed = 0, not 1"):
        sweep.jobs(sweeps.SWEEPS["block_size"], "quick", (), 2, tmp_path)


def test_only_some_rows(tmp_path, capsys):
    words = ["sweep", "table4", f"--out={tmp_path}", "--rows=full,baseline", "--seeds=2", "--dry-run"]
    assert __main__.main(words) == 0
    folders = re.findall(r"--workdir=\S+/(\S+)", capsys.readouterr().out)
    assert folders == ["full-0", "baseline-0", "full-1", "baseline-1"]


def test_dry_run_prints_commands_that_are_understood(tmp_path, capsys):
    words = ["sweep", "table4", f"--out={tmp_path}", "--seeds=1", "--dry-run", "--config.train.steps=20"]
    assert __main__.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sweeps.TABLE4)
    for line in lines:
        args = __main__._parse(line.split()[3:])
        assert configs.load(args.config, args.overrides).train.steps == 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep table5 --out={0}", "invalid choice: 'table5'"),
        ("sweep table4", "required: --out"),
        ("sweep table4 --out={0} --rows=baseline,ful", "row 'ful' does not exist; did you mean 'full'"),
        ("sweep table4 --out={0} --jobs=0", "'0' is not a whole number from 1"),
        ("sweep table4 --out={0} --config.residual=full", "residual is what this sweep varies"),
        ("sweep table4 --out={0} --config=technicl", "did you mean 'technical'"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, capsys):
    assert __main__.main(words.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_sweep_is_killed_resumed_and_compared(tmp_path):
    """Two real runs: SIGTERM during the first one's updates, then the same command to the end."""
    keys = cluster.TINY | {"train.steps": 100, "train.depth_every": 50, "train.eval_every": 100}
    keys = {key: value for key, value in keys.items() if key != "block_size"}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    code = (
        "import sys; from attnres_jax.configs import sweeps; from attnres_jax.__main__ import main\n"
        "sweeps.SWEEPS['block_size'] = sweeps.SWEEPS['block_size']._replace(common={}, rows={\n"
        " f's{s}': {'residual': 'block', 'block_size': s} for s in (1, 2)})\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "sweep", "block_size", f"--out={tmp_path}", "--seeds=1", *overrides]
    first = subprocess.Popen(words, env=cluster.environment(), cwd=cluster.ROOT, stderr=subprocess.PIPE)
    cluster.wait_for_step(tmp_path / "s1-0", 1, first)
    first.terminate()
    assert b"SIGTERM: " in first.communicate(timeout=120)[1]
    assert first.returncode == 0
    assert not (tmp_path / "s1-0/eval.json").exists()
    assert not (tmp_path / "s2-0").exists()
    subprocess.run(words, env=cluster.environment(), cwd=cluster.ROOT, check=True)
    text = (tmp_path / "comparison.md").read_text()
    assert "| block S=1 | 1 |" in text
    assert "| block S=2 | 1 |" in text
    page = (tmp_path / "README.md").read_text()
    assert "python -m attnres_jax sweep block_size" in page
    assert re.search(r"\| 2 \| \d+ \| 1 \| \d\.\d+ \| 1\.746 \|", page)
    assert (tmp_path / "block_size.png").stat().st_size > 5000
    steps = [row["step"] for row in workdir.read_rows(tmp_path / "s1-0") if row["kind"] == "train"]
    assert steps == list(range(1, 101))  # none twice, none lost
    assert runs.points([tmp_path / "s1-0"], exact=False)[0].label == "block"
