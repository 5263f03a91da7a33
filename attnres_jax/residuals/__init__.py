"""Residual schemes by name. Their files, and JAX, are imported when one is made: configs need the names."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from attnres_jax.residuals.additive import Plain
    from attnres_jax.residuals.attention import AttnRes
    from attnres_jax.residuals.base import Mix, Read, Scheme


class Entry(NamedTuple):
    """Which class a name stands for, the options of `make` it reads, and what the name says beside."""

    module: str
    scheme: str
    reads: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = MappingProxyType({})


SCHEMES = {
    "plain": Entry("additive", "Plain"),
    "full": Entry("attention", "AttnRes", ("eps",)),
    "block": Entry("attention", "AttnRes", ("block_size", "eps")),
    "rezero": Entry("scaled", "ReZero"),
    "layerscale": Entry("scaled", "LayerScale"),
    "highway": Entry("highway", "Highway"),
    "deepnorm": Entry("postnorm", "DeepNorm", ("sublayers", "norm_eps")),
    "keel": Entry("postnorm", "Keel", ("sublayers", "norm_eps")),
    "siamese": Entry("postnorm", "SiameseNorm", ("norm_eps",)),
    "hc": Entry("hyper", "HC", ("streams", "norm_eps")),
    "hc_static": Entry("hyper", "HC", ("streams",), {"dynamic": False}),
    "mhc": Entry("manifold", "MHC", ("streams", "sinkhorn", "norm_eps")),
    "mhc_lite": Entry("manifold", "MHCLite", ("streams", "norm_eps")),
    "ddl": Entry("delta", "DDL", ("streams", "norm_eps")),
    "densenet": Entry("dense", "DenseNet"),
    "denseformer": Entry("dense", "DenseFormer"),
    "mrla": Entry("mrla", "MRLA", ("norm_eps",)),
    "window": Entry("dense", "SlidingWindow", ("window", "eps")),
    "full_sigmoid": Entry("attention", "AttnRes", ("eps",), {"activation": "sigmoid"}),
    "full_unnormed": Entry("attention", "AttnRes", (), {"key_norm": False}),
    "full_static": Entry("ablations", "Biased", ("eps",), {"queries": False}),
    "full_recency": Entry("ablations", "Biased", ("eps",), {"recency": 1.0}),
    "full_input_query": Entry("dense", "InputQuery", ("eps",)),
    "block_unnormed": Entry("attention", "AttnRes", ("block_size",), {"key_norm": False}),
    "block_heads": Entry("attention", "AttnRes", ("block_size", "eps", "heads")),
    "block_sliced": Entry("attention", "AttnRes", ("block_size", "eps", "key_width")),
    "block_additive": Entry("ablations", "Additive", ("block_size", "eps")),
    "rms_block": Entry("followups", "RMSBlock", ("block_size", "eps")),
    "delta": Entry("followups", "Delta", ("eps",)),
    "delta_block": Entry("followups", "Delta", ("block_size", "eps")),
}
DEFAULT = "block"
OPTIONS = tuple(sorted({option for entry in SCHEMES.values() for option in entry.reads}))


def make(name: str, **options: Any) -> "Scheme":
    """The scheme called `name`, with those of `options` that it reads:

    `block_size` S counts sublayers, `eps` is the key norm's, `heads` H are groups of channels that weigh
    sources apart, keys are the last `key_width` channels, `norm_eps` is that of the scheme's other norms,
    `sinkhorn` counts the iterations of mHC, `streams` is m, `sublayers` the model's L, `window` W.
    """
    if name not in SCHEMES:
        raise ValueError(f"residual must be one of {', '.join(map(repr, SCHEMES))}, got {name!r}")
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(f"{', '.join(sorted(unknown))} is no option of a scheme: {', '.join(OPTIONS)} are")
    entry = SCHEMES[name]
    read = {option: options[option] for option in entry.reads if option in options}
    return getattr(import_module(f"{__name__}.{entry.module}"), entry.scheme)(**read, **entry.fixed)


_EXPORTS = {"AttnRes": "attention", "Mix": "base", "Plain": "additive", "Read": "base", "Scheme": "base"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


__all__ = ["DEFAULT", "OPTIONS", "SCHEMES", "AttnRes", "Mix", "Plain", "Read", "Scheme", "make"]
