"""Every config key with its unit, legal values and meaning, and what must hold between keys.

Nothing in the project reads a key with a default of its own: what is not in KEYS does not exist.
Other configs start from `get_config()` and change values; `check` says in one line what is wrong.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from attnres_jax.residuals import DEFAULT, SCHEMES

if TYPE_CHECKING:
    Config = Any  # to a type checker a key of a ConfigDict may be anything a ConfigDict may hold
else:
    Config = ConfigDict

FEW = 8  # names that a one-line message spells
INT_MAX = 2**31 - 1  # what counts in JAX: int32


class UserError(ValueError):
    """A mistake the user can put right: the command line prints its one line, no traceback."""


class ConfigError(UserError):
    """A config that cannot be run; names the key, its value and a legal one."""


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`; a draw stays within `span` steps of `low`."""

    low: int
    high: int = INT_MAX
    even: bool = False
    span: int = 15

    def __str__(self) -> str:
        kind = "an even whole number" if self.even else "a whole number"
        return f"{kind} from {self.low} to {self.high}"

    def parse(self, text: str) -> int:
        """The number written as `text`."""
        return int(text)

    def accepts(self, value: Any) -> bool:
        """Whether `value` is legal; a bool is not a number here."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and not (self.even and value % 2)

    def draw(self, rng: np.random.Generator) -> int:
        """A small legal value."""
        return self.low + int(rng.integers(self.span + 1)) * (2 if self.even else 1)

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """A value, or a text in its place, that is not legal."""
        bad = [self.low - 1, self.high + 1, self.low + 0.5, "many", "", True, None, [self.low]]
        bad += [self.low + 1] if self.even else []
        return bad[rng.integers(len(bad))]


@dataclass(frozen=True)
class Share:
    """The size of a mesh axis: a whole number from 1, or -1 for the devices that the others leave."""

    def __str__(self) -> str:
        return "a whole number from 1, or -1 for what the other mesh axes leave"

    def parse(self, text: str) -> int:
        """The number written as `text`."""
        return int(text)

    def accepts(self, value: Any) -> bool:
        """Whether `value` is a size or -1."""
        return isinstance(value, int) and (value == -1 or Whole(1).accepts(value))

    def draw(self, rng: np.random.Generator) -> int:
        """One of two that fit any number of devices, together with others of that kind."""
        return int(rng.choice([-1, 1]))

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """A value, or a text in its place, that is no size."""
        bad = [0, -2, 1.5, -1.0, "all", "", True, None, [1]]
        return bad[rng.integers(len(bad))]


@dataclass(frozen=True)
class Real:
    """Finite numbers from `low` to `high`, either end left out where `above` or `below` says so."""

    low: int | float = 0
    high: int | float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        start = f"{'above' if self.above else 'from'} {self.low:g}"
        end = f"{'below' if self.below else 'to'} {self.high:g}" if self.high < math.inf else ""
        return f"a finite number {start} {end}".rstrip()

    def parse(self, text: str) -> float:
        """The number written as `text`."""
        return float(text)

    def accepts(self, value: Any) -> bool:
        """Whether `value` is legal; whole numbers are welcome, bools are not."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high and math.isfinite(value)

    def draw(self, rng: np.random.Generator) -> float:
        """A legal value: anywhere in a bounded range, else at most 10 above its low end."""
        return self.low + (1 - rng.random()) * 0.999 * min(self.high - self.low, 10.0)

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """A value, or a text in its place, that is not legal."""
        bad = [self.low - 1, math.nan, math.inf, -math.inf, "fast", "", False, None, [1.0]]
        bad += [self.low] if self.above else []
        bad += [self.high] if self.below else [self.high + 1]
        return bad[rng.integers(len(bad))]


