"""`python -m attnres_jax compile`: a config's train step, compiled for a slice that need not be there.

The real update (`train.step`: forward, backward, optimizer, kernels and all) goes through libtpu's compiler;
what comes out is read, nothing is run and no parameter is made. Whether it fits is what the compiler says.
"""

import json
import math
import re
import resource
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from attnres_jax import configs
from attnres_jax.analysis import inspect
from attnres_jax.bench import collectives, cost, fit, hlo, reads, report, roofline, target, traffic
from attnres_jax.configs import Config, UserError
from attnres_jax.parallel import mesh as meshes
from attnres_jax.train.data import open_corpus

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
    """The compiler's own word: bytes that a device needs, and that it has."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs {needed} of {available} bytes")
        self.needed, self.available = needed, available


class Slice(NamedTuple):
    """What is compiled for."""

    name: str
    devices: list[Any]
    chip: cost.Chip
    clock: float
    memory: int
    """Bytes of HBM a device."""


def found_slice(name: str, slices: int) -> Slice:
    """By libtpu's name."""
    devices = target.topology(name, slices)
    about = target.info(devices[0])
    clock = roofline.CLOCK[name.partition(":")[0].removeprefix("tpu")]
    called = f"{slices} x {name}" if slices > 1 else name
    return Slice(called, devices, target.chip(devices[0]), clock, about.hbm_capacity_bytes * about.num_cores)


def compiled(config: Config, vocab: int, devices: list[Any]) -> traffic.Compiled:
    """The update of `config` on `devices`.

    Raises:
      TooLarge: where it does not fit their memory.
    """
    try:
        return traffic.compiled(config, devices, vocab=vocab)
    except jax.errors.JaxRuntimeError as error:
        raise too_large(str(error)) or error from None


def too_large(said: str) -> TooLarge | None:
    """What a compiler that ran out of memory said; None where it failed for another reason."""
    if "RESOURCE_EXHAUSTED" not in said:
        return None
    sizes = re.findall(r"\(?([\d.]+)([KMGT]?)\)?", said[said.find("Ran out of memory") :])
    numbers = [int(float(number) * UNITS[unit]) for number, unit in sizes if unit]
    return TooLarge(*numbers[:2]) if len(numbers) >= 2 else None


def measure(config: Config, vocab: int, on: Slice) -> dict[str, Any]:
    """What the compiler says of one arm; `fits` is false where it would not have it."""
    memory = partial(fit.memory, config, vocab, len(on.devices))
    memory(0, 0)  # before the compiler has worked for minutes: is the config one for this slice?
    start = time.monotonic()
    try:
        program = compiled(config, vocab, on.devices)
    except TooLarge as over:
        seconds = round(time.monotonic() - start, 1)
        return _said(memory(over.needed, over.available), False) | {"compile_seconds": seconds}
    return (
        _said(memory(program.peak, on.memory), True)
        | {"compile_seconds": round(program.seconds, 1)}
        | _read(program, config, vocab, on)
    )


def _said(memory, fits):
    more = {"activations": memory.activations, "needed": memory.needed}
    return {"fits": fits, "memory": memory._asdict() | more}


def _read(program, config, vocab, on):
    sizes, model = meshes.sizes(config.mesh.to_dict(), len(on.devices)), configs.model_config(config, vocab)
    over = math.prod(sizes[axis] for axis in meshes.BATCH)
    shape = {
        "data.batch": config.data.batch // config.train.accumulation // over,
        "mesh.fsdp": 1,
        "data.length": config.data.length,
        "model.width": config.model.width // sizes["tensor"],
    }
    kernels = traffic.attention_kernels(shape) | reads.KERNELS
    module = hlo.parse(program.text)
    rows, planned = cost.rows(module, kernels), collectives.schedule(module, kernels, on.chip, on.clock)
    every = collectives.totals(planned.collectives)
    tokens = config.data.batch * config.data.length
    wanted = inspect.cost(model, config.data.length).training_flops * tokens / len(on.devices)
    return {
        "kernels": sorted({cost.kernel_name(row.name) for row in rows if row.kind == "kernel"}),
        "flops": sum(row.flops * row.times for row in rows),
        "hbm_bytes": sum(row.bytes for row in rows),
        "model_flops": wanted,
        "roofline_seconds": cost.seconds(rows, on.chip),
        "estimate_seconds": planned.seconds,
        "estimate_mfu": wanted / on.chip.flops_per_second / planned.seconds,
        "collectives": [total._asdict() for total in every],
        # What the pipeline sends; XLA makes permutes of its own.
        "messages": [c._asdict() for c in planned.collectives if c.op_name.endswith("/ppermute")],
        "exposed_share": sum(t.exposed for t in every) / (sum(t.bytes for t in every) or 1.0),
    }


