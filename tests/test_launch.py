"""Helpers of launch/: what HTML becomes as text, and how the corpus script turns mistakes away."""

import runpy
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
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


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "expected one argument"), (["a", "b"], "expected one"), (["."], ". exists already")],
)
def test_mistakes_end_in_one_line(words, message, tmp_path):
    script = LAUNCH / "technical_corpus.sh"
    result = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
