"""The command line: `python -m attnres_jax COMMAND`; `--help` names them.

Each command imports what it needs when it runs, so that help and mistakes are answered at once. A
mistake of the user's ends in one line and exit code 2; another exception is a bug, shown whole.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from attnres_jax import configs
from attnres_jax.configs.base import KEYS, Choice
from attnres_jax.configs.sweeps import SWEEPS
from attnres_jax.residuals import SCHEMES

UNFINISHED = 75
"""As sysexits.h has it: try again."""
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
        choices = f": {', '.join(key.legal.options)}" if isinstance(key.legal, Choice) else ""
        unit = f" [{key.unit}]" if key.unit else ""
        line = f"  {name:<20} {key.default!s:<9} {key.doc}{choices}{unit}"
        lines += textwrap.wrap(line, 110, subsequent_indent=" " * 33, drop_whitespace=True)
    return "\n".join(lines)


def _train_arguments(parser):
    parser.add_argument("--config", required=True, metavar="CONFIG", help=CONFIG)
    text = "folder of the run: config, metrics, checkpoints"
    parser.add_argument("--workdir", required=True, type=_path, metavar="DIR", help=text)
    text = f"exit with {UNFINISHED} where the run was stopped before its end: a launcher is to start it again"
    parser.add_argument("--requeue", action="store_true", help=text)
    text = "N seeds, from the config's on, in one program on one device, in DIR/seed-0, DIR/seed-1 ..."
    parser.add_argument("--seeds", type=_count, metavar="N", help=text)


def _train(args):
    config = configs.load(args.config, args.overrides)
    from attnres_jax.parallel import processes
    from attnres_jax.train import compiled, together
    from attnres_jax.train.loop import train

    processes.join()
    if config.train.compile_cache:
        compiled.keep()
    finished = together.train(config, args.seeds, args.workdir) if args.seeds else train(config, args.workdir)
    if not finished and args.requeue:
        sys.exit(UNFINISHED)


def _eval_arguments(parser):
    parser.add_argument("--workdir", required=True, type=_path, metavar="DIR", help="folder of a run")
    parser.add_argument("--step", type=_whole, metavar="N", help="checkpoint (default: newest)")


def _eval(args):
    from attnres_jax.parallel import processes
    from attnres_jax.train import evaluate

    processes.join()
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
    from attnres_jax.parallel import processes
    from attnres_jax.train.restored import restore

    processes.join()
    of, key = restore(args.workdir, args.step), jax.random.key(args.seed)
    logits, tokenizer = partial(of.run.logits, of.params), of.corpus.tokenizer
    over, window = of.run.model.vocab, of.config.data.length
    try:
        text = sample(logits, over, tokenizer, args.prompt, args.length, key, args.temperature, window)
    except CannotSample as error:
        raise UsageError(str(error)) from None
    if processes.first():
        print(text)


def _compare_arguments(parser):
    parser.add_argument("workdirs", nargs="+", type=_path, metavar="DIR", help="folder of a run")
    parser.add_argument("--out", required=True, type=_path, metavar="DIR", help="folder to write")


def _compare(args):
    from attnres_jax.train import runs

    runs.compare(args.workdirs, args.out)


def _sweep_arguments(parser):
    text = "; ".join(f"{name}: {sweep.purpose}" for name, sweep in SWEEPS.items())
    parser.add_argument("name", choices=tuple(SWEEPS), help=text)
    text = "folder of the runs, each in one of its own, and of the table at the end"
    parser.add_argument("--out", required=True, type=_path, metavar="DIR", help=text)
    text = f"what the rows change (default quick): {CONFIG}"
    parser.add_argument("--config", default="quick", metavar="CONFIG", help=text)
    text = "only these of its rows, by commas (default all)"
    parser.add_argument("--rows", type=lambda names: names.split(","), metavar="NAME,...", help=text)
    text = "seeds of each row (default: the sweep's own)"
    parser.add_argument("--seeds", type=_count, default=0, metavar="N", help=text)
    text = "runs at once (default 1); they share the devices, nothing divides them"
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")


def _sweep(args):
    chosen = SWEEPS[args.name].only(args.rows) if args.rows else SWEEPS[args.name]
    from attnres_jax.train import compiled, sweep

    made = sweep.jobs(chosen, args.config, args.overrides, args.seeds, args.out)
    if args.dry_run:
        sweep.show(made)
    else:
        compiled.keep()
        sweep.sweep(chosen, made, args.jobs, args.out)


def _scaling_arguments(parser):
    parser.add_argument("workdirs", nargs="*", type=_path, metavar="DIR", help="folder of a run")
    parser.add_argument("--out", required=True, type=_path, metavar="DIR", help="folder to write")
    parser.add_argument("--table2", action="store_true", help="the paper's Table 2 in place of runs")
    text = "C: 6nd is 6 x active parameters x tokens, exact what inspect counts (default 6nd)"
    parser.add_argument("--compute", choices=("6nd", "exact"), default="6nd", help=text)


def _scaling(args):
    if args.table2 == bool(args.workdirs):
        raise UsageError("scaling takes folders of runs of three sizes or more, or --table2 in their place")
    if args.table2 and args.compute != "6nd":
        raise UsageError("--table2 has parameters and tokens only: its C is --compute=6nd")
    if args.table2:
        from attnres_jax.analysis import scaling

        about = "The paper's own Table 2, refitted (`python -m attnres_jax scaling --table2 --out=DIR`)"
        scaling.report(scaling.table2(), scaling.SIX, args.out, "table2", about)
    else:
        from attnres_jax.train import runs

        runs.fit_scaling(args.workdirs, args.compute == "exact", args.out)


def _inspect_arguments(parser):
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="CONFIG", help=CONFIG)
    which.add_argument("--workdir", type=_path, metavar="DIR", help="folder of a run")
    text = "of the mesh (default: those of this machine); they need not be there"
    parser.add_argument("--devices", type=_whole, metavar="N", help=text)
    text = (
        "draw the timetable of a pipeline of P stages, V virtual stages each, M microbatches, such as 4x2x8"
    )
    parser.add_argument("--pipeline", type=_pipeline, metavar="PxVxM", help=text)
    text = "what the residual stream of every scheme moves, counted, at this config's size"
    parser.add_argument("--schemes", action="store_true", help=text)
    text = "with --pipeline: also as a figure; with --schemes: also as markdown, beside ranks.md of their M"
    parser.add_argument("--out", type=_path, metavar="FILE", help=text)


def _pipeline(text):
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not stages x virtual stages x microbatches, such as 4x2x8"
        )
    return tuple(map(int, numbers))


def _inspect(args):
    if args.pipeline and args.devices:
        raise configs.UserError("--devices does not go with --pipeline, which counts stages")
    if args.schemes and (args.pipeline or args.devices):
        raise configs.UserError("--schemes goes with neither --pipeline nor --devices: it counts one token")
    if args.out and not (args.pipeline or args.schemes):
        raise configs.UserError("--out goes with --pipeline or --schemes: without them there is no file")
    if args.schemes and args.out and args.out.name == "ranks.md":
        raise configs.UserError("--out: ranks.md is the name of the second page of --schemes, name another")
    if args.config:
        config = configs.load(args.config, args.overrides)
    else:
        from attnres_jax.train.workdir import load_config

        config = load_config(args.workdir)
    if args.pipeline:
        _inspect_pipeline(config, args.pipeline, args.out)
    elif args.schemes:
        from attnres_jax.analysis import stream

        stream.report(configs.model_config(config, vocab=1), args.out)
    else:
        _inspect_model(config, args.devices)


def _inspect_model(config, devices):
    import jax

    from attnres_jax.analysis import inspect
    from attnres_jax.train import budget
    from attnres_jax.train.data import open_corpus

    vocab = open_corpus(config.data.corpus).vocab
    budget.report(config, vocab, devices or len(jax.devices()))
    inspect.report(configs.model_config(config, vocab), config.data.length)


def _inspect_pipeline(config, counts, out):
    stages, virtual_stages, microbatches = counts
    from attnres_jax.analysis import pipeline
    from attnres_jax.models.transformer import REMAT
    from attnres_jax.parallel.chunk import Chunked
    from attnres_jax.parallel.timetable import Chunks, Timetable

    model = configs.model_config(config, vocab=1)
    size = model.scheme.schedule(model.sublayers).block_size
    try:
        chunks = Chunks(model.sublayers, size, stages, virtual_stages)
        table = Timetable(stages, virtual_stages, microbatches)
    except ValueError as error:
        raise configs.UserError(str(error)) from None
    pipeline.report(Chunked(model.scheme, model.kinds, chunks, REMAT[model.remat]), table, model.width, out)


def _compile_arguments(parser):
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help=CONFIG)
    text = "slice to compile for, as libtpu names it: v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:2x2x1"
    add("--topology", required=True, metavar="CHIP:SHAPE", help=text)
    text = "slices, joined by a network that only mesh.data crosses (default 1)"
    add("--slices", type=_count, default=1, metavar="N", help=text)
    add("--vocab", type=_whole, metavar="N", help="token values (default: those of data.corpus)")
    text = "residuals to compile beside it, such as plain"
    add("--beside", nargs="+", choices=tuple(SCHEMES), default=[], metavar="NAME", help=text)
    text = "changes to try, each compiled, where it does not fit (default 4)"
    add("--tries", type=_whole, default=4, metavar="N", help=text)
    add("--out", metavar="FILE", help="JSON to write")


def _compile(args):
    config = configs.load(args.config, args.overrides)
    from attnres_jax.bench import target

    words = {key: getattr(args, key) for key in ("topology", "slices", "vocab", "beside", "tries", "out")}
    code = target.run("aot", [json.dumps(words | {"config": configs.to_flat(config)})])
    if code:
        sys.exit(code)  # the child has said why


def _data_arguments(parser):
    add = parser.add_argument
    add("action", choices=("prepare",), help="prepare: make a corpus, or go on where it was stopped")
    add("--text", required=True, type=_path, metavar="DIR", help="folder of text files, UTF-8")
    text = "which of them, may be given again (default **/*.txt)"
    add("--glob", action="append", metavar="PATTERN", help=text)
    add("--out", required=True, type=_path, metavar="DIR", help="folder to make, for data.corpus")
    text = "bytes, or byte pairs by sentencepiece (default bytes)"
    add("--tokenizer", choices=("bytes", "bpe"), default="bytes", help=text)
    add("--vocab", type=_whole, metavar="N", help="token values of bpe (default 8192)")
    text = "fraction of the files, chosen by a hash of their paths (default 0.01)"
    add("--heldout", type=_fraction, default=0.01, metavar="X", help=text)


def _data(args):
    if args.vocab is not None and args.tokenizer == "bytes":
        raise UsageError("--vocab is for --tokenizer=bpe: bytes have 256 values")
    from attnres_jax.train.prepare import Recipe, prepare

    vocab = 256 if args.tokenizer == "bytes" else args.vocab or 8192
    globs = tuple(args.glob or ("**/*.txt",))
    prepare(Recipe(args.text, globs, args.out, args.tokenizer, vocab, args.heldout))


def _bench_arguments(parser):
    from attnres_jax.bench import commands

    commands.declare(parser)


def _bench(args):
    args.measured(args)


def _path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no path: mount it (gcsfuse, NFS) and name the folder there; see launch/README.md"
        )
    return Path(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0, such as 100")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1, such as 2")
    return int(text)


def _temperature(text: str) -> float:
    value = _real(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0, such as 0.8")
    return value


def _fraction(text: str) -> float:
    value = _real(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 0.01")
    return value


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # within no limits


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
    "sweep": Command(
        *(_sweep, _sweep_arguments),
        "Run a named list of runs in processes, or go on with it, and compare them.",
        "table4 --config=quick --out=runs/table4 --config.train.steps=100",
    ),
    "scaling": Command(
        *(_scaling, _scaling_arguments),
        "Fit loss against compute over finished runs of several sizes: exponents, compute advantage.",
        "runs/scaling/* --out=runs/scaling-fit",
    ),
    "inspect": Command(
        *(_inspect, _inspect_arguments),
        "Parameters, where they lie on a mesh, FLOPs and bytes per token, and what AttnRes adds.",
        "--config=lm:d12,block8 --devices=8 --config.mesh.tensor=4",
    ),
    "compile": Command(
        *(_compile, _compile_arguments),
        "Compile the train step for a TPU slice, with no TPU: does it fit, what does it move and take.",
        "--config=lm:d12,block8 --topology=v5e:4x4 --config.mesh.fsdp=4",
    ),
    "data": Command(
        *(_data, _data_arguments),
        "Turn a folder of text into tokens that a model can be trained on.",
        "prepare --text=texts --glob='**/*.md' --out=corpora/mine --tokenizer=bpe",
    ),
    "bench": Command(
        *(_bench, _bench_arguments),
        "Measure: bytes and times of a train step, of the kernels.",
        "traffic --chip=v5p --blocks=16 --block-size=4 --width=2304",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
