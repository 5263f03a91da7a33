"""The figures: every scheme looks the same in all, what is drawn where, and that it can be read."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_analysis import run, statistics

from attnres_jax import configs
from attnres_jax.analysis import compare, figures, heatmaps, looks
from attnres_jax.configs import sweeps
from attnres_jax.residuals import SCHEMES, make
from attnres_jax.schedule import BlockSchedule


def test_loss_figure_marks_heldout_points_once():
    """The evaluation after the last step stands for the logged one at that step (77 bits/byte)."""
    rows = compare.groups([run("plain"), run("full")])
    figure = figures.loss_curves(*compare._curves(rows))
    whole = figure.axes[0]
    dots = [line for line in whole.lines if line.get_linestyle() == "None"]
    assert [list(line.get_ydata()) for line in dots] == [[4.0, 2.5], [4.0, 2.5]]
    assert whole.get_ylabel() == "bits / byte"
    assert [text.get_text() for text in whole.get_legend().get_texts()] == ["plain", "full"]


def test_no_two_schemes_look_the_same():
    """One that is new may be without a look: it is one file and one line of the table, and grey."""
    assert set(looks.LOOKS) <= set(SCHEMES)
    assert len(looks.LOOKS) >= 30
    found = [*looks.LOOKS.values(), looks.NEW]
    assert len(set(found)) == len(found)
    dots = [(paint, looks.MARKERS[turn % len(looks.MARKERS)]) for paint, turn in found]
    assert len(set(dots)) == len(dots)


def test_a_scheme_looks_the_same_beside_any_others():
    """Alone, after all, before all; a second row of it takes what is nobody's."""
    alone = {name: looks.styles([name])[name] for name in looks.LOOKS}
    assert looks.styles(list(looks.LOOKS)) == alone
    assert looks.styles(list(reversed(looks.LOOKS))) == alone
    rest = [name for name in looks.LOOKS if name != "hc"]
    found = looks.styles(["hc S=1", "hc S=2", *rest])
    assert [found[name] for name in ("hc S=1", *rest)] == [alone[name] for name in ("hc", *rest)]
    assert found["hc S=2"] not in alone.values()


def test_looks_are_for_ever():
    """Figures of different days are compared; a new scheme is a new line here."""
    found = looks.styles(list(looks.LOOKS))
    assert "".join(f"{name} {' '.join(style)}\n" for name, style in found.items()) == PINNED


PINNED = """\
plain #000000 - o
block #0072B2 - o
full #D55E00 - o
mhc #009E73 - o
full_static #882255 - o
block_heads #882255 -- s
mhc_lite #882255 : ^
mrla #882255 -. D
delta #882255 - v
layerscale #882255 -- P
siamese #882255 : X
window #CC79A7 - o
hc #CC79A7 -- s
ddl #CC79A7 : ^
full_recency #CC79A7 -. D
block_sliced #CC79A7 - v
delta_block #CC79A7 -- P
highway #CC79A7 : X
full_input_query #E69F00 - o
full_sigmoid #E69F00 -- s
densenet #E69F00 : ^
block_additive #E69F00 -. D
deepnorm #E69F00 - v
hc_static #E69F00 -- P
denseformer #56B4E9 - o
full_unnormed #56B4E9 -- s
block_unnormed #56B4E9 : ^
rezero #56B4E9 -. D
keel #56B4E9 - v
rms_block #56B4E9 -- P
"""


def test_rows_of_a_scheme_share_its_colour():
    series = [figures.Series(label, [1, 2], [1.0, 2.0]) for label in ("full", "block S=4", "block S=8")]
    lines = figures.depth_dynamics(series, series).axes[1].lines
    assert [to_hex(line.get_color()).upper() for line in lines] == ["#D55E00", "#0072B2", "#0072B2"]
    assert lines[1].get_linestyle() != lines[2].get_linestyle()
    assert looks.colour("not_yet S=4") == looks.GREY


def rows_of(sweep):
    """The labels that a sweep's rows have in its figures."""
    members = sweeps.members(sweep, "quick", seeds=1)
    made = [run("plain")._replace(name=m.name, config=configs.to_flat(m.config)) for m in members]
    found = compare.groups(made)
    assert len(found) == len(sweep.rows)
    return [group.label for group in found]


