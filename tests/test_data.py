"""Tokens on disk and batches by step: nothing lost, nothing twice, nothing damaged accepted."""

import lzma
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from attnres_jax.train import data

LENGTH, WINDOWS, BATCH = 5, 7, 3


def novel(name):
    return lzma.decompress((data.AUSTEN / f"{name}.txt.xz").read_bytes())


@pytest.fixture(scope="module")
def austen(tmp_path_factory):
    return data.open_corpus("austen", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(tmp_path):
    """A corpus of 50 + 20 tokens."""
    folder = tmp_path / "small"
    data.prepare(folder, np.arange(50), np.arange(20), vocab=50, source="count")
    return folder


def test_novels_are_whole(austen):
    assert (austen.vocab, austen.bytes_per_token, austen.end) == (256, 1.0, None)
    assert isinstance(austen.train, np.memmap)
    assert isinstance(austen.heldout, np.memmap)
    assert austen.heldout.tobytes() == novel("persuasion")
    train = austen.train.tobytes()
    books = [novel(name) for name in data.TRAIN_NOVELS]
    assert len(books) == 5
    assert all(train.count(book) == 1 for book in books)
    assert len(train) == sum(map(len, books)) + 3 * 4  # between two books: three line ends


def test_persuasion_is_never_trained_on(austen):
    train, heldout = austen.train.tobytes(), austen.heldout.tobytes()
    pieces = [heldout[at : at + 60] for at in range(0, len(heldout) - 60, 2000)]
    pieces = [piece for piece in pieces if piece.strip()]
    assert len(pieces) > 200
    assert not [piece for piece in pieces if piece in train]


@pytest.fixture
def counted():
    """Tokens that are their own positions: a window says where it came from. The tail is short."""
    return np.arange(WINDOWS * LENGTH + LENGTH - 1, dtype=np.uint16)


def epochs(tokens, seed, count=3):
    """First tokens of the windows of each epoch, in the order they are served."""
    ds = data.train_batches(tokens, LENGTH, BATCH, seed)
    rows = np.concatenate([ds[step] for step in range(count * WINDOWS // BATCH + 1)])
    return rows[: count * WINDOWS].reshape(count, WINDOWS, LENGTH + 1)


def test_every_window_once_per_epoch(counted):
    starts = LENGTH * np.arange(WINDOWS)
    for epoch in epochs(counted, seed=3):
        ordered = epoch[np.argsort(epoch[:, 0])]
        np.testing.assert_array_equal(ordered, starts[:, None] + np.arange(LENGTH + 1))


def test_order_follows_seed_and_epoch(counted):
    """No two epochs of neighbouring seeds alike: Grain alone would shift seed 1 by one epoch."""
    orders = {tuple(e[:, 0]) for seed in range(4) for e in epochs(counted, seed)}
    assert len(orders) == 12
    np.testing.assert_array_equal(epochs(counted, 3), epochs(counted, 3))


def test_a_step_does_not_know_the_others(counted):
    ds = data.train_batches(counted, LENGTH, BATCH, seed=1)
    in_order = [ds[step] for step in range(20)]
    for step in (19, 0, 11, 11, 4):
        np.testing.assert_array_equal(ds[step], in_order[step])
    np.testing.assert_array_equal(data.train_batches(counted, LENGTH, BATCH, seed=1)[13], in_order[13])
    assert in_order[0].shape == (BATCH, LENGTH + 1)
    assert in_order[0].dtype == np.int32
    assert len(ds) > 10**12


def test_text_shorter_than_a_window():
    tokens = np.zeros(LENGTH, np.uint8)
    with pytest.raises(data.DataError, match=r"data.length = 5 needs 6 tokens.* has 5"):
        data.train_batches(tokens, LENGTH, BATCH, seed=0)
    assert data.train_batches(np.zeros(LENGTH + 1, np.uint8), LENGTH, BATCH, 0)[0].shape == (3, 6)


@pytest.mark.parametrize(
    ("tokens", "limit", "predicted"),
    [(2, 0, 1), (16, 0, 15), (17, 0, 16), (31, 0, 30), (32, 0, 31), (40, 17, 17), (40, 99, 39)],
)
def test_heldout_predicts_each_token_once_in_order(tokens, limit, predicted):
    text = np.arange(100, 100 + tokens, dtype=np.uint8)
    batches = list(data.heldout_windows(text, LENGTH, BATCH, limit))
    assert {b.tokens.shape for b in batches} == {(BATCH, LENGTH + 1)}
    assert {b.tokens.dtype for b in batches} == {np.dtype(np.int32)}
    targets = np.concatenate([b.tokens[:, 1:][b.mask] for b in batches])
    inputs = np.concatenate([b.tokens[:, :-1][b.mask] for b in batches])
    np.testing.assert_array_equal(targets, text[1 : predicted + 1])
    np.testing.assert_array_equal(inputs, text[:predicted])
    assert len(batches) == -(-predicted // (LENGTH * BATCH))


def test_prepared_folder_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    for vocab, dtype in ((256, "uint8"), (257, "uint16"), (65537, "uint32")):
        tokens = rng.integers(vocab, size=99)
        tokens[-1] = vocab - 1
        folder = tmp_path / str(vocab)
        data.prepare(folder, tokens, tokens[:9], vocab=vocab, source="rng", bytes_per_token=3.5)
        corpus = data.open_corpus(str(folder))
        np.testing.assert_array_equal(corpus.train, tokens)
        np.testing.assert_array_equal(corpus.heldout, tokens[:9])
        assert (corpus.train.dtype, corpus.vocab, corpus.bytes_per_token) == (dtype, vocab, 3.5)
        little = tokens.astype(np.dtype(dtype).newbyteorder("<"))
        assert (folder / "train.bin").read_bytes() == little.tobytes()


@pytest.mark.parametrize("tokens", [[0], [0, 7], [-1, 0], [0.0, 1.0]])
def test_tokens_outside_the_vocabulary(tmp_path, tokens):
    with pytest.raises(data.DataError, match="heldout: expected 2 or more whole numbers from 0 to 6"):
        data._write_tokens(tmp_path / "heldout.bin", np.array(tokens), 7)


def test_prepare_leaves_what_is_there(small):
    before = {file.name: file.read_bytes() for file in small.iterdir()}
    with pytest.raises(FileExistsError):
        data.prepare(small, np.arange(9), np.arange(9), vocab=9, source="other")
    assert {file.name: file.read_bytes() for file in small.iterdir()} == before
    assert [file.name for file in small.parent.iterdir()] == ["small"]


FILES = ["train.bin", "heldout.bin", "meta.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(small, name):
    file, sound = small / name, (small / name).read_bytes()
    for at in range(len(sound)):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(data.DataError, match=rf"damaged: {name}.*prepare"):
            data.open_corpus(str(small))
    file.write_bytes(sound)
    data.open_corpus(str(small))


@pytest.mark.parametrize("change", ["cut", "grown", "empty", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_refused(small, name, change):
    file, sound = small / name, (small / name).read_bytes()
    changed = {"cut": sound[:-1], "grown": sound + b"0", "empty": b""}
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[change])
    with pytest.raises(data.DataError, match=rf"damaged: {name}.*prepare"):
        data.open_corpus(str(small))


def test_damaged_cache_says_what_to_delete(tmp_path):
    cached = data._austen(tmp_path)
    file = cached / "train.bin"
    raw = bytearray(file.read_bytes())
    raw[12345] ^= 64
    file.write_bytes(raw)
    with pytest.raises(data.DataError, match=rf"{cached}.*train.bin.*delete it"):
        data.open_corpus("austen", tmp_path)
    shutil.rmtree(cached)
    data.open_corpus("austen", tmp_path)


def test_no_such_folder():
    with pytest.raises(data.DataError, match=r"'austin'.*legal: austen"):
        data.open_corpus("austin")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"", None])
def test_damaged_package(tmp_path, monkeypatch, damage):
    shipped = tmp_path / "shipped"
    shutil.copytree(data.AUSTEN, shipped)
    monkeypatch.setattr(data, "AUSTEN", shipped)
    file = shipped / "emma.txt.xz"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(data.DataError, match=r"emma.txt.xz is .*: install"):
        data.open_corpus("austen", tmp_path / "cache")


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data.open_corpus("austen", tmp_path / "explicit")
    assert not (tmp_path / "xdg").exists()
    data.open_corpus("austen")
    assert list((tmp_path / "xdg/attnres_jax").glob("austen-*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data.open_corpus("austen")
    assert list((tmp_path / "home/.cache/attnres_jax").glob("austen-*"))


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="set XDG_CACHE_HOME"):
        data.open_corpus("austen", tmp_path / "file")


KILL = """
import os, signal, sys
from attnres_jax.train import data
calls = []
def killed(function, *args):
    calls.append(function)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    function(*args)
write, publish = data.write, data.publish
data.write = lambda *args: killed(write, *args)
data.publish = lambda *args: killed(publish, *args)
data.open_corpus("austen", sys.argv[1])
"""


@pytest.mark.parametrize("call", [1, 3, 4])  # before any file, before meta.json, before the rename
def test_a_killed_process_leaves_no_trap(tmp_path, call):
    result = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), str(call)], check=False)
    assert result.returncode == -9
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".austen-")
    assert data.open_corpus("austen", tmp_path).heldout.tobytes() == novel("persuasion")


def test_two_starts_at_once(tmp_path, monkeypatch):
    """Both have written all their files before either renames."""
    both, publish, found = threading.Barrier(2), data.publish, []

    def together(*args):
        both.wait(timeout=30)
        publish(*args)

    monkeypatch.setattr(data, "publish", together)
    starts = [
        threading.Thread(target=lambda: found.append(data.open_corpus("austen", tmp_path))) for _ in range(2)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert [corpus.heldout.tobytes() for corpus in found] == [novel("persuasion")] * 2
    assert len(list(tmp_path.iterdir())) == 1
