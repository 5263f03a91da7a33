"""HTML pages of a folder as plain text: `html_text.py FROM TO`. Standard library only.

Navigation, tables of contents, scripts and diagrams are left out; <pre> keeps its spaces and lines.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LEFT_OUT = {"head", "title", "script", "style", "svg", "form", "button"}
LEFT_OUT_CLASSES = {"navheader", "navfooter", "toc", "nosearch"}
PARAGRAPHS = {"p", "div", "pre", "ul", "ol", "dl", "table", "blockquote", "section", "hr"}
PARAGRAPHS |= {"h1", "h2", "h3", "h4", "h5", "h6"}
LINES = {"br", "li", "dt", "dd", "tr"}
CELLS = {"td", "th"}
FOOTER = re.compile(r"^This page last modified on .*$", re.MULTILINE)


class Page(HTMLParser):
    """Collects the text of one page; `convert_charrefs` gives characters for entities."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.title, self.parts = "", []
        self.in_title, self.pre = False, 0
        self.skipped, self.depth = "", 0  # the tag that is left out, and how often it is open

    def handle_starttag(self, tag, attrs):
        """Leave its content out, or break the line before it."""
        self.in_title |= tag == "title"
        if self.skipped:
            self.depth += tag == self.skipped
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in LEFT_OUT or LEFT_OUT_CLASSES & set(classes):
            self.skipped, self.depth = tag, 1
        self._break(tag)
        self.pre += tag == "pre"

    def handle_endtag(self, tag):
        """End what was left out, or break the line after it."""
        self.in_title &= tag != "title"
        if self.skipped:
            self.depth -= tag == self.skipped
            self.skipped = self.skipped if self.depth else ""
            return
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in PARAGRAPHS:
            self._break(tag)

    def handle_data(self, data):
        """Keep text; outside <pre> any run of white space is one space."""
        if self.in_title:
            self.title += data
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def _break(self, tag):
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")
        elif tag in CELLS:
            self.parts.append(" ")


def text_of(html: str) -> str:
    """The text of a page, its title first; paragraphs are apart by an empty line."""
    page = Page()
    page.feed(html)
    page.close()
    body = re.sub(r"[ \t\xa0]+\n", "\n", "".join(page.parts))
    body = re.sub(r"\n {1,2}(?=\S)", "\n", FOOTER.sub("", body))  # of tags on lines of their own
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    title = " ".join(page.title.split())
    return body + "\n" if body.startswith(title) else f"{title}\n\n{body}\n"


def main(source: Path, target: Path) -> None:
    """Every page below `source`, under the same name below `target`."""
    for file in sorted(source.rglob("*.html")):
        out = target / file.relative_to(source).with_suffix(".txt")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text_of(file.read_text(errors="replace")))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
