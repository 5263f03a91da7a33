"""The command line: help, dispatch, and mistakes that end in one line and exit code 2."""

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.analysis import inspect
from attnres_jax.configs.base import KEYS
from attnres_jax.models import sample
from attnres_jax.models.tokenizer import Bytes
from attnres_jax.train import data, evaluate, loop, restored, runs, together, workdir

COMMANDS = ("train", "eval", "sample", "compare", "sweep", "scaling", "inspect", "compile", "data", "bench")


@pytest.fixture
def called(monkeypatch):
    """Replace one function by a stand-in with its signature, and return the stand-in."""

    def replace(module, name, result=None):
        stand_in = create_autospec(getattr(module, name), return_value=result)
        monkeypatch.setattr(module, name, stand_in)
        return stand_in

    return replace


@pytest.fixture
def quick_run():
    return SimpleNamespace(config=configs.load("quick:plain"), model=object(), step=7)


@pytest.mark.parametrize(("finished", "words", "code"), [(True, 1, 0), (False, 1, 75), (False, 0, 0)])
def test_a_stopped_run_says_so_to_launchers(called, finished, words, code):
    called(loop, "train", finished)
    command = ["train", "--config=quick", "--workdir=runs/a", *["--requeue"][:words]]
    if code:
        with pytest.raises(SystemExit) as stopped:
            __main__.main(command)
        assert stopped.value.code == code
    else:
        assert __main__.main(command) == 0


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["--help"])
    assert stopped.value.code == 0
    assert tuple(__main__.COMMANDS) == COMMANDS
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert __main__.COMMANDS[name].purpose in text
    assert (f"  {list(KEYS)[-1]} " in text) == (name in ("train", "inspect", "sweep", "compile"))
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_understood(name, monkeypatch):
    seen = []
    command = __main__.COMMANDS[name]._replace(run=seen.append)
    monkeypatch.setitem(__main__.COMMANDS, name, command)
    assert __main__.main([name, *shlex.split(command.example)]) == 0
    assert seen[0].command == name


def test_train(called):
    train = called(loop, "train")
    words = ["--config=quick:plain", "--workdir=runs/a", "--config.train.steps=20"]
    assert __main__.main(["train", *words, "--config.optim.lr=1e-3"]) == 0
    config, workdir = train.call_args.args
    assert (config.residual, config.train.steps, config.optim.lr) == ("plain", 20, 1e-3)
    assert config.is_locked
    assert workdir == Path("runs/a")


def test_train_several_seeds(called):
    train = called(together, "train")
    assert __main__.main(["train", "--config=quick:full", "--workdir=runs/a", "--seeds=3"]) == 0
    config, seeds, workdir = train.call_args.args
    assert (config.residual, seeds, workdir) == ("full", 3, Path("runs/a"))


def test_eval(called):
    main = called(evaluate, "main")
    assert __main__.main(["eval", "--workdir=a"]) == 0
    assert __main__.main(["eval", "--workdir", "a", "--step=30"]) == 0
    assert [call.args for call in main.call_args_list] == [(Path("a"), None), (Path("a"), 30)]


def test_sample(called, capsys, quick_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, corpus = SimpleNamespace(vocab=256), data.open_corpus("austen")
    of = SimpleNamespace(logits=lambda *args: args, model=model)
    load = called(restored, "restore", restored.Restored(quick_run.config, corpus, of, "params", 7))
    draw = called(sample, "sample", "It was.")
    words = ["--prompt=It", "--length=5", "--seed=3", "--temperature=0.5"]
    assert __main__.main(["sample", "--workdir=a", *words]) == 0
    assert load.call_args.args == (Path("a"), None)
    logits, vocab, tokenizer, prompt, length, key, temperature, window = draw.call_args.args
    assert logits("tokens", 3) == ("params", "tokens", 3)
    assert tokenizer == Bytes(end=None)
    assert (vocab, prompt, length) == (256, "It", 5)
    assert (temperature, window) == (0.5, 128)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))
    assert capsys.readouterr().out == "It was.\n"


