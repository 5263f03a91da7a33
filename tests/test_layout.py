"""The shape of the code: imports go downwards, the core stays small, the locks are pinned."""

import ast
import re
import sys
from pathlib import Path

import pytest

from attnres_jax import residuals

ROOT = Path(__file__).parent.parent
# Imports go from right to left only; modules on one level do not know each other.
LEVELS = (
    ("axes",),
    ("norm", "rules"),
    ("depth",),
    ("schedule",),
    ("placement",),
    ("autodiff", "choice", "spelling"),
    ("ops",),
    ("residuals",),
    ("walk",),
    ("stack",),
    ("nnx", "linen"),
    ("models",),
    ("configs",),
    ("parallel",),
    ("analysis",),
    ("train",),
    ("inference",),
    ("bench",),
    ("__main__",),
)
RANK = {name: rank for rank, level in enumerate(LEVELS) for name in level}
CORE = (
    *("axes.py", "depth.py", "schedule.py", "ops.py", "stack.py", "nnx.py"),
    *("linen.py", "residuals/base.py", "residuals/additive.py", "residuals/attention.py"),
)
STANDARD = set(sys.stdlib_module_names)


def package_files():
    """(file, dotted name below attnres_jax) of every module; configs/ lives at the root."""
    for folder, prefix in ((ROOT / "attnres_jax", ()), (ROOT / "configs", ("configs",))):
        for file in sorted(folder.rglob("*.py")):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            yield file, parts


def imported(tree, package=()):
    """Dotted names a module imports, lazily ones included: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ("attnres_jax", *package[: len(package) - node.level]) if node.level else ()
            base = ".".join((*above, *(node.module or "").split("."))).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def internal(names):
    """The first name below attnres_jax of each import from it."""
    below = (name.removeprefix("attnres_jax.") for name in names if name.startswith("attnres_jax."))
    return {name.split(".")[0] for name in below} - {"__version__"}


MODULES = [pytest.param(*m, id="/".join(m[1])) for m in package_files() if m[1] != ("__init__",)]


@pytest.mark.parametrize(("file", "parts"), MODULES)
def test_imports_go_downwards(file, parts):
    mine = parts[0]
    assert mine in RANK, f"{mine} has no level: give it one in LEVELS"
    for other in internal(imported(ast.parse(file.read_text()), parts)) - {mine}:
        assert other in RANK, f"{file.name} imports attnres_jax.{other}, which has no level"
        assert RANK[other] < RANK[mine], f"{mine} must not import {other}"


def test_front_door_knows_only_the_core():
    tree = ast.parse((ROOT / "attnres_jax/__init__.py").read_text())
    assert all(RANK[name] <= RANK["stack"] for name in internal(imported(tree)))


def test_residual_families_know_only_the_protocol():
    """Those with states know these too."""
    for file in (ROOT / "attnres_jax/residuals").glob("*.py"):
        names = imported(ast.parse(file.read_text()), ("residuals", file.stem))
        inner = {n.split(".")[2] for n in names if n.startswith("attnres_jax.residuals.")}
        allowed = {"base": set(), "states": {"base"}, "ablations": {"base", "attention"}, "__init__": inner}
        allowed |= {"followups": {"base", "attention", "ablations"}}
        assert inner <= allowed.get(file.stem, {"base", "states"}), file.name


def test_no_model_trainer_or_stack_code_names_a_scheme():
    """A scheme is a file and a line of the table: nothing else asks which one it is."""
    folders = [ROOT / "attnres_jax" / name for name in ("models", "train", "parallel", "residuals")]
    files = [file for folder in folders for file in folder.glob("*.py") if file != folder / "__init__.py"]
    files += [
        ROOT / f"attnres_jax/{name}.py" for name in ("stack", "walk", "ops", "nnx", "linen", "autodiff")
    ]
    words = {text.strip("\"'") for file in files for text in re.findall(r"\"\w+\"|'\w+'", file.read_text())}
    assert len(files) > 30
    assert not words & set(residuals.SCHEMES)


def test_a_scheme_is_a_class_of_less_than_80_lines():
    """With its decorators; one that inherits has its parent's too, which is a scheme itself or a base."""
    lengths = {}
    for file in (ROOT / "attnres_jax/residuals").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                first = min(each.lineno for each in (node, *node.decorator_list))
                lengths[file.stem, node.name] = node.end_lineno - first + 1
    schemes = {(entry.module, entry.scheme) for entry in residuals.SCHEMES.values()}
    assert schemes <= set(lengths)
    assert not {name: lengths[name] for name in schemes if lengths[name] >= 80}


