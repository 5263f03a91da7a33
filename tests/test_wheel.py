"""The wheel, outside the checkout: what it holds, and that it imports, inspects and trains."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import test_layout

from attnres_jax.train.data import HELDOUT_NOVELS, TRAIN_NOVELS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
MADE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


def run(*words, cwd, env=None):
    result = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline from a copy of the tree, without anything that was made there."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=MADE)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", *offline, "--wheel-dir", folder, folder / "tree", cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """Run a program of an environment that has the wheel, and the packages it needs from this one.

    They are on its path as a plain folder: the editable install's .pth file in it is not read.
    """
    folder = tmp_path_factory.mktemp("outside")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    programs = folder / "venv/bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = sysconfig.get_path("purelib")
    site = next(folder.glob("venv/lib/python3*/site-packages"))
    (site / "packages.pth").write_text(packages + "\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}

    def call(program, *words):
        return run(programs / program, *words, cwd=folder, env=env)

    call.folder, call.site = folder, site
    return call


def test_contents(wheel):
    """Every module, the novels and where they come from, what an H200 is, the licence; nothing else."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    modules = {"/".join(("attnres_jax", *parts)) + ".py" for _, parts in test_layout.package_files()}
    modules |= {str(file.relative_to(ROOT)) for file in (ROOT / "pallas_kernels").rglob("*.py")}
    novels = {f"{name}.txt.xz" for name in (*TRAIN_NOVELS, *HELDOUT_NOVELS)}
    data = {f"attnres_jax/train/austen/{name}" for name in novels | {"README.md"}}
    assert len(novels) == 6
    assert names == modules | data | {"attnres_jax/py.typed", "attnres_jax/bench/h200.txtpb"}


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (licence,) = [name for name in file.namelist() if name.endswith("licenses/LICENSE")]
        assert file.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = [name for name in file.namelist() if name.endswith("/METADATA")]
        text = file.read(metadata).decode()
    assert "License-Expression: Apache-2.0\n" in text
    assert "Requires-Python: >=3.12\n" in text
    assert "Requires-Dist: jax<0.13,>=0.11.2\n" in text


def test_every_module_imports(outside):
    """And comes from the wheel, not from the checkout."""
    code = (
        "import importlib, json, pkgutil, attnres_jax as package\n"
        "names = [m.name for m in pkgutil.walk_packages(package.__path__, 'attnres_jax.')]\n"
        "files = {n: importlib.import_module(n).__file__ for n in names}\n"
        "print(json.dumps(files | {'attnres_jax': package.__file__}))"
    )
    files = json.loads(outside("python", "-c", code))
    assert len(files) == len(list(test_layout.package_files()))
    assert [file for file in files.values() if not Path(file).is_relative_to(outside.site)] == []


def test_inspect(outside):
    text = outside("python", "-m", "attnres_jax", "inspect", "--config=quick")
    assert "mix/query" in text
    assert "445,632" in text


def test_train(outside):
    """By the console script: the config by its name, the novels from the package, to the end."""
    small = {"model.blocks": 2, "model.width": 16, "model.mlp_width": 16, "data.length": 16}
    short = {"train.steps": 2, "optim.warmup": 1, "train.eval_tokens": 256, "data.batch": 2}
    keys = [f"--config.{name}={value}" for name, value in (small | short).items()]
    outside("attnres-jax", "train", "--config=quick:block", "--workdir=run", *keys)
    run = outside.folder / "run"
    evaluation = json.loads((run / "eval.json").read_text())
    assert (evaluation["step"], evaluation["tokens"]) == (2, 256)
    assert 1 < evaluation["bits_per_byte"] < 9
    assert json.loads((run / "config.json").read_text())["residual"] == "block"
    assert outside("attnres-jax", "sample", "--workdir=run", "--prompt=It", "--length=3").startswith("It")
