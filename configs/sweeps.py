"""Sweeps: named lists of runs, each a few keys changed in a config. A row is a line.

Every row runs with the same seeds: the same initial weights where shapes agree, and the same data in the
same order where batch, length and text do, so that rows are compared seed by seed.

Command   python -m attnres_jax sweep table4 --out=runs/table4
Time      not measured (36 runs of 12 blocks: hours on 2 CPU cores; --config.train.steps=100 for a first look)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from attnres_jax import configs
from attnres_jax.configs import shapes
from attnres_jax.configs.base import KEYS, ConfigError, choose

Keys = dict[str, Any]


class Sweep(NamedTuple):
    """Rows by name, each with the keys it changes, after `common`, in the config a command names."""

    purpose: str
    rows: dict[str, Keys]
    common: Keys
    seeds: int = 3
    sizes: bool = False
    """Whether its rows are several sizes of a few schemes, for a scaling law."""
    claims: bool = False
    """Whether its rows are those of Table 4, for the pages of evidence."""
    page: str = ""
    """Which of `analysis.grids.PAGES` its rows make, if one."""

    def only(self, names: Sequence[str]) -> "Sweep":
        """Some of its rows; `ConfigError` where there is none of a name."""
        return self._replace(rows={choose("row", name, self.rows): self.rows[name] for name in names})


class Member(NamedTuple):
    """One run of a sweep: its name, its config, and what makes `configs.load` give that."""

    name: str
    config: configs.Config
    overrides: tuple[str, ...]


SCHEMES: dict[str, Keys] = {
    "plain": {"residual": "plain"},
    "block": {"residual": "block", "block_size": 4},
    "full": {"residual": "full"},
}

TABLE4: dict[str, Keys] = {
    "baseline": {"residual": "plain"},
    "denseformer": {"residual": "denseformer"},
    "mhc": {"residual": "mhc", "streams": 4},
    "full": {"residual": "full"},
    "input-query": {"residual": "full_input_query"},
    "static": {"residual": "full_static"},
    "sigmoid": {"residual": "full_sigmoid"},
    "unnormed": {"residual": "full_unnormed"},
    "window": {"residual": "window", "window": 8},
    "block-s4": {"residual": "block", "block_size": 4},
    "block-heads": {"residual": "block_heads", "block_size": 4, "depth_heads": 16},
    "block-unnormed": {"residual": "block_unnormed", "block_size": 4},
}
"""Rows of the paper's Table 4."""


def _rate(width: int) -> float:
    """The learning rate as 1/D through quick's."""
    return 4e-3 * 64 / width


def _residuals(rows: dict[str, Keys]) -> set[str]:
    return {keys["residual"] for keys in rows.values()}


def _size(blocks: int, width: int, tokens_per_parameter: float = 4.0) -> Keys:
    """F = 3 D, heads of 16; 2048 tokens an update."""
    parameters = blocks * 13 * width**2
    keys = {"blocks": blocks, "width": width, "heads": width // 16, "kv_heads": width // 16}
    model = {f"model.{key}": value for key, value in (keys | {"mlp_width": 3 * width}).items()}
    steps = round(tokens_per_parameter * parameters / 2048)
    return model | {"train.steps": steps, "optim.lr": _rate(width)}


SIZES = {f"d{blocks}": _size(blocks, width) for blocks, width in ((4, 32), (6, 48), (8, 64), (10, 80))}

GRID = [(ratio, heads) for ratio in (4, 8, 16) for heads in (0.25, 0.5, 0.75)]
CELLS = {f"w{ratio:g}-h{heads:g}": shapes.solve(420_000, ratio, heads) for ratio, heads in GRID}
"""By D/L_b and heads/L_b, in the order of `GRID`. The paper's ratios, 15 to 75, would leave 2 to 5 blocks
at this size."""


def _cell(shape: shapes.Shape) -> Keys:
    sizes = shape._asdict() | {"kv_heads": shape.heads}
    return {f"model.{key}": value for key, value in sizes.items()} | {"optim.lr": _rate(shape.width)}


def _product(first: dict[str, Keys], second: dict[str, Keys]) -> dict[str, Keys]:
    return {f"{a}-{b}": first[a] | second[b] for b in second for a in first}


OTHERS = ("plain", *(n for n in KEYS["residual"].legal.options if n not in _residuals(TABLE4)))

SWEEPS: dict[str, Sweep] = {
    "table4": Sweep("ablations, Table 4 of the paper", TABLE4, {"model.blocks": 12}, claims=True),
    "others": Sweep(
        "the schemes that are not in Table 4, beside plain",
        {n: {"residual": n} for n in OTHERS},
        {"model.blocks": 12},
    ),
    "block_size": Sweep(
        "S of Block AttnRes over 32 sublayers, beside plain, Figure 6",
        {"plain": SCHEMES["plain"]}
        | {f"s{size}": {"residual": "block", "block_size": size} for size in (1, 2, 4, 8, 16, 32)},
        {"model.blocks": 16},
        page="block_size",
    ),
    "scaling": Sweep(
        "loss against compute at four sizes, 4 tokens a parameter, Figure 4",
        _product(SCHEMES, SIZES),
        {"data.batch": 16, "data.length": 128},
        sizes=True,
    ),
    "depth_width": Sweep(
        "depth against width at 0.42 M parameters, plain and Block, Figure 7",
        _product(
            {name: SCHEMES[name] for name in ("plain", "block")}, {k: _cell(s) for k, s in CELLS.items()}
        ),
        {},
        seeds=1,
        page="depth_width",
    ),
}


def members(sweep: Sweep, config: str, overrides: Sequence[str] = (), seeds: int = 0) -> list[Member]:
    """The runs of a sweep on a config: all rows of seed 0, then of seed 1 ... (`seeds` 0: the sweep's own).

    `overrides` hold for every run; `ConfigError` if one is of a key that the rows vary.
    """
    varied = {"seed"}.union(*sweep.rows.values())
    for override in overrides:
        key = override.removeprefix(configs.PREFIX).partition("=")[0]
        if key in varied:
            raise ConfigError(f"{override} would hold for every run, but {key} is what this sweep varies")
    made = []
    for seed in range(seeds or sweep.seeds):
        for name, keys in sweep.rows.items():
            changed = sweep.common | keys | {"seed": seed}
            # The command line's come last: they change what all rows have in common.
            words = (*(f"{configs.PREFIX}{key}={value}" for key, value in changed.items()), *overrides)
            made.append(Member(f"{name}-{seed}", configs.load(config, words), words))
    return made