@dataclass(frozen=True)
class Choice:
    """One of a few names."""

    options: tuple[str, ...]

    def __str__(self) -> str:
        some, more = self.options[:FEW], len(self.options) - FEW
        return f"one of {', '.join(map(repr, some))}{f' and {more} more (--help)' if more > 0 else ''}"

    def parse(self, text: str) -> str:
        """The name itself."""
        return text

    def accepts(self, value: Any) -> bool:
        """Whether `value` is one of the names."""
        return isinstance(value, str) and value in self.options

    def draw(self, rng: np.random.Generator) -> str:
        """One of the names."""
        return self.options[rng.integers(len(self.options))]

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """Something near a name, or no name at all."""
        name = self.draw(rng)
        bad = [name + "s", name[:-1], name.upper(), "", 1, None, True, [name]]
        return bad[rng.integers(len(bad))]


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def __str__(self) -> str:
        return "true or false"

    def parse(self, text: str) -> bool:
        """`true` or `false`, in any case."""
        if text.lower() not in ("true", "false"):
            raise ValueError(f"neither true nor false: {text!r}")
        return text.lower() == "true"

    def accepts(self, value: Any) -> bool:
        """Whether `value` is a bool: 0 and 1 are not."""
        return isinstance(value, bool)

    def draw(self, rng: np.random.Generator) -> bool:
        """Either."""
        return bool(rng.integers(2))

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """A number or a text."""
        bad = ["yes", "", 0, 1, 0.5, None]
        return bad[rng.integers(len(bad))]


@dataclass(frozen=True)
class Text:
    """Any text that is not empty; `example` is one that works on every machine."""

    example: str

    def __str__(self) -> str:
        return "a text that is not empty"

    def parse(self, text: str) -> str:
        """The text itself."""
        return text

    def accepts(self, value: Any) -> bool:
        """Whether `value` is a text and not blank."""
        return isinstance(value, str) and bool(value.strip())

    def draw(self, rng: np.random.Generator) -> str:
        """The example."""
        return self.example

    def draw_illegal(self, rng: np.random.Generator) -> Any:
        """A blank text."""
        return " " * int(rng.integers(3))


class Key(NamedTuple):
    """What KEYS knows of one config key."""

    default: Any
    legal: Whole | Share | Real | Choice | Flag | Text
    unit: str
    doc: str


