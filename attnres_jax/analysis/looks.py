"""How a scheme is drawn, in every figure and for ever: its colour, and its dash and marker, by its name.

Colours are those of Okabe and Ito, and one of Tol (wine), safe for the colour-blind; those that share one are
told apart by dash and marker. An entry is never changed: figures of different days are compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

WINE, PURPLE, ORANGE, SKY, GREY = "#882255", "#CC79A7", "#E69F00", "#56B4E9", "#767676"
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX*<"
"""Nine, which has no divisor in common with four: 36 pairs of dash and marker of one colour."""
TURNS = len(DASHES) * len(MARKERS)

LOOKS = {
    "plain": ("#000000", 0),
    "block": ("#0072B2", 0),
    "full": ("#D55E00", 0),
    "mhc": ("#009E73", 0),
    "full_static": (WINE, 0),
    "block_heads": (WINE, 1),
    "mhc_lite": (WINE, 2),
    "mrla": (WINE, 3),
    "delta": (WINE, 4),
    "layerscale": (WINE, 5),
    "siamese": (WINE, 6),
    "window": (PURPLE, 0),
    "hc": (PURPLE, 1),
    "ddl": (PURPLE, 2),
    "full_recency": (PURPLE, 3),
    "block_sliced": (PURPLE, 4),
    "delta_block": (PURPLE, 5),
    "highway": (PURPLE, 6),
    "full_input_query": (ORANGE, 0),
    "full_sigmoid": (ORANGE, 1),
    "densenet": (ORANGE, 2),
    "block_additive": (ORANGE, 3),
    "deepnorm": (ORANGE, 4),
    "hc_static": (ORANGE, 5),
    "denseformer": (SKY, 0),
    "full_unnormed": (SKY, 1),
    "block_unnormed": (SKY, 2),
    "rezero": (SKY, 3),
    "keel": (SKY, 4),
    "rms_block": (SKY, 5),
}
"""The colour, and which pair of dash and marker of that colour."""
NEW = (GREY, 0)
"""Of a scheme that has no entry yet."""


class Style(NamedTuple):
    """How a label's line and dots are drawn."""

    colour: str
    dash: str
    marker: str


def colour(label: str) -> str:
    """The colour of the scheme a label begins with."""
    return LOOKS.get(scheme(label), NEW)[0]


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label, no two alike: the first of a scheme has the scheme's, others the next free one.

    Of one colour 36 differ as lines, nine also as dots, by the marker.
    """
    firsts = {scheme(label): label for label in reversed(labels)}
    taken: dict[str, tuple[str, int]] = {}
    for label in (*firsts.values(), *labels):
        if label not in taken:
            paint, own = LOOKS.get(scheme(label), NEW)
            turns = [(paint, (own + n) % TURNS) for n in range(TURNS)]
            taken[label] = next((turn for turn in turns if turn not in taken.values()), turns[0])
    return {label: _style(*taken[label]) for label in labels}


def scheme(label: str) -> str:
    """What a label begins with."""
    return label.split()[0]


def _style(paint, turn):
    return Style(paint, DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)])