@pytest.mark.parametrize("labels", [list(SCHEMES), *map(rows_of, sweeps.SWEEPS.values())])
def test_no_two_look_alike(labels):
    """Lines by colour, dash and marker, held-out dots by colour and marker; and a dot is its line's."""
    series = [figures.Series(label, [1, 2], [1.0, 2.0]) for label in labels]
    figure = figures.loss_curves(series, series)
    assert not list(untidy(figure))
    assert all(axes.get_position().width * figure.get_figwidth() > 3 for axes in figure.axes)  # inches
    wholes = figure.axes[: len(figure.axes) // 2]
    lines = [line for axes in wholes for line in axes.lines if line.get_linestyle() != "None"]
    dots = [line for axes in wholes for line in axes.lines if line.get_linestyle() == "None"]
    assert {line.get_label() for line in lines} == set(labels)
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == len(labels)
    marks = [{(line.get_color(), line.get_marker()) for line in each} for each in (lines, dots)]
    assert marks[0] == marks[1]
    assert len(marks[1]) == len(labels)
    assert all(line.get_color() == looks.colour(line.get_label()) for line in lines)


def names_in(axes):
    return [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]


def test_many_schemes_are_shared_out():
    """The first, faint, in every panel beside six others at most; each other in one; all in the legends."""
    for count, columns in ((8, 1), (9, 2), (19, 3)):
        names = list(SCHEMES)[:count]
        series = [figures.Series(name, [1, 2], [1.0, 2.0]) for name in names]
        for figure in (figures.loss_curves(series, series), figures.depth_dynamics(series, series)):
            assert not list(untidy(figure))
            assert len(figure.axes) == 2 * columns
            for row in (figure.axes[:columns], figure.axes[columns:]):
                shares = [names_in(axes) for axes in row]
                assert [name for share in shares for name in share[1:]] == names[1:]
                assert {share[0] for share in shares} == {names[0]}
                assert max(map(len, shares)) <= (8 if columns == 1 else 7)
                assert {axes.lines[0].get_alpha() for axes in row} == {1.0 if columns == 1 else figures.FAINT}
            legends = [axes.get_legend() for axes in figure.axes[columns:]] if columns > 1 else figure.legends
            assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == shares


@pytest.mark.parametrize(
    ("sweep", "of"), [("depth_width", 3 * "plain " + 3 * "block "), ("block_size", 2 * "block ")]
)
def test_many_rows_of_a_scheme_are_shared_out(sweep, of):
    """Three of a colour in a panel, three panels in a row, the same sizes of two schemes above each other;
    panels of a kind have one scale; each has its units, and a title that touches no other."""
    labels = rows_of(sweeps.SWEEPS[sweep])
    series = [
        figures.Series(label, range(1, 25), np.geomspace(1, at + 2, 24)) for at, label in enumerate(labels)
    ]
    for figure in (figures.loss_curves(series, series), figures.depth_dynamics(series, series)):
        assert not list(untidy(figure))
        half = len(figure.axes) // 2
        for panels in (figure.axes[:half], figure.axes[half:]):
            shares = [names_in(axes) for axes in panels]
            assert [name for share in shares for name in share[1:]] == labels[1:]
            assert {share[0] for share in shares} == {labels[0]}
            assert [len(share) for share in shares] == [4 - (sweep == "depth_width"), *[4] * (half - 1)]
            assert len({axes.get_position().x0 for axes in panels}) == min(half, figures.ACROSS)
            assert len({axes.get_ylim() for axes in panels}) == 1
            assert len({axes.get_ylabel() for axes in panels}) == 1
            titles = [axes.get_title(loc="left").split(": ") for axes in panels]
            assert [title[-1] for title in titles] == of.split()
            assert [len(title) for title in titles] == [1 + (at % 3 == 0) for at in range(half)]
        lines = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() != "None"]
        assert {line.get_markevery() for line in lines} <= {0.1, 3}
        boxes = [axes._left_title.get_window_extent() for axes in figure.axes]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_colours_decide_who_shares_a_panel():
    """Nine labels in two shares; where four of one colour meet in a share, those of it go apart."""
    wine = ["full_static", "block_heads", "mhc_lite", "mrla"]
    few = ["full", "mhc", "hc", "ddl"]
    mixed = [name for both in zip(wine, few, strict=True) for name in both]
    assert [len(share) for share in figures._shares("plain", *mixed)] == [4, 4]
    assert figures._shares("plain", *wine, *few) == [wine[:2], wine[2:], few]
    assert figures._shares("plain", *wine[:3], *few) == [(*wine[:3], *few)]


