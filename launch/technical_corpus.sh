#!/usr/bin/env bash
# About 60 MB of English technical text from documentation packages of Debian 12, as .txt and .rst files:
# Linux, Python, Perl, PostgreSQL, SQLite, Git. Needs no root; fetches about 170 MB by apt.
#
#   launch/technical_corpus.sh OUT
#
# Then prints the command that makes tokens of them. The texts keep their own licences (GPL-2 and others):
# each package's copyright file is copied beside them.
set -euo pipefail

PACKAGES=(linux-source-6.1 python3.11-doc perl-doc postgresql-doc-15 sqlite3-doc git-doc)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "error: $*" >&2; exit 2; }

[ $# -eq 1 ] || fail "expected one argument, the folder to make: launch/technical_corpus.sh OUT"
[ ! -e "$1" ] || fail "$1 exists already: delete it, or name another folder"
for program in apt-get dpkg-deb tar xz python3; do
  command -v "$program" > /dev/null || fail "$program is not installed; this script is for Debian 12"
done

mkdir -p "$(dirname "$1")"
OUT=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
WORK=$(mktemp -d "$OUT.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
TEXT=$WORK/text ROOT=$WORK/root
DOC=$ROOT/usr/share/doc

# copy FROM NAMES TO RENAME: the files below FROM whose names match, renamed by a pattern of sed's
copy() {
  mkdir -p "$3"
  (cd "$1" && find . -type f -name "$2" -print0 | tar -c --null -T -) | tar -x -C "$3" --transform="$4"
}

mkdir -p "$WORK/packages" "$ROOT" "$TEXT/copyright"
echo "fetching ${PACKAGES[*]}"
(cd "$WORK/packages" && apt-get -qq download "${PACKAGES[@]}")
for package in "$WORK"/packages/*.deb; do dpkg-deb -x "$package" "$ROOT"; done
for package in "${PACKAGES[@]}"; do cp "$DOC/$package/copyright" "$TEXT/copyright/$package"; done

echo "unpacking the documentation of Linux"
tar -xJf "$ROOT/usr/src/linux-source-6.1.tar.xz" -C "$WORK" --strip-components=1 \
  --exclude='*/Documentation/translations' --wildcards '*/Documentation/*'
find "$DOC" -name '*.gz' ! -name 'changelog*' -exec gunzip {} +

echo "copying what is plain text"
copy "$WORK/Documentation" '*.rst' "$TEXT/linux" ''
copy "$WORK/Documentation" '*.txt' "$TEXT/linux" ''
copy "$DOC/python3.11/html/_sources" '*.rst.txt' "$TEXT/python" 's/\.rst\.txt$/.rst/'
copy "$ROOT/usr/share/perl" '*.pod' "$TEXT/perl" 's/\.pod$/.txt/'
copy "$DOC/git-doc" '*.txt' "$TEXT/git" ''

echo "turning HTML into text"
# Left out: indexes, and what SQLite says twice (cross references, diagrams, one-page copies, old news).
(cd "$DOC/sqlite3" && rm -rf ./*_crossref.html requirements.html syntaxdiagrams.html syntax \
  capi3ref.html fileformat.html releaselog)
rm "$DOC/postgresql-doc-15/html/bookindex.html" "$ROOT"/usr/share/perl/5.36.0/pod/perl{toc,delta}.pod
python3 "$HERE/html_text.py" "$DOC/sqlite3" "$TEXT/sqlite"
python3 "$HERE/html_text.py" "$DOC/postgresql-doc-15" "$TEXT/postgresql"

mv "$TEXT" "$OUT"
echo "$OUT: $(find "$OUT" -type f | wc -l) files, $(du -sh --apparent-size "$OUT" | cut -f1)"
echo "now: python -m attnres_jax data prepare --text=$OUT --glob='**/*.txt' --glob='**/*.rst' --tokenizer=bpe --vocab=8192 --out=FOLDER"