def advice(config: Config, vocab: int, on: Slice, said: dict[str, Any], tries: int) -> dict[str, Any]:
    """`tried`: knobs, in order, each compiled, until one fits; `untried`: those that come after."""
    memory = fit.Memory(*(said["memory"][field] for field in fit.Memory._fields))
    slices = len({getattr(device, "slice_index", 0) for device in on.devices})
    knobs, tried = fit.knobs(config, vocab, len(on.devices), memory, slices), []
    for knob in knobs[:tries]:
        print(f"{on.name}: does not fit; trying {knob}", file=sys.stderr, flush=True)
        found = measure(fit.changed(config, knob.changes), vocab, on)
        tried.append(_named(knob) | found)
        if found["fits"]:
            break
    return {"tried": tried, "untried": [_named(knob) for knob in knobs[len(tried) :]]}


def _named(knob):
    return {"knob": str(knob), "predicted": knob.predicted}


def main(words: list[str]) -> int:
    """`words` is one JSON object: config, topology, slices, vocab, beside, tries, out.

    The exit code is 0 where the config's own arm fits, 1 where it does not, 2 after a mistake of the user's.
    """
    args = json.loads(words[0])
    config = configs.from_flat(args["config"])
    try:
        vocab = args["vocab"] or open_corpus(config.data.corpus).vocab
        on = found_slice(args["topology"], args["slices"])
        names = dict.fromkeys([config.residual, *args["beside"]])
        arms = {
            name: _arm(fit.changed(config, {"residual": name}), vocab, on, args["tries"]) for name in names
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whole = report.provenance(f"{on.devices[0].device_kind}, compiled for and not run")
    whole |= {"topology": on.name, "devices": len(on.devices), "vocab": vocab, "config": args["config"]}
    # Of this process: the compiler is a library in it.
    whole |= {"arms": arms, "compile_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    show(whole)
    report.write(whole, args["out"])
    return 0 if arms[config.residual]["fits"] else 1


def _arm(config, vocab, on, tries):
    print(f"{on.name}: compiling {config.residual}", file=sys.stderr, flush=True)
    said = measure(config, vocab, on)
    return said if said["fits"] else said | advice(config, vocab, on, said, tries)


def show(whole: dict[str, Any]) -> None:
    """The report for people."""
    console, arms = Console(), whole["arms"]
    on = f"{whole['topology']}, {whole['devices']} devices"
    console.print(_table(f"One update on {on}: bytes and FLOPs of a device", arms, SIZES))
    fitting = {name: arm for name, arm in arms.items() if arm["fits"]}
    if fitting:
        console.print(_table("Time: an estimate, links not counted", fitting, TIMES, CAPTION))
        console.print(_collectives(fitting))
        if any(arm["messages"] for arm in fitting.values()):
            console.print(_messages(fitting))
    for name, arm in arms.items():
        for line in verdict(name, arm):
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"memory of the compiler: {_bytes(whole['compile_memory'])}", highlight=False)


def verdict(name: str, arm: dict[str, Any]) -> list[str]:
    """Whether it fits; where not, what was tried, and what to change."""
    needed, available = (_bytes(arm["memory"][key]) for key in ("needed", "available"))
    if arm["fits"]:
        return [f"{name}: fits, {needed} of {available}"]
    lines = [f"{name}: does not fit, {needed} of {available}"]
    for one in arm["tried"]:
        outcome = "fits" if one["fits"] else "does not fit"
        lines.append(
            f"  {one['knob']}: compiled, {outcome}, {_bytes(one['memory']['needed'])}{_predicted(one)}"
        )
    if any(one["fits"] for one in arm["tried"]):
        return lines
    lines += [f"  {one['knob']}: not tried{_predicted(one)}" for one in arm["untried"]]
    tried, untried = len(arm["tried"]), len(arm["untried"])
    if untried:
        return [*lines, f"  {tried} of {tried + untried} changes tried: --tries={tried + untried} tries all"]
    if tried:
        return [
            *lines,
            f"  {tried} of {tried} changes tried, none is enough: change several or use more devices",
        ]
    return [*lines, f"  by arithmetic no single change of {KNOBS} is enough: use more devices"]


def _predicted(one):
    return f" (arithmetic said {_bytes(one['predicted'])})" if one["predicted"] else ""


KNOBS = "accumulation, remat, fsdp, vocab_chunks, tensor or stage"
"""What `fit.knobs` changes."""
SIZES = {
    "parameters": lambda arm: _bytes(arm["memory"]["parameters"]),
    "optimizer": lambda arm: _bytes(arm["memory"]["optimizer"]),
    "temporaries at the peak": lambda arm: _bytes(arm["memory"]["temporaries"]),
    "  of them gradients, at least": lambda arm: _bytes(arm["memory"]["gradients"]),
    "  matrices of a pipeline's stage, whole": lambda arm: _bytes(arm["memory"]["matrices"]),
    "  caches of a pipeline": lambda arm: _bytes(arm["memory"]["caches"]),
    "  activations and the rest of temporaries": lambda arm: _bytes(arm["memory"]["activations"]),
    "needed": lambda arm: _bytes(arm["memory"]["needed"]),
    "HBM": lambda arm: _bytes(arm["memory"]["available"]),
    "FLOPs of matrix products": lambda arm: f"{arm['flops']:.3g}" if arm["fits"] else "",
    "HBM bytes moved": lambda arm: _bytes(arm["hbm_bytes"]) if arm["fits"] else "",
    "compile time, s": lambda arm: f"{arm['compile_seconds']:.0f}",
}
TIMES = {
    "step by the compiler's cycles, ms": lambda arm: f"{1e3 * arm['estimate_seconds']:.1f}",
    "step by the roofline, ms": lambda arm: f"{1e3 * arm['roofline_seconds']:.1f}",
    "MFU by the compiler's cycles": lambda arm: f"{arm['estimate_mfu']:.1%}",
}
CAPTION = (
    "The compiler's estimate of cycles of each instruction, a public clock (10 %), rooflines for kernels; "
    "collectives take no time here. MFU counts the model's FLOPs as inspect does, no rematerialisation."
)
TRAVEL = (
    "Exposed: with no compute at all between start and done. Hidden: compute there, of all others. Needed: "
    "their bytes over that time; hardest: of the one with the least time for its bytes, GB/s. JAX knows no "
    "bandwidth of links: of what needs more than they have, a part is exposed too."
)


def _table(title, arms, rows, caption=None):
    rich = Table("", *arms, title=title, caption=caption)
    for column in rich.columns[1:]:
        column.justify = "right"
    for name, value in rows.items():
        rich.add_row(name, *(value(arm) for arm in arms.values()))
    return rich


def _collectives(arms):
    title = "Collectives of an update, received by a device"
    columns = "runs", "bytes", "exposed", "hidden ms", "needed GB/s", "hardest"
    rich = Table("residual", "kind", *columns, title=title, caption=TRAVEL)
    for column in rich.columns[2:]:
        column.justify = "right"
    for name, arm in arms.items():
        for t in arm["collectives"]:
            share = f"{t['exposed'] / t['bytes']:.0%}" if t["bytes"] else ""
            hidden = f"{1e3 * t['hidden']:.6g}" if t["hidden"] else ""
            needed = (f"{t[rate] / 1e9:.1f}" if t["hidden"] else "" for rate in ("needed", "hardest"))
            rich.add_row(name, t["kind"], f"{t['runs']:g}", _bytes(t["bytes"]), share, hidden, *needed)
        rich.add_section()
    return rich


def _messages(arms):
    columns = "ticks", "bytes", "compute of a tick, ms", "of it hides", "needed GB/s"
    rich = Table("residual", *columns, title="Messages of a pipeline, each by itself")
    for column in rich.columns[1:]:
        column.justify = "right"
    for name, arm in arms.items():
        for m in arm["messages"]:
            hidden, around = m["hidden"], m["around"]
            needed = f"{m['received'] / hidden / 1e9:.1f}" if hidden else ""
            share = f"{hidden / around:.1%}" if around else ""
            rich.add_row(name, f"{m['times']:g}", _bytes(m["received"]), f"{1e3 * around:.4g}", share, needed)
        rich.add_section()
    return rich


def _bytes(number):
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000 or unit == "GB":
            return f"{number:.3g} {unit}" if abs(number) < 1000 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