def test_lines_too_far_apart_have_scales_of_their_own():
    """One run's gradient falls by nine decades: on one scale it would flatten all others."""
    labels = rows_of(sweeps.SWEEPS["block_size"])
    series = [figures.Series(label, range(1, 33), [1.0] * 32) for label in labels]
    falls = [*series[:-1], figures.Series(labels[-1], range(1, 33), np.geomspace(1, 1e-9, 32))]
    first, second = figures.depth_dynamics(series, falls).axes[2:]
    assert first.get_ylim()[0] > 0.01
    assert second.get_ylim()[0] < 1e-8
    assert {axes.get_ylabel() for axes in (first, second)} == {"L2 norm (nats / token), own scale"}
    assert "own scale" not in figures.depth_dynamics(falls[-1:], falls[-1:]).axes[1].get_ylabel()


def test_a_run_that_diverged_hides_no_others():
    """Of ten runs one ends at 40, one has no number: named beside a close-up on the scale of the others."""
    names = list(SCHEMES)[:10]
    runs = [figures.Series(name, [1, 5, 10], [9.0, 2.5, 2 + at / 50]) for at, name in enumerate(names)]
    runs[4] = figures.Series(names[4], [1, 5, 10], [9.0, 40.0, 40.0])
    runs[5] = figures.Series(names[5], [1, 5, 10], [9.0, np.nan, np.nan])
    close = figures.loss_curves(runs, runs).axes[2:]
    assert {axes.get_ylim() for axes in close} == {close[0].get_ylim()}
    assert close[0].get_ylim()[0] < 2
    assert 2.5 < close[0].get_ylim()[1] < 5
    assert [[text.get_text() for text in axes.texts] for axes in close] == [
        [f"above: {names[4]}, {names[5]}"],
        [],
    ]
    few = figures.loss_curves(runs[:5], runs[:5]).axes[1]
    assert few.get_ylim()[1] > 40
    assert not few.texts


def test_a_run_that_ended_early_is_not_above():
    names = list(SCHEMES)[:10]
    runs = [figures.Series(name, [1, 5, 10], [9.0, 2.5, 2.0]) for name in names]
    runs[4] = figures.Series(names[4], [1, 4], [9.0, 2.1])
    assert not any(axes.texts for axes in figures.loss_curves(runs, runs).axes)


def test_a_loss_that_is_no_number_is_drawn_all_the_same():
    nowhere = [figures.Series("plain", [1, 10], [np.nan, np.nan])]
    assert len(figures.loss_curves(nowhere, nowhere).axes) == 2


def test_seeds_are_averaged_in_one_line():
    points = ([1, 2, 3], [1.0, 2.0, 3.0]), ([1, 3], [3.0, 5.0])
    series = [figures.Series("full", x, y) for x, y in points]
    lines = figures.depth_dynamics(series, series).axes[0].lines
    bold = [line for line in lines if line.get_label() == "full"]
    assert len(bold) == 1
    np.testing.assert_array_equal(bold[0].get_xydata(), [[1, 2], [3, 4]])


def test_heatmap_puts_weights_where_they_belong():
    """L = 5, S = 2: the running sum has its own column, absent sources are blank."""
    weights = np.arange(1, 25).reshape(6, 4) / 24
    attention, mlp = heatmaps.weight_heatmap(weights, "amama", BlockSchedule(5, 2)).axes[:2]
    reads = [
        [1, 0, 0, 0, 0],
        [9, 10, 0, 0, 0],
        [17, 18, 19, 0, 0],
        [21, 22, 23, 24, 0],  # the output read: all three blocks
    ]
    np.testing.assert_allclose(shown(attention), reads)
    np.testing.assert_allclose(shown(mlp), [[5, 0, 0, 0, 6], [13, 14, 0, 0, 15]])
    assert [t.get_text() for t in attention.get_xticklabels()] == ["emb", "1", "2", "3", "sum"]
    assert [t.get_text() for t in attention.get_yticklabels()] == ["1", "3", "5", "out"]
    assert [t.get_text() for t in mlp.get_yticklabels()] == ["2", "4"]


def shown(axes):
    """The image in units of 1/24, zero where it is blank."""
    return np.ma.filled(np.ma.asarray(axes.images[0].get_array()), 0) * 24