KEYS: dict[str, Key] = {
    "seed": Key(0, Whole(0), "", "of parameters and data order"),
    "residual": Key(DEFAULT, Choice(tuple(SCHEMES)), "", "how depth is mixed"),
    "block_size": Key(4, Whole(1, span=5), "sublayers", "S of Block AttnRes; the others ignore it"),
    "key_norm_eps": Key(1e-6, Real(0, 0.1, above=True), "", "of AttnRes's key RMSNorm"),
    "depth_heads": Key(16, Whole(1, span=5), "heads", "channel groups of block_heads; the others ignore it"),
    "key_width": Key(16, Whole(1, span=5), "channels", "of the keys of block_sliced; the others ignore it"),
    "streams": Key(4, Whole(1, 6, span=5), "streams", "m of hyper-connections and DDL; the others ignore it"),
    "sinkhorn": Key(20, Whole(1, span=5), "iterations", "of mHC; the others ignore it"),
    "window": Key(8, Whole(1, span=5), "outputs", "that a sliding window reads; the others ignore it"),
    "model.blocks": Key(8, Whole(1, span=3), "transformer blocks", "two sublayers each"),
    "model.width": Key(64, Whole(2, even=True), "channels", "D"),
    "model.heads": Key(4, Whole(1, span=7), "heads", "of the queries; the head width must be even"),
    "model.kv_heads": Key(4, Whole(1, span=7), "heads", "of keys and values; they divide the heads"),
    "model.mlp_width": Key(192, Whole(1), "channels", "F, inside SwiGLU"),
    "model.rope_theta": Key(1e4, Real(1), "", "base of the rotary embedding's wavelengths"),
    "model.norm_eps": Key(1e-6, Real(0, 0.1, above=True), "", "of every other RMSNorm"),
    "model.tied": Key(True, Flag(), "", "whether the head is the embedding"),
    "model.dtype": Key("float32", Choice(("float32", "bfloat16")), "", "of the activations"),
    "model.remat": Key(
        "nothing",
        Choice(("nothing", "dots", "everything")),
        "",
        "what a sublayer keeps for backward",
    ),
    "model.attention": Key(
        "auto",
        Choice(("auto", "xla", "flash")),
        "",
        "flash: a kernel that stores no scores",
    ),
    "model.value_residual": Key(
        0.0, Real(0, 1, below=True), "share", "of the first attention's values in all others; 0.5: ResFormer"
    ),
    "mesh.stage": Key(1, Whole(1, span=3), "stages", "of a pipeline, each with some of the layers; 1: none"),
    "mesh.data": Key(-1, Share(), "devices", "that divide the batch"),
    "mesh.fsdp": Key(1, Share(), "devices", "that divide the batch, and every matrix"),
    "mesh.tensor": Key(1, Share(), "devices", "that divide heads, MLP channels, vocabulary and time"),
    "data.corpus": Key("austen", Text("austen"), "", "austen, or a folder made by data prepare"),
    "data.length": Key(128, Whole(1), "tokens", "T, predictions per sequence"),
    "data.batch": Key(16, Whole(1), "sequences", "per update"),
    "data.segments": Key(
        False, Flag(), "", "documents do not see each other; the corpus must have an end token"
    ),
    "train.steps": Key(350, Whole(1), "updates", "of the run and its schedule"),
    "train.stop_after": Key(0, Whole(0), "updates", "stop early, same schedule; 0 runs all steps"),
    "train.accumulation": Key(1, Whole(1, span=3), "microbatches", "computed in turn, one update"),
    "train.virtual_stages": Key(
        1,
        Whole(1, span=3),
        "chunks",
        "of layers on each stage of a pipeline; more: less idle time, more sent",
    ),
    "train.vocab_chunks": Key(
        1, Whole(1, span=3), "chunks", "of the vocabulary, so that logits are never whole; must divide it"
    ),
    "train.log_every": Key(10, Whole(1), "updates", "between rows of the training loss"),
    "train.depth_every": Key(50, Whole(1), "updates", "between rows of statistics over depth"),
    "train.eval_every": Key(350, Whole(1), "updates", "between evaluations on held-out text"),
    "train.eval_tokens": Key(65536, Whole(0), "tokens", "held out, per evaluation; 0 takes all"),
    "train.compile_cache": Key(True, Flag(), "", "whether the next start finds programs compiled"),
    "optim.name": Key(
        "adamw", Choice(("adamw", "muon")), "", "muon: sublayers' matrices in Muon, the rest in AdamW"
    ),
    "optim.lr": Key(4e-3, Real(0, above=True), "", "peak learning rate, of Muon and AdamW alike"),
    "optim.schedule": Key("cosine", Choice(("cosine", "wsd")), "", "wsd: warm-up, stable, linear decay"),
    "optim.warmup": Key(10, Whole(0), "updates", "linear rise from 0 to the peak"),
    "optim.decay": Key(70, Whole(0), "updates", "of the linear fall at the end of wsd; cosine ignores it"),
    "optim.final_lr": Key(0.1, Real(0, 1), "fraction of lr", "where the schedule ends"),
    "optim.momentum": Key(0.95, Real(0, 1, below=True), "", "Nesterov's, of Muon; adamw ignores it"),
    "optim.b1": Key(0.9, Real(0, 1, below=True), "", "decay of AdamW's first moment"),
    "optim.b2": Key(0.95, Real(0, 1, below=True), "", "decay of AdamW's second moment"),
    "optim.eps": Key(1e-8, Real(0, above=True), "", "added to the root of the second moment"),
    "optim.weight_decay": Key(0.1, Real(0), "", "decoupled, on matrices only"),
    "optim.clip": Key(1.0, Real(0, above=True), "", "largest global norm of the gradient"),
    "optim.z_loss": Key(0.0, Real(0), "", "times the mean of (log Z)^2, added to what is minimised"),
    "checkpoint.every": Key(350, Whole(1), "updates", "between checkpoints"),
    "checkpoint.keep": Key(2, Whole(1), "checkpoints", "kept, the newest ones"),
    "checkpoint.keep_every": Key(0, Whole(0), "updates", "between checkpoints kept for good; 0: none"),
    "profile.first": Key(0, Whole(0), "updates", "first in the profiler's trace; 0 traces nothing"),
    "profile.last": Key(0, Whole(0), "updates", "last in the profiler's trace"),
}

