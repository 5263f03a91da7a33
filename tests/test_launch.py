"""Helpers of launch/: what HTML becomes as text, and the corpus script on packages of a page or two."""

import gzip
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from attnres_jax import __main__

LAUNCH = Path(__file__).parent.parent / "launch"
CORPUS = LAUNCH / "technical_corpus.sh"
text_of = runpy.run_path(str(LAUNCH / "html_text.py"))["text_of"]

PAGE = """<html><head><title>VACUUM</title><style>p { color: red }</style></head><body>
<div class="nav navheader"><div>Prev</div> Next</div>
<h1>VACUUM</h1><p>Reclaims  <b>storage</b>
 &amp; more:<script>hide()</script></p>
<svg><text>diagram</text></svg>
<ul><li>one<li>two</ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>
if x:
    y  =  1
</pre><form>search</form>after<br>that
<p><small><i>This page last modified on 2022-01-01</i></small></p>
<div class=navfooter>Home</div></body></html>"""


def test_a_page_is_its_text():
    assert text_of(PAGE) == (
        "VACUUM\n\nReclaims storage & more:\n\none\ntwo\n\na b\n1 2\n\nif x:\n    y  =  1\n\nafter\nthat\n"
    )


def test_the_title_comes_first_once():
    assert text_of("<title>A  title</title><p>Text</p>") == "A title\n\nText\n"
    assert text_of("<title>Text</title><p>Text</p>") == "Text\n"
    assert text_of("<title>A</title><title>A</title><p>Text</p>") == "A\n\nText\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "expected one argument"), (["a", "b"], "expected one"), (["."], ". exists already")],
)
def test_mistakes_end_in_one_line(words, message, tmp_path):
    result = subprocess.run([CORPUS, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


APT = """#!/usr/bin/env bash
[[ "$1 $2" == "-qq download" ]] || exit 9
for package in "${@:3}"; do touch "${package}_1_all.deb"; done
exit "$CODE"
"""
DPKG = """#!/usr/bin/env bash
[[ $1 == -x && -f $2 ]] || exit 9
name=$(basename "$2" _1_all.deb)
cp -r "$CONTENTS/$name/." "$3"
"""
DOC = "usr/share/doc"
# What the packages hold, and what of it is left. Copyrights come to both below.
PACKAGES = {
    "linux-source-6.1": {
        "usr/src/linux-source-6.1/Documentation/mm/numa.rst": "NUMA",
        "usr/src/linux-source-6.1/Documentation/it's old.txt": "old",
        "usr/src/linux-source-6.1/Documentation/mm/Makefile": "all:",
        "usr/src/linux-source-6.1/Documentation/translations/it/numa.rst": "Italian",
        "usr/src/linux-source-6.1/kernel/notes.txt": "not documentation",
    },
    "python3.11-doc": {
        f"{DOC}/python3.11/html/_sources/library/re.rst.txt": "re",
        f"{DOC}/python3.11/html/library/re.html": "the same once more",
    },
    "perl-doc": {
        "usr/share/perl/5.36.0/pod/perlre.pod": "=head1",
        "usr/share/perl/5.36.0/pod/perltoc.pod": "contents",
        "usr/share/perl/5.36.0/pod/perldelta.pod": "news",
    },
    "postgresql-doc-15": {
        f"{DOC}/postgresql-doc-15/html/sql-vacuum.html.gz": "<title>VACUUM</title><p>Reclaims",
        f"{DOC}/postgresql-doc-15/html/bookindex.html": "index",
    },
    "sqlite3-doc": {
        f"{DOC}/sqlite3/c3ref/open.html": "<p>Opens",
        f"{DOC}/sqlite3/lang_crossref.html": "references",
        f"{DOC}/sqlite3/requirements.html": "requirements",
        f"{DOC}/sqlite3/syntaxdiagrams.html": "diagrams",
        f"{DOC}/sqlite3/syntax/expr.html": "diagram",
        f"{DOC}/sqlite3/capi3ref.html": "one page",
        f"{DOC}/sqlite3/fileformat.html": "one page",
        f"{DOC}/sqlite3/releaselog/3_40_0.html": "news",
    },
    "git-doc": {
        f"{DOC}/git-doc/git-add.txt.gz": "git add",
        f"{DOC}/git-doc/RelNotes/2.39.txt": "notes",
        f"{DOC}/git-doc/git-add.html": "the same once more",
        f"{DOC}/git-doc/changelog.txt.gz": "not unpacked",
    },
}
TEXTS = {
    "linux/mm/numa.rst": "NUMA",
    "linux/it's old.txt": "old",
    "python/library/re.rst": "re",
    "perl/5.36.0/pod/perlre.txt": "=head1",
    "postgresql/html/sql-vacuum.txt": "VACUUM\n\nReclaims\n",
    "sqlite/c3ref/open.txt": "Opens\n",
    "git/git-add.txt": "git add",
    "git/RelNotes/2.39.txt": "notes",
}


@pytest.fixture
def build(tmp_path):
    """Runs the script into runs/out: apt-get ends with a code, dpkg-deb unpacks what PACKAGES says."""
    for name, text in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    packages = tmp_path / "packages"
    for package, files in PACKAGES.items():
        for name, text in (files | {f"{DOC}/{package}/copyright": package}).items():
            file = packages / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source = packages / "linux-source-6.1/usr/src/linux-source-6.1"
    subprocess.run(["tar", "-cJf", f"{source}.tar.xz", source.name], cwd=source.parent, check=True)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTENTS": str(packages)}

    def run(code):
        return subprocess.run(
            [CORPUS, "runs/out"],
            cwd=tmp_path,
            env=paths | {"CODE": str(code)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_corpus_is_the_text_of_the_packages(build, tmp_path):
    """All of it and no more; the command that it names at its end is understood and takes every file."""
    ran = build(0)
    assert ran.returncode == 0, ran.stderr
    out = tmp_path / "runs/out"
    found = {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}
    copyrights = {f"copyright/{package}": package for package in PACKAGES}
    assert found == TEXTS | copyrights
    assert os.listdir(tmp_path / "runs") == ["out"]
    *_, said, now = ran.stdout.splitlines()
    assert re.match(rf"{out}: {len(found)} files, ", said)
    args = __main__._parse(shlex.split(now.removeprefix("now: python -m attnres_jax ")))
    assert (args.command, args.text) == ("data", out)
    taken = {file for pattern in args.glob for file in out.glob(pattern)}
    assert taken == {out / name for name in TEXTS}


def test_packages_that_do_not_come_leave_nothing(build, tmp_path):
    ran = build(100)
    assert ran.returncode == 100
    assert os.listdir(tmp_path / "runs") == []