def test_weights_that_are_no_shares_have_their_own_scale():
    """DenseFormer's: below zero and above one, which would else be drawn as zero and one."""
    schedule = BlockSchedule(2, 1)
    weights = np.tri(3, 3)
    norms = [heatmaps.weight_heatmap(weights, "am", schedule).axes[0].images[0].norm]
    weights[2, :2] = -0.5, 2.0
    panels = heatmaps.weight_heatmap(weights, "am", schedule).axes
    norms.append(panels[0].images[0].norm)
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(0, 1), (-2, 2)]
    assert {"0", "2"} <= {label.get_text() for label in panels[-1].get_yticklabels()}


@pytest.mark.parametrize("high", [1.0, 1.2, 1.8, 2.0, 3.3, 12.7])
def test_ticks_of_a_scale_do_not_crowd(high):
    """The least distance between two, as a share of the bar; at 1.8 two were 0.9 and 1 once."""
    norm, _ = heatmaps._scale(high, False)
    assert np.diff(norm(heatmaps._tick_values(norm))).min() > 0.1


def test_weights_of_a_run_that_diverged_are_blank():
    """All NaN: no colour but that of what is no source, on the scale of shares."""
    panels = heatmaps.weight_heatmap(np.full((3, 3), np.nan), "am", BlockSchedule(2, 1)).axes
    image = panels[0].images[0]
    assert np.ma.getmaskarray(np.ma.asarray(image.get_array())).all()
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)
    assert not list(untidy(panels[0].figure))


def test_seeds_of_many_schemes_are_not_drawn_one_by_one():
    for count, seeds in ((6, 2), (7, 0)):
        names = list(SCHEMES)[:count]
        series = [figures.Series(name, [1, 2], [1.0, 2.0]) for name in names for _ in range(2)]
        lines = figures.depth_dynamics(series, series).axes[0].lines
        assert len(lines) == count * (1 + seeds)


def test_full_has_no_running_sum():
    weights = np.tri(5) / 5
    axes = heatmaps.weight_heatmap(weights, "amam", BlockSchedule(4, 1)).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["emb", "1", "2", "3", "4"]


def shown_labels(axis):
    """Tick labels with a text that lie in view."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
    return [label for label in labels if label.get_text()]


def untidy(figure):
    """Tick labels that touch, axes without any of their own or shared, and axes that leave the canvas."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        for name, sharing in (("x", axes.get_shared_x_axes()), ("y", axes.get_shared_y_axes())):
            boxes = [
                label.get_window_extent(renderer) for label in shown_labels(getattr(axes, f"{name}axis"))
            ]
            yield from (pair for pair in pairwise(boxes) if pair[0].overlaps(pair[1]))
            same = [getattr(other, f"{name}axis") for other in sharing.get_siblings(axes)]
            of_bar = name == "x" and axes.get_label() == "<colorbar>"
            if not of_bar and not any(map(shown_labels, same)):
                yield f"no labels along {name} of {axes.get_title() or axes}"
        box, whole = axes.get_tightbbox(renderer), figure.bbox
        if min(box.x0, box.y0) < 0 or box.x1 > whole.width or box.y1 > whole.height:
            yield box


@pytest.mark.parametrize("lowest", [1e-12, 1e-9, 1e-5, 1e-3, 0.01, 0.1, 0.3, 0.7])
def test_a_logarithmic_axis_has_labels(lowest):
    """Over nine decades it had none at all."""
    series = [figures.Series("plain", [1, 2], [lowest, 1.0])]
    figure = figures.depth_dynamics(series, series)
    assert not list(untidy(figure))
    for axes in figure.axes:
        assert len(shown_labels(axes.yaxis)) >= 2


@pytest.mark.parametrize(("blocks", "size"), [(8, 4), (27, 6), (27, 1)])
def test_labels_are_legible(blocks, size):
    kinds = "am" * blocks
    scheme = make("block", block_size=size)
    weights = statistics(scheme, kinds).weights
    schedule = scheme.schedule(len(kinds))
    matrices = dict.fromkeys(("plain", "block", "full"), np.tri(len(kinds) + 1))
    assert not list(untidy(heatmaps.weight_heatmap(weights, kinds, schedule, "block")))
    assert not list(untidy(heatmaps.depth_matrices(matrices, "token")))