SCHEME_KEYS = {"residual": "", "block_size": "block_size", "key_norm_eps": "eps", "streams": "streams"}
SCHEME_KEYS |= {"depth_heads": "heads", "key_width": "key_width", "sinkhorn": "sinkhorn", "window": "window"}
"""Keys of the residual scheme, each with the option of `residuals.make` that it sets."""
LATER = ("model.value_residual", "mesh.stage", "train.virtual_stages")
"""Keys that runs did without, as with the default."""


class Rule(NamedTuple):
    """What must hold between keys; where it does not, `key` must be `need` and `legal` would do."""

    key: str
    holds: Callable[[Mapping[str, Any]], bool]
    need: Callable[[Mapping[str, Any]], str]
    legal: Callable[[Mapping[str, Any]], Any]


def _at_most_steps(key: str) -> Rule:
    return Rule(
        key,
        holds=lambda c: c[key] <= c["train.steps"],
        need=lambda c: f"at most train.steps = {c['train.steps']}",
        legal=lambda c: c["train.steps"],
    )


def _divides(key: str, of: str, why: str = "", factor: int = 1) -> Rule:
    def holds(c, n=None):
        return c[of] % (factor * (n or c[key])) == 0

    return Rule(
        key,
        holds=holds,
        need=lambda c: f"a divisor of {of} = {c[of]}{why}",
        # At most 1024, or the search for an example could take minutes.
        legal=lambda c: next(n for n in range(min(c[key], c[of], 1024), 0, -1) if holds(c, n)),
    )


def _after_warmup(c: Mapping[str, Any]) -> int:
    return c["train.steps"] - c["optim.warmup"]


