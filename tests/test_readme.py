"""README.md is true: its code runs and learns, its commands are understood, its files exist."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from os.path import normpath
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_launch_scripts as launched
import test_layout
from flax import nnx
from toys import QUICK

from attnres_jax import __main__, configs, residuals
from attnres_jax.analysis import matrix
from attnres_jax.models.table import parameter_table
from attnres_jax.models.transformer import ModelConfig, Transformer
from attnres_jax.stack import through_depth

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def fenced(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Lines of blocks, then what stands between backticks."""
    lines = [line for block in fenced("sh", text) for line in block.splitlines() if line]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`((?:make |python -m |launch/\w+\.|sbatch )[^`]+)`", text)


NAMES = ("LanguageModel", "VisionTransformer", "stacked", "scheme")
CODE = dict(zip(NAMES, fenced("python"), strict=True))
MODELS = ("LanguageModel", "VisionTransformer")
COMMANDS = commands(TEXT)
LAUNCHES = [line for line in commands(launched.README) if re.search(r"launch/\w+\.|python -m ", line)]
(FILE_MAP,) = [[line.split()[0] for line in block.splitlines()] for block in fenced("text")]


@pytest.fixture
def execute(tmp_path):
    """Run code as a script of its own and return its names."""

    def run(code):
        file = tmp_path / "snippet.py"
        file.write_text(code)
        return runpy.run_path(str(file))

    return run


def test_the_language_model_learns(execute):
    """Well below the entropy of single bytes: the context is used, through learned depth weights."""
    names = execute(CODE["LanguageModel"])
    frequency = np.bincount(names["text"]) / len(names["text"])
    entropy = -np.sum(frequency[frequency > 0] * np.log(frequency[frequency > 0]))
    assert np.mean(names["losses"][-10:]) < entropy - 0.4
    assert names["losses"][0] > np.log(256)
    assert learned(names["model"].depth.mix.named())


def test_the_vision_transformer_learns(execute):
    names = execute(CODE["VisionTransformer"])
    said = float(re.search(r"accuracy was (0\.\d+)", TEXT)[1])
    assert names["accuracy"] > 0.9
    assert names["accuracy"] == pytest.approx(said, abs=0.03)
    assert learned(names["params"]["params"]["DepthMix_0"])


def learned(mix):
    """Every query has left zero, but the first: it has one source, hence no gradient."""
    moved = [np.abs(row).max() > 0.01 for row in (*mix["query"], mix["query_out"])]
    return not moved[0] and all(moved[1:])


def test_stacked_layers_are_the_reference(execute):
    """With random queries; forward mode passes in reference mode only, as the text says."""
    names = execute(CODE["stacked"])
    key, kinds, x = jax.random.key(1), "m" * names["L"], names["x"]
    mix = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(key, a.shape), names["mix"])

    def network(x, **options):
        return through_depth(names["scheme"], mix, kinds, names["layers"], x, **options).h

    def literal(x):
        return jax.jvp(partial(network, implementation="reference"), (x,), (x,))

    expected, slope = jax.jit(literal, compiler_options=QUICK)(x)
    assert jnp.linalg.norm(expected - names["h"]) > 0.1 * jnp.linalg.norm(expected)
    assert jnp.linalg.norm(network(x) - expected) < 2e-6 * jnp.linalg.norm(expected)
    assert 0 < jnp.linalg.norm(slope) < jnp.inf
    with pytest.raises(TypeError, match=r'reverse mode only.*implementation="reference"'):
        jax.jvp(network, (x,), (x,))


def test_a_new_scheme_is_a_file_and_a_line(tmp_path, monkeypatch, x64):
    """The file and the line as written: the language model has it, and M is the product of what is kept."""
    (line,) = re.findall(r"the line `(.*?),`", TEXT)
    name, entry = next(iter(eval(f"{{{line}}}", {"Entry": residuals.Entry}).items()))
    (tmp_path / f"{entry.module}.py").write_text(CODE["scheme"])
    monkeypatch.setattr(residuals, "__path__", [*residuals.__path__, str(tmp_path)])
    monkeypatch.setitem(residuals.SCHEMES, name, entry)
    config = ModelConfig(17, 2, 8, 2, 2, 8, residual=name, dtype="float64")
    model = Transformer(config, rngs=nnx.Rngs(0))
    keep = np.array([0.5, 2.0, -1.0, 3.0])
    model.mix.keep[...] = jnp.asarray(keep)
    tokens = jnp.zeros((1, 3), "int32")
    output = model(tokens, record=True)
    M = matrix.depth_matrix(config.scheme, output.depth.record)[:, :, 0, 0, 0]
    expected = [[np.prod(keep[i:l]) if i <= l else 0 for i in range(5)] for l in range(5)]
    np.testing.assert_allclose(M, expected, atol=1e-12)
    np.testing.assert_allclose(model(tokens).logits, output.logits, atol=1e-12)
    assert [row.axes for row in parameter_table(model) if row.path == "mix/keep"] == ["L"]
    monkeypatch.delitem(sys.modules, f"attnres_jax.residuals.{entry.module}")
    assert len(CODE["scheme"].splitlines()) <= 30


@pytest.mark.parametrize("model", MODELS)
def test_four_lines_are_four(model):
    """Numbered 1 to 4, and no other line but an import speaks of depth mixing."""
    lines = CODE[model].splitlines()
    numbers = [re.search(r"  # (\d)\b", line) for line in lines]
    assert [number[1] for number in numbers if number] == ["1", "2", "3", "4"]
    rest = [line for line, number in zip(lines, numbers, strict=True) if not number]
    rest = [line for line in rest if not line.startswith(("import ", "from "))]
    assert not re.search(r"depth|mix|attnres|scheme|residual", "\n".join(rest), re.IGNORECASE)


def before(code):
    """The code without the four lines, and in place of the third what it says it was."""
    was = re.sub(r"\S.*# 3, was: ", "", code)
    return "\n".join(line for line in was.splitlines() if not re.search(r"# [124]$", line))


def definitions(code):
    kept = ast.Import | ast.ImportFrom | ast.ClassDef
    body = [node for node in ast.parse(code).body if isinstance(node, kept)]
    return ast.unparse(ast.Module(body, []))


def test_the_language_model_starts_from_its_plain_self(execute):
    tokens = np.random.default_rng(0).integers(256, size=(2, 64))
    logits = []
    for code in (CODE["LanguageModel"], before(CODE["LanguageModel"])):
        model = execute(definitions(code))["LanguageModel"](2, 64, 64, nnx.Rngs(0))
        logits.append(jax.jit(model, compiler_options=QUICK)(tokens))
    assert not hasattr(model, "depth")
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_the_vision_transformer_starts_from_its_plain_self(execute):
    images = np.random.default_rng(0).standard_normal((2, 8, 8))
    codes = CODE["VisionTransformer"], before(CODE["VisionTransformer"])
    ours, plain = (execute(definitions(code))["VisionTransformer"](blocks=2) for code in codes)
    init = jax.jit(ours.init_with_output, compiler_options=QUICK)
    logits, params = init(jax.random.key(0), images)
    kept = {name: leaf for name, leaf in params["params"].items() if name != "DepthMix_0"}
    assert len(kept) == len(params["params"]) - 1
    expected = jax.jit(plain.apply, compiler_options=QUICK)({"params": kept}, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS + LAUNCHES))
def test_commands_are_understood(line):
    words = shlex.split(line.replace("WORDS", shlex.join(launched.WORDS)), comments=True)
    scripts = [index for index, word in enumerate(words) if word.startswith("launch/")]
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "python":
        check_program(words)
    elif scripts:
        check_launch(words[scripts[0]], words[scripts[0] + 1 :])
    elif words[0] == "tensorboard":
        assert any(name.startswith("tensorboard>") for name in PROJECT["dependencies"])
    else:
        assert words in (["source", ".venv/bin/activate"], ["pip", "install", "."])


def check_program(words):
    assert words[:3] == ["python", "-m", "attnres_jax"]
    args = __main__._parse(words[3:])
    if getattr(args, "config", None):
        configs.load(args.config, args.overrides)


def check_launch(script, words):
    """It takes the words in a dry run, and what it would start takes them too."""
    assert os.access(ROOT / script, os.X_OK)
    if script == "launch/technical_corpus.sh":  # test_launch.py runs it
        return
    if script == "launch/local_cluster.sh":  # has no dry run
        check_program(words[2:])
        words = [*words[:2], "true"]
    elif given := [word for word in words if word.startswith("--")]:
        command = words[1] if words[1:2] in (["eval"], ["sample"]) else "train"
        check_program(["python", "-m", "attnres_jax", command, *given])
    ran = launched.run(Path(script).name, launched.DRY_RUN, words)
    assert ran.returncode == 0, ran.stderr


def check_make(words):
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    for word in words:
        name, equals, value = word.partition("=")
        assert re.search(rf"^{name} \?= ", MAKEFILE, re.MULTILINE) if equals else name in targets
        assert name != "LOCK" or (ROOT / value).is_file()


def test_commands_were_found():
    """The two commands come first; every command of the program but none unknown is shown."""
    assert COMMANDS[:2] == ["make train", "make test"]
    shown = {line.split()[3] for line in COMMANDS if line.startswith("python -m")}
    assert shown == set(__main__.COMMANDS)
    scripts = {script.name for script in launched.SCRIPTS if f"launch/{script.name}" in "".join(LAUNCHES)}
    assert scripts == {"gke.sh", "local_cluster.sh", "retry_spot.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"}
    assert ".venv" in re.search(r"^VENV \?= (.*)$", MAKEFILE, re.MULTILINE)[1]


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 2
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_links_of_every_page_lead_into_gits_tree():
    """Files that git does not keep are nobody else's: a clone's pages would have holes."""
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    kept = said.stdout.split("\0")
    pages = [name for name in kept if name.endswith(".md")]
    assert "docs/results/README.md" in pages
    broken = []
    for page in pages:
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
        inside = [link for link in links if "://" not in link]
        broken += [f"{page}: {link}" for link in inside if normpath(Path(page).parent / link) not in kept]
    assert broken == []


def test_the_file_map_names_what_exists():
    assert [name for name in FILE_MAP if not (ROOT / name).exists()] == []
    assert [name for name in FILE_MAP if (ROOT / name).is_dir() != name.endswith("/")] == []


def test_the_file_map_names_every_module():
    """But files that only mark a package."""
    files = [file for file, _ in test_layout.package_files()]
    modules = {str(f.relative_to(ROOT)) for f in files if len(ast.parse(f.read_text()).body) > 1}
    assert modules - set(FILE_MAP) == set()
    assert len(FILE_MAP) == len(set(FILE_MAP))


def test_the_core_stands_first():
    core = [f"attnres_jax/{name}" for name in test_layout.CORE]
    assert len(core) == 10
    assert sorted(FILE_MAP[:10]) == sorted(core)


def test_versions_are_those_of_the_locks():
    rows = re.findall(
        r"^\| .* \| `make train(?: LOCK=requirements/(.*).txt)?` \| (.*) \| (.*) \|$", TEXT, re.M
    )
    assert len(rows) == 4
    for target, *said in rows:
        locked = [test_layout.version(target or "cpu", name) for name in ("jax", "flax")]
        assert said == locked, target
    assert f"version = {{{PROJECT['version']}}}" in TEXT
    assert "jax>=0.11.2,<0.13" in PROJECT["dependencies"]
    assert "Python >= 3.12, JAX >= 0.11.2 and < 0.13" in TEXT
