"""Minutes on two CPU cores: a byte model of 0.44 M parameters on Jane Austen, L = 16 sublayers.

Command   python -m attnres_jax train --config=quick:block --workdir=runs/block   (or plain, full)
Hardware  2 CPU cores, fp32
Time      1.3 minutes (plain), 2.1 minutes (block), on a shared AMD EPYC, JAX 0.12.0.1, 2026-11-25
Expect    bits/byte on the first 64 kB of Persuasion, seed 0: plain 2.611, block 2.490, full 2.480
"""

from attnres_jax.configs import base


def get_config(arg: str = "block") -> base.Config:
    """The residual scheme `arg`; block means S = 4."""
    config = base.get_config()
    config.residual = base.choose("residual scheme", arg or "block", base.KEYS["residual"].legal.options)
    config.block_size = 4
    config.model.update(blocks=8, width=64, heads=4, kv_heads=4, mlp_width=192, dtype="float32")
    config.data.update(corpus="austen", length=128, batch=16)
    config.train.update(steps=350, log_every=10, depth_every=50, eval_every=350, eval_tokens=65536)
    config.optim.update(lr=4e-3, warmup=10)
    config.checkpoint.update(every=350, keep=1)
    return config
