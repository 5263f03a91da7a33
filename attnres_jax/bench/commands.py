"""The sub-commands of `python -m attnres_jax bench`: arguments, and what runs. Imports nothing heavy."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

from attnres_jax import configs
from attnres_jax.bench import target


class Command(NamedTuple):
    """What runs, how its arguments are declared, what help says."""

    run: Callable[[argparse.Namespace], None]
    arguments: Callable[[argparse.ArgumentParser], None]
    purpose: str


def declare(parser: argparse.ArgumentParser) -> None:
    """The sub-commands, as parsers of their own."""
    commands = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name, help=command.purpose, description=command.purpose, allow_abbrev=False
        )
        command.arguments(added)
        added.set_defaults(measured=command.run)


def whole(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1, such as 4")
    return int(text)


def _sizes(parser, **defaults):
    units = {
        "blocks": "transformer blocks, two sublayers each",
        "block-size": "S, sublayers of an AttnRes block",
        "width": "D",
        "heads": "of queries, keys and values (default: 128 channels each)",
        "mlp-width": "F (default: 8/3 of D)",
        "length": "T, tokens of a sequence",
        "batch": "sequences on each device",
    }
    for name, text in units.items():
        default = defaults.get(name.replace("-", "_"))
        shown = f" (default {default})" if default else ""
        parser.add_argument(f"--{name}", type=whole, default=default, metavar="N", help=text + shown)
    parser.add_argument("--out", metavar="FILE", help="JSON to write")


def _traffic_arguments(parser):
    parser.add_argument("--chip", required=True, choices=target.SLICES, help="TPU to compile for")
    _sizes(parser, blocks=16, block_size=4, width=2304, length=4096, batch=8)
    text = "devices that the parameters are cut over, for models that one does not hold (default 1)"
    parser.add_argument("--fsdp", type=whole, default=1, metavar="N", help=text)
    parser.add_argument("--keep", metavar="DIR", help="folder for the compiled programs' text")
    text = "compile the plain arm and the kernels' only: the other is the slowest to compile"
    parser.add_argument("--without-xla", action="store_true", help=text)


def _traffic(args):
    _exit(target.run("traffic", [json.dumps(_plain(args))], target.WHOLE_PRODUCTS))


def _step_arguments(parser):
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help="as train takes it, also --config.KEY=VALUE")
    add("--rounds", type=whole, default=20, metavar="N", help="of all arms, there and back (default 20)")
    residuals = ("plain", "full", "block")
    add("--arms", nargs="+", choices=residuals, default=residuals, help="beside plain (default: both)")
    text = "of the reads over depth (default: chosen by device)"
    add("--implementation", choices=("xla", "tpu", "gpu", "triton"), help=text)
    add("--out", metavar="FILE", help="JSON to write")


def _step(args):
    config = configs.load(args.config, args.overrides)
    from attnres_jax.bench import step

    step.main(config, args.rounds, args.out, args.arms, args.implementation)


def _roofline_arguments(parser):
    add = parser.add_argument
    text = "to compile for (default: each TPU in turn)"
    add("--chip", choices=[*target.SLICES, "h200"], help=text)
    add("--width", type=whole, default=2304, metavar="N", help="D (default 2304)")
    add("--sources", type=whole, default=9, metavar="N", help="R of Phase 1 (default 9)")
    add("--reads", type=whole, default=6, metavar="N", help="S of Phase 1 (default 6)")
    add("--all", action="store_true", help="the full grid of D, R and S instead: hours")
    add("--out", metavar="FILE", help="JSON lines to add to; what it has is not made again")


def _roofline(args):
    from attnres_jax.bench import h200, roofline

    _exit((h200 if args.chip == "h200" else roofline).run(_plain(args)))


def _kernels_arguments(parser):
    add = parser.add_argument
    several = {
        "tokens": ([8192, 32768], "tokens, of each work"),
        "width": ([2048, 7168], "D"),
        "reads": ([6, 12], "S of a block and of Phase 1; the single read is always there"),
    }
    for name, (default, text) in several.items():
        text += f" (default {' '.join(map(str, default))})"
        add(f"--{name}", type=whole, nargs="+", default=default, metavar="N", help=text)
    add("--sources", type=whole, default=8, metavar="N", help="n complete summaries (default 8)")
    for name, (choices, text) in {
        "tasks": (("block", "mix", "merge"), "what is timed"),
        "arms": (
            (
                *("xla", "tpu", "gpu", "triton", "fla-core", "fla-core-gluon"),
                *("fast-attnres", "flash-attn-res", "liger-kernel"),
            ),
            "ours and PyTorch's",
        ),
    }.items():
        add(f"--{name}", nargs="+", choices=choices, default=list(choices), help=f"{text} (default: all)")
    add("--rounds", type=whole, default=20, metavar="N", help="of all arms, there and back (default 20)")
    add("--minutes", type=whole, metavar="N", help="after which no other work is begun (default: none)")
    add("--out", metavar="FILE", help="JSON lines to add to; the table beside it, as FILE with .md")


def _kernels(args):
    from attnres_jax.bench import kernels

    kernels.main(vars(args))


def _plain(args):
    return {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | None)}


def _exit(code):
    if code:
        sys.exit(code)  # the child has said why


COMMANDS = {
    "kernels": Command(
        *(_kernels, _kernels_arguments),
        "Time the depth kernels on the device at hand, beside PyTorch's, each checked first.",
    ),
    "step": Command(
        *(_step, _step_arguments),
        "Time a train step of plain, Full and Block on the devices at hand, in turns.",
    ),
    "roofline": Command(
        *(_roofline, _roofline_arguments),
        "What compilers say of the kernels, with no TPU or GPU: cycles beside DMA, or registers and spills.",
    ),
    "traffic": Command(
        *(_traffic, _traffic_arguments),
        "Bytes and roofline time of a train step compiled for a TPU, with no TPU.",
    ),
}