def _one_rest(key: str, *others: str) -> Rule:
    return Rule(
        key,
        holds=lambda c: c[key] != -1 or all(c[other] != -1 for other in others),
        need=lambda c: "a number: only one mesh axis may be -1, for what the others leave",
        legal=lambda c: 1,
    )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _chunks(c: Mapping[str, Any]) -> int:
    return max(c["model.blocks"] // c["mesh.stage"], 1)  # more stages than blocks is another rule's


def _reads(c: Mapping[str, Any], option: str) -> bool:
    return option in SCHEMES[c["residual"]].reads


RULES: tuple[Rule, ...] = (
    Rule(
        "block_size",
        holds=lambda c: not _reads(c, "block_size") or c["block_size"] <= 2 * c["model.blocks"],
        need=lambda c: f"at most the sublayers, two for each of model.blocks = {c['model.blocks']}",
        legal=lambda c: 2 * c["model.blocks"],
    ),
    Rule(
        "depth_heads",
        holds=lambda c: not _reads(c, "heads") or c["model.width"] % c["depth_heads"] == 0,
        need=lambda c: f"a divisor of model.width = {c['model.width']}",
        legal=lambda c: math.gcd(c["depth_heads"], c["model.width"]),
    ),
    Rule(
        "key_width",
        holds=lambda c: not _reads(c, "key_width") or c["key_width"] <= c["model.width"],
        need=lambda c: f"at most model.width = {c['model.width']}",
        legal=lambda c: c["model.width"],
    ),
    _divides("model.heads", "model.width", " that leaves heads of even width (RoPE)", factor=2),
    _divides("model.kv_heads", "model.heads"),
    _divides("train.accumulation", "data.batch"),
    Rule(
        "mesh.stage",
        holds=lambda c: c["mesh.stage"] == 1 or c["train.accumulation"] % c["mesh.stage"] == 0,
        need=lambda c: (
            f"a divisor of train.accumulation = {c['train.accumulation']}: microbatches go through "
            "a pipeline in groups of its stages"
        ),
        legal=lambda c: math.gcd(c["mesh.stage"], c["train.accumulation"]),
    ),
    Rule(
        "mesh.stage",
        holds=lambda c: c["mesh.stage"] <= c["model.blocks"],
        need=lambda c: f"at most model.blocks = {c['model.blocks']}: each stage runs one or more",
        legal=lambda c: max(n for n in _divisors(c["train.accumulation"]) if n <= c["model.blocks"]),
    ),
    Rule(
        "train.virtual_stages",
        holds=lambda c: c["mesh.stage"] == 1 or c["train.virtual_stages"] <= _chunks(c),
        need=lambda c: f"at most model.blocks / mesh.stage = {c['model.blocks']} / {c['mesh.stage']}",
        legal=_chunks,
    ),
    _one_rest("mesh.fsdp", "mesh.data"),
    _one_rest("mesh.tensor", "mesh.data", "mesh.fsdp"),
    _at_most_steps("train.stop_after"),
    _at_most_steps("optim.warmup"),
    Rule(
        "profile.last",
        holds=lambda c: c["profile.last"] >= c["profile.first"],
        need=lambda c: f"at least profile.first = {c['profile.first']}",
        legal=lambda c: c["profile.first"],
    ),
    Rule(
        "optim.decay",
        holds=lambda c: c["optim.schedule"] != "wsd" or c["optim.decay"] <= _after_warmup(c),
        need=lambda c: f"at most train.steps - optim.warmup = {_after_warmup(c)}",
        legal=_after_warmup,
    ),
)


def get_config() -> Config:
    """The defaults of KEYS, locked."""
    return _nested({name: key.default for name, key in KEYS.items()})


def check(config: Config) -> None:
    """Raise ConfigError unless every key is there, legal, and agrees with the others."""
    _check_flat(to_flat(config))


def to_flat(config: Config) -> dict[str, Any]:
    """Dotted names -> values, in KEYS' order, ready for JSON."""
    flat = dict(_walk(config))
    return {name: flat.pop(name) for name in KEYS if name in flat} | flat


def from_flat(flat: Mapping[str, Any]) -> Config:
    """The locked, checked config that `to_flat` came from."""
    _check_flat(flat)
    return _nested(flat)


def of_run(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A run's flat config, whole: it may be older than the keys of LATER, and than the keys of other residual
    schemes than its own."""
    residual = flat.get("residual")
    read = SCHEMES[residual].reads if residual in SCHEMES else SCHEME_KEYS.values()
    idle = {key: KEYS[key].default for key, option in SCHEME_KEYS.items() if option and option not in read}
    idle |= {key: KEYS[key].default for key in LATER}
    return idle | dict(flat)


def choose(what: str, name: str, legal: Iterable[str]) -> str:
    """`name` if it is legal, else a ConfigError naming the nearest legal one."""
    legal = list(legal)
    if name not in legal:
        leaves = [other for other in legal if other.endswith(f".{name}")]
        near = (leaves or difflib.get_close_matches(name, legal, n=1, cutoff=0.0))[0]
        raise ConfigError(f"{what} {name!r} does not exist; did you mean {near!r}?")
    return name


def set_text(config: Config, name: str, text: str) -> None:
    """Set one key from what was typed (`1e-3`, `true`, `block`); `check` judges the value."""
    legal = KEYS[choose("config key", name, KEYS)].legal
    try:
        value = legal.parse(text)
    except ValueError:
        raise _illegal(name, text) from None
    config.update_from_flattened_dict({name: value})


def _illegal(name: str, value: Any) -> ConfigError:
    key = KEYS[name]
    return ConfigError(f"{name} = {value!r} is not legal: {key.legal}, such as {key.default!r}")


def _check_flat(flat: Mapping[str, Any]) -> None:
    for name, value in flat.items():
        if not KEYS[choose("config key", name, KEYS)].legal.accepts(value):
            raise _illegal(name, value)
    for name, key in KEYS.items():
        if name not in flat:
            raise ConfigError(f"{name} is missing: {key.legal}, such as {key.default!r}")
    for rule in RULES:
        if not rule.holds(flat):
            value, legal = flat[rule.key], rule.legal(flat)
            raise ConfigError(f"{rule.key} = {value!r} must be {rule.need(flat)}, such as {legal!r}")


def _nested(flat: Mapping[str, Any]) -> Config:
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *section, leaf = name.split(".")
        place = tree.setdefault(section[0], {}) if section else tree
        place[leaf] = type(key.default)(flat[name])  # a real number may have been written as 1
    return ConfigDict(tree).lock()


def _walk(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
