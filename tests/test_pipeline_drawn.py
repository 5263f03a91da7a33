"""`inspect --pipeline`: the picture of the timetable, and messages of every residual scheme."""

import numpy as np
import pytest
from matplotlib import colors, image

from attnres_jax import __main__, residuals
from attnres_jax.analysis import figures, pipeline
from attnres_jax.parallel.timetable import Timetable, text

SIZES = [(2, 1, 2), (2, 2, 4), (3, 3, 6), (4, 2, 8)]
WORDS = ["inspect", "--config=lm:d12,block8"]
BANDS = 0.0, 0.45
"""Where in the row of its stage the upper edge of a forward chunk is, and of a backward one."""
HEIGHT = 0.45
# Of one unit, beside the schemes where it is one activation. RMS Block keeps a block's summary and two sums.
ACTIVATIONS = {"hc": 4, "hc_static": 4, "mhc": 4, "mhc_lite": 4, "ddl": 4, "siamese": 2, "rms_block": 3}
ACTIVATIONS["full_input_query"] = 2  # an output and its read
WHOLE = {
    *("plain", "rezero", "layerscale", "highway", "deepnorm", "keel", "siamese", "hc", "hc_static"),
    *("mhc", "mhc_lite", "ddl", "mrla"),
}
"""Schemes whose history is one unit."""


def test_a_drawing_by_hand():
    """Two stages, two microbatches, one chunk each."""
    (axes,) = pipeline.figure(Timetable(2, 1, 2)).axes
    forward, backward = read(axes)
    assert forward[..., 0].T.tolist() == [[0, 1, -1, -1], [-1, 0, 1, -1]]
    assert backward[..., 0].T.tolist() == [[-1, -1, 0, 1], [-1, 0, 1, -1]]
    assert axes.get_title().startswith("2 stages x 1 virtual, 2 microbatches")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert axes.yaxis_inverted()
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 4), (2, 0))


