"""The pages of two sweeps: loss against S (the paper's Figure 6), and depth against width (Figure 7)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from attnres_jax.analysis import figures, heatmaps
from attnres_jax.analysis.compare import Run, groups
from attnres_jax.analysis.made import Made
from attnres_jax.analysis.pages import markdown
from attnres_jax.analysis.paper import FIGURE6
from attnres_jax.configs.shapes import Shape
from attnres_jax.configs.sweeps import CELLS, GRID


def block_size(runs: Sequence[Run], out: Path) -> tuple[str, str]:
    """Held-out loss of Block by S, and of the plain residual if it was run: title, and body in markdown."""
    bits = _by(runs, lambda run: run.config["block_size"] if run.config["residual"] == "block" else 0)
    plain, bits = bits.pop(0, []), dict(sorted(bits.items()))
    sublayers = len(runs[0].kinds)
    named = {1: "Full", sublayers: "one block"}
    figures.save(figures.against_block_size(bits, plain, named), out / "block_size.png")
    cells = [(str(size), str(-(-sublayers // size)), *_cell(bits[size], FIGURE6.get(size))) for size in bits]
    if plain:
        cells.append(("plain", "", *_cell(plain, FIGURE6[0])))
    body = markdown(("S", "AttnRes blocks", "seeds", "here, bits/byte", "paper, nats/token"), cells)
    return "Loss against the block size S", f"{body}\n\n![Loss against S](block_size.png)"


def depth_width(runs: Sequence[Run], out: Path) -> tuple[str, str]:
    """Held-out loss in each cell of `GRID`, a panel for each scheme: title, and body in markdown."""
    cells = dict(zip(CELLS.values(), GRID, strict=True))

    def place(run):
        shape = Shape(*(run.config[f"model.{name}"] for name in Shape._fields))
        return run.config["residual"], *cells[shape]

    bits = {key: float(np.mean(values)) for key, values in _by(runs, place).items()}
    ratios, heads = (sorted(set(values)) for values in zip(*GRID, strict=True))
    tables = {
        name: np.array([[bits.get((name, ratio, head), np.nan) for head in heads] for ratio in ratios])
        for name in dict.fromkeys(key[0] for key in bits)
    }
    figures.save(heatmaps.depth_width(tables, ratios, heads), out / "depth_width.png")
    best = [min((loss, *key) for key, loss in bits.items() if key[0] == name) for name in tables]
    found = "; ".join(f"{name} at D/L_b = {ratio:g}, H/L_b = {head:g}" for _, name, ratio, head in best)
    seeds = len({run.config["seed"] for run in runs})
    said = (
        f"Lowest here, over {seeds} seed{'s' * (seeds > 1)}: {found}. In the paper (D/L_b 15 to 75): plain "
        "at about 60, AttnRes at about 45. The ratios are those asked for; whole numbers of heads and "
        "blocks are near them."
    )
    table = markdown(("D/L_b", "H/L_b", "L_b", "D", "H", "F", *tables), _rows(cells, bits, tables))
    body = f"{said}\n\n![Depth against width](depth_width.png)\n\nHeld-out bits per byte:\n\n{table}"
    return "Depth against width", body


def _rows(cells, bits, names):
    """A row for each cell that was run: what was asked for, its shape, the loss of each scheme."""
    for shape, (ratio, heads) in cells.items():
        losses = [bits.get((name, ratio, heads)) for name in names]
        if any(losses):
            asked = f"{ratio:g}", f"{heads:g}"
            sizes = map(str, (shape.blocks, shape.width, shape.heads, shape.mlp_width))
            yield *asked, *sizes, *(f"{loss:.4f}" if loss else "" for loss in losses)


PAGES: dict[str, Callable[[Sequence[Run], Path], tuple[str, str]]] = {
    "block_size": block_size,
    "depth_width": depth_width,
}
"""By what a sweep calls its page."""


def report(page: str, runs: Sequence[Run], made: Made, out: Path) -> None:
    """Write README.md and its figure into `out`."""
    title, body = PAGES[page](runs, out)
    head = made.line(len(groups(runs)), {run.config["seed"] for run in runs})
    linked = f"{head}. All runs, with caveats: [comparison](comparison.md)."
    text = [f"# {title}", body, _limits(runs), linked]
    (out / "README.md").write_text("\n\n".join(text) + "\n")


def _limits(runs):
    seeds, sizes = ({run.config[key] for run in runs} for key in ("seed", "train.steps"))
    counts = sorted({run.parameters for run in runs})
    rates, texts = (sorted({run.config[key] for run in runs}) for key in ("optim.lr", "data.corpus"))
    rate = f"all have {rates[0]:g}" if len(rates) == 1 else f"it goes by the width, {_span(rates, 'g')}"
    return (
        f"**Not shown**: the order of rows that differ by no more than seeds do ({len(seeds)} here); another "
        f"text than {', '.join(texts)}; another size than {_span(counts, ',')} parameters and "
        f"{_span(sorted(sizes), ',')} updates, far from convergence; a learning rate of its own for each "
        f"shape: {rate}."
    )


def _span(values, form):
    """`1 to 3`, or `2` where all are the same."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (values[0], values[-1])))


def _by(runs, key) -> dict:
    """Held-out bits per byte of the runs (seeds) of each key."""
    found: dict = {}
    for run in runs:
        found.setdefault(key(run), []).append(run.evaluation["bits_per_byte"])
    return found


def _cell(bits, paper):
    spread = f" ± {np.std(bits, ddof=1):.4f}" if len(bits) > 1 else ""
    return str(len(bits)), f"{np.mean(bits):.4f}{spread}", "" if paper is None else f"{paper:.3f}"
