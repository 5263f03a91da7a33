"""From files to a corpus: exact, held out by path alone, resumed after a kill to the same bytes."""

import hashlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from attnres_jax import __main__
from attnres_jax.models.tokenizer import BPE, Bytes, CannotTrain, train_bpe
from attnres_jax.train import data, documents, prepare

HARD = (
    *("", " ", "  two before, two after  ", "\n\n\ttab\t\n   indent\r\n", "a" + 9 * " " + "b", "no end\n"),
    *(
        "▁ ▁▁x",
        "<s></s><unk><0x0A>",
        "é e\u0301 ﬁ Å",
        "漢字🙂👩‍👩‍👧",
        "\ufeffmark",
        "\ufffd ⁇ ▅",
        "\x01\x7f\xa0\u3000",
    ),
)
NAMES = [f"{folder}/{name}.txt" for folder in "abc" for name in range(8)]
HELDOUT = 0.15


def story(seed):
    words = ["the", "a", "depth", "residual", "attention", "mean", "layer", "block", "weight", *HARD[2:]]
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(words) + rng.choice([" ", "\n", ", "]) for _ in range(60 + 12 * seed))


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PART", 6000)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """24 texts of several parts, and the corpus that an undisturbed run makes of them."""
    place = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(NAMES):
        file = place / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(story(seed).encode())
    prepare.prepare(recipe(place / "texts", out="straight"))
    return place


@pytest.fixture
def folder(made, tmp_path):
    """The texts, for this test alone."""
    return shutil.copytree(made / "texts", tmp_path / "texts")


@pytest.fixture
def straight(made, tmp_path):
    """The bytes of the finished corpus, and the corpus itself beside the texts."""
    return contents(shutil.copytree(made / "straight", tmp_path / "straight"))


def recipe(folder, out="corpus", kind="bpe", **changes):
    vocab = 256 if kind == "bytes" else 400
    made = prepare.Recipe(folder, ("**/*.txt",), folder.parent / out, kind, vocab, HELDOUT)
    return made._replace(**changes)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts_of(tokens, corpus):
    """The documents back: what stands between two ends."""
    ends = np.flatnonzero(tokens == corpus.end)
    assert ends[-1] == len(tokens) - 1
    return [corpus.tokenizer.decode(piece[piece != corpus.end]) for piece in np.split(tokens, ends + 1)[:-1]]


# Tokenizers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    file.write_bytes(train_bpe(map(story, range(8)), 400))
    return BPE(file, 400, end=1)


@pytest.mark.parametrize("text", [*HARD, story(3), "".join(map(chr, range(0x3000)))])
def test_round_trip_is_exact(bpe, text):
    for tokenizer in (bpe, Bytes()):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokens.dtype == np.int32
        assert not np.isin(tokens, [0, 1]).any() or isinstance(tokenizer, Bytes)
        assert max(tokens, default=0) < tokenizer.vocab


def test_pieces_are_learned_and_lines_stand_alone(bpe):
    """Fewer tokens than bytes, and a text can be encoded line by line."""
    text = story(30)
    lines = [bpe.encode(line) for line in text.splitlines(keepends=True)]
    np.testing.assert_array_equal(np.concatenate(lines), bpe.encode(text))
    assert len(bpe.encode("the residual")) < 4


def test_bytes_that_are_no_text(bpe):
    assert [t.decode(t.encode("a\udcff")) for t in (bpe, Bytes())] == ["a\N{REPLACEMENT CHARACTER}"] * 2


@pytest.mark.parametrize(
    ("vocab", "message"), [(90_000, "too large .*: at most"), (258, "too small .*: more than")]
)
def test_a_vocabulary_that_does_not_suit(folder, vocab, message):
    with pytest.raises(documents.TextError, match=rf"--vocab: .* of {vocab} is {message} \d+$"):
        prepare.prepare(recipe(folder, vocab=vocab))


def test_errors_of_the_text_are_not_those_of_sentencepiece():
    def broken():
        yield "text"
        raise documents.TextError("a.txt has changed")

    with pytest.raises(documents.TextError, match=r"^a.txt has changed$"):
        train_bpe(broken(), 300)
    with pytest.raises(CannotTrain, match="cannot make a vocabulary of 300"):
        train_bpe([], 300)


# The corpus -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_corpus_is_its_documents(folder, kind):
    """Every document once, whole, in one of the splits, in the order of the hash; then an end."""
    prepare.prepare(recipe(folder, kind=kind))
    corpus = data.open_corpus(str(folder.parent / "corpus"))
    share = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 for name in NAMES}
    order = sorted(NAMES, key=share.__getitem__)
    whole = {name: (folder / name).read_bytes().decode() for name in NAMES}
    heldout = [whole[name] for name in order if share[name] < HELDOUT]
    assert 1 < len(heldout) < 8
    assert texts_of(corpus.heldout, corpus) == heldout
    assert texts_of(corpus.train, corpus) == [whole[name] for name in order if share[name] >= HELDOUT]
    size = len("".join(heldout).encode())
    assert corpus.bytes_per_token == size / len(corpus.heldout)
    assert corpus.vocab == corpus.tokenizer.vocab == (256 if kind == "bytes" else 400)
    assert corpus.train.dtype == np.dtype("uint8" if kind == "bytes" else "uint16")
    assert [file.name for file in folder.parent.iterdir() if file.name[0] == "."] == []


def test_holdout_is_of_the_path_alone(folder):
    """Other contents, other files and a larger fraction move no document from one split to the other."""
    names = documents.list_files(folder, ["**/*.txt"])
    found = documents.found(documents.examine(folder, names))
    splits = documents.split(found.documents, HELDOUT)
    (folder / "a/0.txt").write_text("other")
    fewer = documents.found(documents.examine(folder, names[::2])).documents
    again = documents.split(fewer, HELDOUT)
    assert {d.name for d in again.heldout} == {d.name for d in splits.heldout} & set(names[::2])
    larger = documents.split(found.documents, 0.5)
    assert {d.name for d in splits.heldout} < {d.name for d in larger.heldout}
    assert splits.heldout[0].place == hashlib.sha256(splits.heldout[0].name.encode()).hexdigest()


def test_heldout_text_does_not_reach_the_tokenizer(folder):
    names = documents.list_files(folder, ["**/*.txt"])
    found = documents.found(documents.examine(folder, names))
    documents.split(found.documents, HELDOUT).heldout[0].file.write_text("zebra " * 500)
    prepare.prepare(recipe(folder))
    tokenizer = data.open_corpus(str(folder.parent / "corpus")).tokenizer
    assert len(tokenizer.encode("zebra")) >= 4


def test_what_is_no_text_is_left_out_and_said(folder, capsys):
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "cut.txt").write_bytes(b"a line\n" + "é".encode()[:1])
    (folder / "binary.txt").write_bytes(b"a" * 100_000 + b"\0")
    (folder / "empty.txt").touch()
    (folder / "unasked.md").write_text("not matched")
    prepare.prepare(recipe(folder, kind="bytes"))
    said = capsys.readouterr().out
    assert "left out, is not UTF-8: 2 files: 'cut.txt', 'latin.txt'\n" in said
    assert "left out, holds a NUL byte: 1 files: 'binary.txt'\n" in said
    assert "left out, is empty: 1 files: 'empty.txt'\n" in said
    meta = data.read_meta(folder.parent / "corpus")
    assert set(meta["left_out"]) == {"latin.txt", "cut.txt", "binary.txt", "empty.txt"}
    assert meta["train"]["documents"] + meta["heldout"]["documents"] == len(NAMES)


def test_long_lines_and_letters_on_block_borders(tmp_path):
    text = "é" * documents.BLOCK + "\n" + "漢" * (3 * documents.BLOCK) + "end"
    for name in ("a", "b"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    prepare.prepare(recipe(tmp_path / "texts", kind="bytes", heldout=0.5))
    corpus = data.open_corpus(str(tmp_path / "corpus"))
    assert texts_of(corpus.train, corpus) == [text]


# Killed, damaged, given again -------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(monkeypatch, call):
    """Stop before the `call`-th file of the draft is written; returns the names of all that were."""
    write, names = prepare._write_sound, []

    def stop(file, pieces):
        names.append(file.name)
        if len(names) == call:
            raise Killed
        write(file, pieces)

    monkeypatch.setattr(prepare, "_write_sound", stop)
    return names


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_stopped_run_goes_on(folder, straight, monkeypatch, call):
    """What was finished is not made again, and the result is the same to the byte."""
    with monkeypatch.context() as patch:
        before = killed_at(patch, call)
        with pytest.raises(Killed):
            prepare.prepare(recipe(folder))
    assert not (folder.parent / "corpus").exists()
    after = killed_at(monkeypatch, 0)
    prepare.prepare(recipe(folder))
    assert contents(folder.parent / "corpus") == straight
    assert len(before) == call
    assert len(before[:-1] + after) == len(set(before[:-1] + after)) > 5


@pytest.mark.parametrize("damaged", ["tokenizer.model", "train-00001.bin", "train-00001.bin.sha256"])
def test_a_damaged_draft_is_made_again(folder, straight, monkeypatch, damaged):
    with monkeypatch.context() as patch:
        patch.setattr(data, "publish", killed)
        with pytest.raises(Killed):
            prepare.prepare(recipe(folder))
    (draft,) = folder.parent.glob(".corpus.*")
    raw = bytearray((draft / damaged).read_bytes())
    raw[len(raw) // 2] ^= 1
    (draft / damaged).write_bytes(raw)
    made = killed_at(monkeypatch, 0)
    prepare.prepare(recipe(folder))
    assert contents(folder.parent / "corpus") == straight
    assert made == [damaged.removesuffix(".sha256")]
    assert not draft.exists()


def killed(*_):
    raise Killed


KILL = """
import os, signal, sys
from attnres_jax import __main__
from attnres_jax.train import prepare
tokens, calls, prepare.PART = prepare._tokens, [], 6000
def killed(*args):
    for piece in tokens(*args):
        yield piece
        calls.append(piece)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
