"""Configs: what is legal runs, what is not ends in one line that names the key and a way out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax import configs
from attnres_jax.configs import base
from attnres_jax.models.transformer import Transformer
from attnres_jax.train import step

DRAWS = 200
PIPELINE = ("--config.train.accumulation=16", "--config.mesh.stage=2")


def draw_valid(rng):
    """Every key drawn from its own legal values, then the keys of broken rules drawn again."""
    flat = {name: key.legal.draw(rng) for name, key in base.KEYS.items()}
    while broken := [rule for rule in base.RULES if not rule.holds(flat)]:
        flat[broken[0].key] = base.KEYS[broken[0].key].legal.draw(rng)
    return flat


def draw_runnable(rng):
    """As above, but for one CPU: no kernel of attention is for it, and a pipeline needs more than one."""
    flat = draw_valid(rng)
    attention = flat["model.attention"].replace("flash", "auto")
    return flat | {"model.attention": attention, "mesh.stage": 1}


def draw_breaker(rng, rule):
    """Legal values, of which only `rule` says that they cannot be together."""
    while True:
        flat = draw_valid(rng)
        flat[rule.key] = base.KEYS[rule.key].legal.draw(rng)
        if [other for other in base.RULES if not other.holds(flat)] == [rule]:
            return flat


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


def test_table_is_sound():
    rng = np.random.default_rng(0)
    for name, key in base.KEYS.items():
        assert key.legal.accepts(key.default), name
        assert key.doc, name
        drawn = [key.legal.draw(rng) for _ in range(50)]
        assert all(map(key.legal.accepts, drawn)), name
        assert all(key.legal.parse(str(value)) == value for value in drawn), name
        assert not any(key.legal.accepts(key.legal.draw_illegal(rng)) for _ in range(50)), name


@pytest.mark.parametrize("seed", range(DRAWS))
def test_bad_configs_end_in_one_line(seed):
    rng = np.random.default_rng(seed)
    flat, names = draw_valid(rng), list(base.KEYS)
    name = names[rng.integers(len(names))]
    match seed % 4:
        case 0:  # an illegal value in a file
            flat[name] = base.KEYS[name].legal.draw_illegal(rng)
            way_out = f"such as {base.KEYS[name].default!r}"
        case 1:  # a key that does not exist, by one letter too many
            at = rng.integers(len(name))
            flat[name[:at] + "q" + name[at:]] = flat.pop(name)
            way_out = f"did you mean {name!r}"
            name = name[:at] + "q" + name[at:]
        case 2:  # a key forgotten
            del flat[name]
            way_out = f"such as {base.KEYS[name].default!r}"
        case 3:  # legal values that cannot be together
            rule = base.RULES[seed // 4 % len(base.RULES)]
            name, flat = rule.key, draw_breaker(rng, rule)
            way_out = f"such as {rule.legal(flat)!r}"
            assert base.KEYS[name].legal.accepts(rule.legal(flat))
            assert rule.holds(flat | {name: rule.legal(flat)})
    with pytest.raises(configs.ConfigError) as error:
        configs.from_flat(flat)
    message = one_line(error)
    assert name in message
    assert way_out in message
    assert name not in flat or repr(flat[name]) in message or "exist" in message


@pytest.mark.parametrize("seed", range(DRAWS))
def test_bad_overrides_end_in_one_line(seed):
    rng = np.random.default_rng(seed)
    name = list(base.KEYS)[seed % len(base.KEYS)]
    text = str(base.KEYS[name].legal.draw_illegal(rng))
    with pytest.raises(configs.ConfigError) as error:
        configs.load("quick", [f"--config.{name}={text}"])
    message = one_line(error)
    assert message.startswith(f"{name} = ")
    assert f"such as {base.KEYS[name].default!r}" in message


@pytest.mark.parametrize("seed", range(DRAWS))
def test_valid_configs_trace(seed):
    flat = draw_runnable(np.random.default_rng(seed))
    config = configs.from_flat(flat)
    model = configs.model_config(config, vocab=17)
    tokens = jax.ShapeDtypeStruct((config.data.batch, config.data.length), jnp.int32)
    logits = jax.eval_shape(lambda t: Transformer(model, rngs=nnx.Rngs(0))(t).logits, tokens)
    assert logits.shape == (*tokens.shape, 17)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("seed", range(0, DRAWS, 20))
def test_valid_configs_trace_an_update(seed):
    """The optimizer and accumulation too: one update gives a state of the same shapes and dtypes."""
    config = configs.from_flat(draw_runnable(np.random.default_rng(seed)))
    run = step.programs(config, 17 * config.train.vocab_chunks, end=3)
    tokens = jax.ShapeDtypeStruct((config.data.batch, config.data.length + 1), jnp.int32)
    state = jax.eval_shape(run.create)
    after, out = jax.eval_shape(run.update, state, tokens)
    assert after == state
    assert out.depth_norms.shape == (2 * config.model.blocks,)


def test_model_gets_every_key():
    flat = base.to_flat(base.get_config()) | {
        "residual": "block",
        "block_size": 3,
        "key_norm_eps": 0.01,
        "model.blocks": 5,
        "model.width": 48,
        "model.heads": 6,
        "model.kv_heads": 2,
        "model.mlp_width": 33,
        "model.rope_theta": 77.0,
        "model.norm_eps": 0.02,
        "model.tied": False,
        "model.dtype": "bfloat16",
        "model.remat": "dots",
        "model.attention": "xla",
    }
    model = configs.model_config(configs.from_flat(flat), vocab=9)
    for name, value in flat.items():
        if name.startswith("model.") or ("." not in name and name != "seed"):
            assert getattr(model, name.removeprefix("model.")) == value
    assert (model.vocab, model.sublayers) == (9, 10)


def test_json_round_trip():
    for seed in range(20):
        flat = draw_valid(np.random.default_rng(seed))
        again = configs.from_flat(json.loads(json.dumps(configs.to_flat(configs.from_flat(flat)))))
        assert configs.to_flat(again) == flat
        assert list(configs.to_flat(again)) == list(base.KEYS)


def test_whole_numbers_serve_as_real_ones():
    config = configs.from_flat(configs.to_flat(base.get_config()) | {"optim.lr": 1})
    assert isinstance(config.optim.lr, float)


def test_configs_are_locked():
    assert base.get_config().is_locked
    assert configs.from_flat(configs.to_flat(base.get_config())).is_locked
    config = configs.load("quick:block")
    with pytest.raises(AttributeError):
        config.model.depth = 3
    with pytest.raises(TypeError):
        config.train.steps = "many"


def test_overrides_are_read_by_the_keys_type():
    typed = {
        "train.steps": ("20", 20),
        "optim.lr": ("1e-3", 1e-3),
        "model.tied": ("False", False),
        "residual": ("plain", "plain"),
        "data.corpus": ("8", "8"),
    }
    config = configs.load("quick:block", [f"--config.{k}={text}" for k, (text, _) in typed.items()])
    flat = configs.to_flat(config)
    assert {k: flat[k] for k in typed} == {k: value for k, (_, value) in typed.items()}
    untouched = configs.to_flat(configs.load("quick:block"))
    assert {k for k in flat if flat[k] != untouched[k]} == set(typed)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("quik", [], "config 'quik' does not exist; did you mean 'quick'"),
        ("base", [], "config 'base' does not exist"),
        ("", [], "config '' does not exist; did you mean"),
        ("quick:blok", [], "'blok' does not exist; did you mean 'block'"),
        ("lm:d12", [], "'d12' is not .* as d12,block8"),
        ("lm:d0,plain", [], "'d0,plain' is not"),
        ("lm:d12,block", [], "'d12,block' is not"),
        ("lm:d12,block8,x", [], "'d12,block8,x' is not"),
        ("lm:d1,block8", [], "block_size = 8 must be at most .* model.blocks = 1, such as 2"),
        ("nowhere.py", [], "'nowhere.py' does not exist; inside the package: evidence, gpu, lm, quick"),
        ("quick", ["--config.train.step=1"], "'train.step' does not exist; .* 'train.steps'"),
        ("quick", ["--config.steps=1"], "'steps' does not exist; .* 'train.steps'"),
        ("quick", ["--config.model=1"], "'model' does not exist"),
        ("quick", ["--config.train.steps"], "is not --config.KEY=VALUE"),
        ("quick", ["--steps=1"], "is not --config.KEY=VALUE"),
        ("quick", ["--config.model.heads=3"], r"model.heads = 3 .*64.* \(RoPE\), such as 2"),
        ("quick", ["--config.model.heads=64"], r"model.heads = 64 .*such as 32"),
        ("quick", ["--config.model.kv_heads=3"], "model.kv_heads = 3 .*heads = 4, such as 2"),
        ("quick", ["--config.train.accumulation=3"], "accumulation = 3 .*batch = 16, such as 2"),
        ("quick", ["--config.mesh.stage=2"], r"stage = 2 .* train.accumulation = 1: .*groups.*, such as 1"),
        ("quick", [*PIPELINE, "--config.mesh.stage=16"], r"stage = 16 .*model.blocks = 8: .*, such as 8"),
        (
            "quick",
            [*PIPELINE, "--config.train.virtual_stages=5"],
            r"stages = 5 .*blocks / mesh.stage = 8 / 2.*4",
        ),
        ("quick", ["--config.train.stop_after=351"], "stop_after = 351 .*steps = 350, such as 350"),
        ("quick", ["--config.train.steps=9"], "optim.warmup = 10 .*train.steps = 9, such as 9"),
        ("quick", ["--config.optim.schedule=wsd", "--config.optim.decay=341"], "decay = 341 .*, such as 340"),
        ("quick", ["--config.block_size=17"], "block_size = 17 .*model.blocks = 8, such as 16"),
    ],
)
def test_what_is_said_about_names(name, overrides, message):
    with pytest.raises(configs.ConfigError, match=message) as error:
        configs.load(name, overrides)
    one_line(error)


def test_configs_of_the_package():
    assert configs.names() == ("evidence", "gpu", "lm", "quick", "technical")
    schemes = {arg: configs.load(f"quick:{arg}").residual for arg in ("plain", "block", "full")}
    assert schemes == {arg: arg for arg in schemes}
    assert configs.load("quick") == configs.load("quick:block")
    assert configs.load("lm") == configs.load("lm:d12,block8")


def test_block_size_of_another_scheme_does_not_matter():
    configs.load("quick:plain", ["--config.model.blocks=1"])


def test_one_dial():
    """Everything about the size follows from the depth; the scheme changes nothing else."""
    d6, d12 = configs.load("lm:d6,block8"), configs.load("lm:d12,block8")
    assert (d12.model.blocks, d12.model.width, d12.model.heads) == (12, 768, 12)
    assert d12.model.mlp_width == 2048
    for config in (d6, d12):
        assert config.model.width // config.model.heads == 64
        assert 2.6 < config.model.mlp_width / config.model.width < 2.8
    assert d6.optim.lr > d12.optim.lr
    plain, block = (configs.to_flat(configs.load(f"lm:d12,{s}")) for s in ("plain", "block8"))
    differ = {key for key in plain if plain[key] != block[key]}
    assert differ == {"residual", "block_size"}
    assert (block["residual"], block["block_size"]) == ("block", 8)


def test_a_config_file_outside_the_package(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from attnres_jax.configs import quick\n"
        "def get_config(arg=''):\n"
        "    config = quick.get_config('plain')\n"
        "    config.seed = int(arg or 3)\n"
        "    return config\n"
    )
    assert configs.load(str(file)).seed == 3
    assert configs.load(f"{file}:5", ["--config.train.steps=10"]).seed == 5
    file.write_text("")
    with pytest.raises(configs.ConfigError, match=r"has no get_config\(arg\)"):
        configs.load(str(file))
    file.write_text(
        "from attnres_jax.configs import quick\n"
        "def get_config(arg):\n"
        "    config = quick.get_config('plain')\n"
        "    config.optim.lr = -1.0\n"
        "    return config\n"
    )
    with pytest.raises(configs.ConfigError, match=r"optim.lr = -1.0 is not legal"):
        configs.load(str(file))


def test_a_run_older_than_the_keys_of_other_schemes():
    """They may be missing, with their defaults in their place; a key that is read may not."""
    flat = configs.to_flat(configs.load("quick:block"))
    old = {
        key: value
        for key, value in flat.items()
        if key not in ("streams", "sinkhorn", "window", "depth_heads", "key_width", "model.value_residual")
    }
    assert configs.of_run(old) == flat
    del old["block_size"]
    with pytest.raises(configs.ConfigError, match="block_size"):
        configs.from_flat(configs.of_run(old))