def test_compare(called):
    compare = called(runs, "compare")
    assert __main__.main(["compare", "a", "b", "--out=c"]) == 0
    assert compare.call_args.args == ([Path("a"), Path("b")], Path("c"))


def test_inspect(called, quick_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report, load = called(inspect, "report"), called(workdir, "load_config", quick_run.config)
    words = ["--config=quick:block", "--config.block_size=3", "--config.data.length=9"]
    assert __main__.main(["inspect", *words]) == 0
    model, length = report.call_args.args
    assert (model.vocab, model.block_size, model.residual, length) == (256, 3, "block", 9)
    assert not load.called
    assert __main__.main(["inspect", "--workdir=a"]) == 0
    assert report.call_args.args[0] == configs.model_config(quick_run.config, 256)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --workdir=a", "required: --config"),
        ("train --config=quick", "required: --workdir"),
        ("train --config=quik --workdir=a", "did you mean 'quick'"),
        ("train --config=quick:blok --workdir=a", "did you mean 'block'"),
        ("train --config=quick --workdir=a --config.train.step=1", "did you mean 'train.steps'"),
        (
            "train --config=quick --workdir=a --config.train.steps 1",
            "'1' is not understood by train",
        ),
        ("train --config=quick --workdir=a --config.train.steps", "--config.KEY=VALUE"),
        ("train --config=quick --workdir=a --steps=1", "'--steps=1' is not understood by train"),
        ("train --conf=quick --workdir=a", "required: --config"),
        ("train --config=quick --workdir=gs://a/b", "'gs://a/b' is no path: mount it"),
        ("eval --workdir=a --config.seed=1", "'--config.seed=1' is not understood by eval"),
        ("inspect --workdir=a --config.seed=1", "'--config.seed=1' is not understood by inspect"),
        ("inspect", "--config --workdir is required"),
        ("inspect --config=quick --workdir=a", "not allowed with"),
        ("sample --workdir=a", "required: --prompt"),
        ("sample --workdir=a --prompt=It --length=ten", "'ten' is not a whole number"),
        ("sample --workdir=a --prompt=It --temperature=-1", "'-1' is not a number from 0"),
        ("sample --workdir=a --prompt=It --temperature=nan", "'nan' is not a number from 0"),
        ("data --text=a --out=b", "required: action"),
        ("data fetch --text=a --out=b", "invalid choice: 'fetch'"),
        ("data prepare --text=a --out=b --heldout=nan", "'nan' is not a number between 0 and 1"),
        ("compare a b", "required: --out"),
        ("compare --out=c", "required: DIR"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert __main__.main(words.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_errors_of_commands_end_in_one_line(called, capsys):
    called(loop, "train").side_effect = data.DataError("corpus 'x' is damaged")
    assert __main__.main(["train", "--config=quick", "--workdir=a"]) == 2
    assert capsys.readouterr().err == "error: corpus 'x' is damaged\n"


@pytest.mark.parametrize(
    "words",
    [
        "eval --workdir={0}",
        "sample --workdir={0} --prompt=It",
        "compare {0} {0} --out={0}/out",
        "inspect --workdir={0}",
    ],
)
def test_a_folder_that_is_no_run(words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert __main__.main(words.format(folder).split()) == 2
        error = capsys.readouterr().err
        assert str(folder) in error
        assert error.count("\n") == 1


def test_bugs_are_shown_whole(called):
    called(loop, "train").side_effect = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        __main__.main(["train", "--config=quick", "--workdir=a"])


def test_a_mistake_is_answered_before_jax_starts():
    """As a process: exit code 2, one line, and nothing heavy imported on the way."""
    code = (
        "import sys; from attnres_jax.__main__ import main\n"
        "code = main(['train', '--config=quick', '--workdir=a', '--config.model.heads=3'])\n"
        "heavy = {'flax', 'grain', 'orbax', 'optax', 'matplotlib', 'tensorboardX'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: model.heads = 3")
    assert result.stderr.count("\n") == 1


def test_console_script_is_main():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"attnres-jax": "attnres_jax.__main__:main"}