prepare._tokens = killed
__main__.main(sys.argv[1:])
"""


def test_a_killed_process_goes_on(folder, straight):
    """SIGKILL in the middle of a part."""
    words = ["data", "prepare", f"--text={folder}", f"--out={folder.parent / 'corpus'}", "--tokenizer=bpe"]
    words += ["--vocab=400", f"--heldout={HELDOUT}"]
    result = subprocess.run([sys.executable, "-c", KILL, *words], check=False, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (draft,) = folder.parent.glob(".corpus.*")
    assert (draft / "train-00000.bin").exists()
    assert __main__.main(words) == 0
    assert contents(folder.parent / "corpus") == straight


def test_a_file_is_whole_or_as_it_was(tmp_path):
    """Also where a second process, in the same draft, dies while it writes the file once more."""
    file = tmp_path / "part"
    prepare._write_sound(file, [b"one", b"two"])
    with pytest.raises(Killed):
        prepare._write_sound(file, (killed() if piece else piece for piece in (b"", b"two")))
    assert prepare._is_sound(file)
    assert file.read_bytes() == b"onetwo"


def test_interrupted_by_hand(folder, straight, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(documents, "_pieces", interrupted)
        with pytest.raises(documents.TextError, match="the same command goes on"):
            prepare.prepare(recipe(folder))
    with monkeypatch.context() as patch:
        patch.setattr(documents, "texts", interrupted)  # inside sentencepiece
        with pytest.raises(documents.TextError, match="the same command goes on"):
            prepare.prepare(recipe(folder))
    prepare.prepare(recipe(folder))
    assert contents(folder.parent / "corpus") == straight


def test_given_again(folder, straight, capsys):
    before = {file: file.stat().st_mtime_ns for file in (folder.parent / "straight").iterdir()}
    prepare.prepare(recipe(folder, out="straight"))
    assert "finished already: nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (folder.parent / "straight").iterdir()} == before


@pytest.mark.parametrize("change", [{"vocab": 401}, {"kind": "bytes"}, {"heldout": 0.5}, "text", "more"])
def test_another_corpus_in_the_same_place(folder, straight, change):
    if change == "text":
        (folder / "a/0.txt").write_text("other")
    if change == "more":
        (folder / "a/new.txt").write_text("new")
    changes = change if isinstance(change, dict) else {}
    with pytest.raises(documents.TextError, match="made of other text or with other options: delete it"):
        prepare.prepare(recipe(folder, out="straight", **changes))
    assert contents(folder.parent / "straight") == straight


def test_a_folder_that_is_no_corpus(folder):
    (folder.parent / "corpus").mkdir()
    with pytest.raises(documents.TextError, match=r"no whole corpus \(meta.json is missing\): delete it"):
        prepare.prepare(recipe(folder))


@pytest.mark.parametrize("name", ["tokenizer.model", "train.bin", "heldout.bin", "meta.json"])
def test_a_damaged_corpus_is_refused(folder, straight, name):
    file = folder.parent / "straight" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    for look in (
        lambda: data.open_corpus(str(file.parent)),
        lambda: prepare.prepare(recipe(folder, "straight")),
    ):
        with pytest.raises((data.DataError, documents.TextError), match=name):
            look()


def test_text_that_changes_meanwhile(folder, monkeypatch):
    def change(*args):
        (folder / "c/7.txt").write_text("changed")
        return tokenizer(*args)

    tokenizer = prepare._tokenizer
    monkeypatch.setattr(prepare, "_tokenizer", change)
    with pytest.raises(documents.TextError, match=r"c/7.txt has changed while it was read"):
        prepare.prepare(recipe(folder, kind="bytes"))


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text={0}/nowhere --out={0}/out", "nowhere is not a folder"),
        ("--text={0}/texts --glob=*.rst --glob=*.md --out={0}/out", "matches '*.rst' or '*.md'"),
        ("--text={0}/texts --glob=/etc/* --out={0}/out", "--glob=/etc/* is no pattern"),
        ("--text={0}/texts --out={0}/texts/out", "lies inside --text"),
        (
            "--text={0}/texts --glob=a/0.txt --out={0}/out",
            "needs 2 documents, one of them held out; there are 1",
        ),
        ("--text={0}/texts --out={0}/out --heldout=0.0001", "--heldout=0.0001 holds out 0 of 24 documents"),
        ("--text={0}/texts --out={0}/out --heldout=0.9999", "--heldout=0.9999 holds out 24 of 24 documents"),
        ("--text={0}/texts --out={0}/texts/a/0.txt/out", "lies inside"),
        ("--text={0}/texts --out={0}/file/out --heldout=0.2", "Not a directory"),
        ("--text={0}/texts --out={0}/out --heldout=1", "'1' is not a number between 0 and 1"),
        ("--text={0}/texts --out={0}/out --vocab=999", "--vocab is for --tokenizer=bpe"),
        ("--text={0}/texts --out={0}/out --tokenizer=word", "invalid choice: 'word'"),
    ],
)
def test_mistakes_end_in_one_line(folder, words, message, capsys):
    (folder.parent / "file").touch()
    assert __main__.main(["data", "prepare", *words.format(folder.parent).split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_the_fraction_that_is_advised_will_do(folder, fraction):
    found = documents.found(documents.examine(folder, documents.list_files(folder, ["**/*"])))
    with pytest.raises(documents.TextError) as error:
        documents.split(found.documents, fraction)
    splits = documents.split(found.documents, float(str(error.value).rpartition("=")[2]))
    assert min(map(len, splits)) == 1


def test_the_recipe_of_a_command(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(prepare, "prepare", seen.append)
    assert __main__.main(["data", "prepare", "--text=a", "--out=b"]) == 0
    words = "--text=a --out=b --glob=*.c --glob=*.h --tokenizer=bpe --heldout=0.5"
    assert __main__.main(["data", "prepare", *words.split()]) == 0
    assert [(r.globs, r.tokenizer, r.vocab, r.heldout) for r in seen] == [
        (("**/*.txt",), "bytes", 256, 0.01),
        (("*.c", "*.h"), "bpe", 8192, 0.5),
    ]


def test_progress_without_a_terminal(folder, capsys):
    prepare.prepare(recipe(folder, kind="bytes"))
    lines = capsys.readouterr().err.splitlines()
    size = sum((folder / name).stat().st_size for name in NAMES)
    assert "reading: 24 of 24 files" in lines
    assert lines[-1] == f"encoding: {size:,} of {size:,} bytes"
    assert len(lines) <= 20


def test_bytes_do_not_need_sentencepiece(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # an import of it raises
    prepare.prepare(recipe(folder, kind="bytes"))
    assert data.open_corpus(str(folder.parent / "corpus")).end == 0
    with pytest.raises(ImportError):
        prepare.prepare(recipe(folder, out="other"))


def test_an_opened_corpus_does_not_need_sentencepiece(folder, straight, monkeypatch):
    """Only encoding and decoding do."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    corpus = data.open_corpus(str(folder.parent / "straight"))
    assert corpus.tokenizer.vocab == 400
    with pytest.raises(ImportError):
        corpus.tokenizer.encode("text")
