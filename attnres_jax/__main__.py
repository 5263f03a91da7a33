"""The command line: `python -m attnres_jax train|eval|sample|compare|inspect`.

Each command imports what it needs when it runs, so that help and mistakes are answered at once. A
mistake of the user's ends in one line and exit code 2; another exception is a bug, shown whole.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from attnres_jax import configs
from attnres_jax.configs.base import KEYS, Choice

CONFIG = "NAME[:ARG] in the package (quick:block, lm:d12,block8), or FILE.py[:ARG]"


class UsageError(configs.UserError):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 after a mistake of the user's."""
    try:
        args = _parse(argv)
        args.run(args)
    except configs.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    strange = [word for word in unknown if not word.startswith(configs.PREFIX)]
    if strange or (unknown and not getattr(args, "config", None)):
        args.parser.error(f"{(strange or unknown)[0]!r} is not understood by {args.command}")
    args.overrides = unknown
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m attnres_jax", description="Attention Residuals in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.purpose,
            description=command.purpose,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=command.run, parser=added)
        command.arguments(added)
        keys = _keys() if "--config" in command.example else ""
        added.epilog = f"example: python -m attnres_jax {name} {command.example}{keys}"
    return parser


def _keys() -> str:
    """The config keys, one a line: name, default, meaning, names it may have, unit."""
    lines = [f"\n\n{configs.PREFIX}KEY=VALUE changes a key (beside it the default of base.py):"]
    for name, key in KEYS.items():
        choices = f", {key.legal}" if isinstance(key.legal, Choice) else ""
        unit = f" [{key.unit}]" if key.unit else ""
        lines.append(f"  {name:<20} {key.default!s:<9} {key.doc}{choices}{unit}")
    return "\n".join(lines)


def _train_arguments(parser):
    parser.add_argument("--config", required=True, metavar="CONFIG", help=CONFIG)
    text = "folder of the run: config, metrics, checkpoints"
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help=text)


def _train(args):
    config = configs.load(args.config, args.overrides)
    from attnres_jax.parallel import processes
    from attnres_jax.train import compiled
    from attnres_jax.train.loop import train

    processes.join()
    if config.train.compile_cache:
        compiled.keep()
    train(config, args.workdir)


def _eval_arguments(parser):
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="folder of a run")
    parser.add_argument("--step", type=_whole, metavar="N", help="checkpoint (default: newest)")


def _eval(args):
    from attnres_jax.train import evaluate

    evaluate.main(args.workdir, args.step)


def _sample_arguments(parser):
    _eval_arguments(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to continue")
    add("--length", type=_whole, default=200, metavar="N", help="tokens to add (default 200)")
    add("--seed", type=_whole, default=0, metavar="N", help="of the draws (default 0)")
    text = "0 takes the likeliest token, 1 draws as the model says (default 0.8)"
    add("--temperature", type=_temperature, default=0.8, metavar="X", help=text)


def _sample(args):
    import jax

    from attnres_jax.models.sample import CannotSample, sample
    from attnres_jax.train.checkpoint import load_run

    run, key = load_run(args.workdir, args.step), jax.random.key(args.seed)
    try:
        print(sample(run.model, args.prompt, args.length, key, args.temperature, run.config.data.length))
    except CannotSample as error:
        raise UsageError(str(error)) from None


def _compare_arguments(parser):
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="DIR", help="folder of a run")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")


def _compare(args):
    from attnres_jax.train import runs

    runs.compare(args.workdirs, args.out)


def _inspect_arguments(parser):
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="CONFIG", help=CONFIG)
    which.add_argument("--workdir", type=Path, metavar="DIR", help="folder of a run")


def _inspect(args):
    if args.config:
        config = configs.load(args.config, args.overrides)
    else:
        from attnres_jax.train.checkpoint import load_run

        config = load_run(args.workdir).config
    from attnres_jax.analysis import inspect
    from attnres_jax.train.data import open_corpus

    vocab = open_corpus(config.data.corpus).vocab
    inspect.report(configs.model_config(config, vocab), config.data.length)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0, such as 100")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0, such as 0.8")
    return value


class Command(NamedTuple):
    """What runs, how its arguments are declared, and what help says."""

    run: Callable[[argparse.Namespace], None]
    arguments: Callable[[argparse.ArgumentParser], None]
    purpose: str
    example: str


COMMANDS = {
    "train": Command(
        *(_train, _train_arguments, "Train a model, or continue where the run in DIR stopped."),
        "--config=quick:block --workdir=runs/block --config.train.steps=100",
    ),
    "eval": Command(
        *(_eval, _eval_arguments),
        "Bits per byte and perplexity of a run on held-out text, also by position.",
        "--workdir=runs/block",
    ),
    "sample": Command(
        *(_sample, _sample_arguments, "Continue a text with the model of a run."),
        "--workdir=runs/block --prompt='It is a truth'",
    ),
    "compare": Command(
        *(_compare, _compare_arguments),
        "Compare finished runs: a table, loss curves, figures over depth.",
        "runs/plain runs/block --out=runs/comparison",
    ),
    "inspect": Command(
        *(_inspect, _inspect_arguments),
        "Parameters, FLOPs and bytes per token, and what AttnRes adds.",
        "--config=lm:d12,block8",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