@pytest.mark.parametrize(
    "name",
    [
        "autodiff.py",
        "choice.py",
        "norm.py",
        "placement.py",
        "rules.py",
        "spelling.py",
        "walk.py",
        *(name for name in CORE if name not in ("nnx.py", "linen.py")),
    ],
)
def test_the_core_needs_only_jax(name):
    roots = roots_of(ROOT / "attnres_jax" / name)
    assert roots <= STANDARD | {"jax", "jaxtyping", "numpy", "attnres_jax", "pallas_kernels"}


def test_schedule_is_numpy_only():
    assert roots_of(ROOT / "attnres_jax/schedule.py") <= STANDARD | {"jaxtyping", "numpy"}


def test_kernels_import_only_jax():
    """jax_triton, which needs an older JAX, in one file; Triton's kernels in files imported at their call."""
    users = []
    for file in (ROOT / "pallas_kernels").rglob("*.py"):
        assert roots_of(file) <= STANDARD | {"jax", "numpy", "pallas_kernels", "jax_triton", "triton"}, file
        users += [file.name] * ("jax_triton" in roots_of(file))
        eager = [node for node in ast.parse(file.read_text()).body if is_import(node)]
        names = set(imported(ast.Module(eager, [])))
        assert not {name.split(".")[0] for name in names} & {"jax_triton"}, file
        assert file.name == "triton_kernels.py" or not any(name.startswith("triton") for name in names), file
        assert not any("triton_kernels" in name for name in names), file
    assert users == ["triton.py"]


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


def roots_of(file):
    names = imported(ast.parse(file.read_text()), file.relative_to(ROOT).parts[1:])
    return {name.split(".")[0] for name in names}


def test_the_core_is_read_in_one_sitting():
    lines = {name: len((ROOT / "attnres_jax" / name).read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) < 900, lines
    # Choosing kernels, devices, kinds, user loops, and what JAX's differentiation lacks: read with it.
    beside = ("autodiff", "choice", "norm", "placement", "rules", "spelling", "walk")
    more = sum(len((ROOT / f"attnres_jax/{name}.py").read_text().splitlines()) for name in beside)
    assert sum(lines.values()) + more < 1700, lines


def test_no_file_is_long():
    folders = ("attnres_jax", "configs", "tests", "pallas_kernels")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert len(lengths) > 10
    assert not {name: lines for name, lines in lengths.items() if lines > 600}


@pytest.mark.parametrize("target", ["cpu", "tpu", "gpu", "oldest"])
def test_locks_are_pinned(target):
    """One requirement per logical line: name==version, then at least one hash; no addresses."""
    text = (ROOT / f"requirements/{target}.txt").read_text()
    assert "http" not in text.lower()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    requirements = [line for line in lines if not line.lstrip().startswith("#")]
    pinned = re.compile(r"[\w.-]+(\[[\w,-]+\])?==\S+( ;.*?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*")
    assert len(requirements) > 20
    assert [line for line in requirements if not pinned.fullmatch(line)] == []


def test_locked_jax_is_the_targets_own():
    """The GPU's Triton route and `make test-oldest` need JAX 0.11.2; the others the newest."""
    jax = {t: version(t, "jax") for t in ("cpu", "tpu", "gpu", "oldest")}
    assert (jax["gpu"], jax["oldest"]) == ("0.11.2", "0.11.2")
    assert jax["cpu"] == jax["tpu"] != "0.11.2"


def version(target, package):
    text = (ROOT / f"requirements/{target}.txt").read_text()
    return re.search(rf"^{package}==(\S+)", text, re.MULTILINE)[1]