@pytest.mark.parametrize("size", SIZES)
def test_boxes_and_their_numbers_are_the_timetable(size):
    table = Timetable(*size)
    (axes,) = pipeline.figure(table).axes
    np.testing.assert_array_equal(read(axes), [table.forward, table.backward])
    P, V, _ = size
    named = [(entry.get_facecolor(), entry.get_label()) for entry in axes.get_legend().legend_handles]
    shades = [colors.to_rgba(pipeline.SHADES[v], 0.75) for v in range(V)]
    assert named == [(shades[v], f"chunks {v * P} to {v * P + P - 1}") for v in range(V)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_timetable(size, tmp_path):
    """Of the file: most of a box has its virtual stage's colour, hatched or not; idle places are white."""
    table = Timetable(*size)
    figure = pipeline.figure(table)
    pixels = image.imread(figures.save(figure, tmp_path / "drawn.png"))[::-1, :, :3]
    place, scale = figure.axes[0].transData, len(pixels) / figure.bbox.height
    for band, entries in zip(BANDS, (table.forward, table.backward), strict=True):
        for tick, stage in np.ndindex(*entries.shape[:2]):
            upper = stage + band
            corners = [(tick + 0.1, upper + HEIGHT - 0.05), (tick + 0.9, upper + 0.05)]
            (left, low), (right, high) = (scale * place.transform(corners)).astype(int)
            virtual = entries[tick, stage, 1]
            shade = colors.to_rgb(pipeline.SHADES[virtual] if virtual >= 0 else "white")
            np.testing.assert_allclose(
                most(pixels[low:high, left:right]), 1 - 0.75 * (1 - np.array(shade)), atol=0.01
            )


def test_the_command_draws_it(tmp_path, capsys):
    out = tmp_path / "timetable.png"
    assert __main__.main([*WORDS, "--pipeline=4x2x8", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "24 sublayers, AttnRes blocks of 8, in 8 chunks" in said
    assert text(Timetable(4, 2, 8)) in said
    found = image.imread(out)
    for size in ((4, 2, 8), (4, 1, 16), (8, 1, 8)):
        other = figures.save(pipeline.figure(Timetable(*size)), tmp_path / "other.png")
        assert np.array_equal(found, image.imread(other)) == (size == (4, 2, 8))


@pytest.mark.parametrize("name", residuals.SCHEMES)
def test_every_scheme(name, capsys):
    """Which chunk runs where, what each hop carries; a history that is one unit goes whole over each hop."""
    words = [*WORDS, f"--config.residual={name}", "--pipeline=4x2x8"]
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert text(Timetable(4, 2, 8)) in said
    found, unit = cells(said), ACTIVATIONS.get(name, 1)
    chunks = [found[str(c)] for c in range(8)]
    assert [chunk[0] for chunk in chunks] == [*"01230123"]
    assert [chunk[1] for chunk in chunks[:3]] == ["1..2", "3..6", "7..8"]
    assert found["activations [B,T,D] in a unit"] == [str(unit)]
    assert ("24 sublayers, one history, in 8 chunks" in said) == (name in WHOLE)
    if name in WHOLE:
        assert [chunk[2:] for chunk in chunks] == [["", ""], *[["the history", str(unit)]] * 7]
        assert found["units a microbatch sends, one way"] == ["7"]
        assert found["units a stage sends in a tick, all as long: forward"] == found["backward"] == ["1"]
    for count, label in ((26, "ticks"), (11, "chunks in flight on a stage, at most")):
        assert found[label] == [str(count)]
    assert found["microbatches whose units a stage holds, at most"] == ["8"]


def test_streams_are_the_configs(capsys):
    assert __main__.main([*WORDS, "--config.residual=mhc", "--config.streams=3", "--pipeline=2x1x2"]) == 0
    assert cells(capsys.readouterr().out)["1"] == ["1", "13..24", "the history", "3"]


@pytest.mark.parametrize("residual", ["block", "mhc"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--pipeline=4x2x7",), "must be a multiple of it, got 7"),
        (("--pipeline=4x2",), "such as 4x2x8"),
        (("--pipeline=1x2x8",), "at least 2 stages"),
        (("--pipeline=16x2x32",), "12 transformer blocks cannot fill 32 chunks"),
        (("--out=a.png",), "--out goes with --pipeline"),
        (("--schemes", "--out=a/ranks.md"), "ranks.md is the name of the second page"),
        (("--pipeline=4x2x8", "--devices=4"), "--devices does not go with --pipeline"),
    ],
)
def test_in_vain(more, said, residual, capsys):
    assert __main__.main([*WORDS, f"--config.residual={residual}", *more]) == 2
    assert said in capsys.readouterr().err


def read(axes):
    """What boxes, their colours and numbers say: forward and backward tables as `Timetable` has them."""
    ticks, stages = int(axes.get_xlim()[1]), int(axes.get_ylim()[0])
    found = np.full((2, ticks, stages, 2), -1)
    shades = [colors.to_rgb(shade) for shade in pipeline.SHADES]
    for box in axes.patches:
        stage, within = divmod(round(box.get_y(), 2), 1)
        way = BANDS.index(round(within, 2))
        assert bool(box.get_hatch()) == bool(way)
        assert (box.get_width(), round(box.get_height(), 2)) == (1, HEIGHT)
        (number,) = (int(note.get_text()) for note in axes.texts if _inside(note, box))
        entry = found[way, int(box.get_x()), int(stage)]
        assert (entry == -1).all()
        entry[:] = number, shades.index(box.get_facecolor()[:3])
    assert len(axes.texts) == len(axes.patches)
    return found


def _inside(note, box):
    x, y = note.xy
    return 0 < x - box.get_x() < box.get_width() and 0 < y - box.get_y() < box.get_height()


def most(pixels):
    """The most frequent colour."""
    found, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return found[counts.argmax()]


def cells(said):
    """First cell of each line of the tables -> the others."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line)
    return {row[0]: row[1:] for row in rows}
