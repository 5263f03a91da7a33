r"""Twelve transformer blocks of width 48 on Jane Austen, for many runs on two cores: docs/results/evidence.

Command   make evidence, or one run: python -m attnres_jax train --config=evidence:block --workdir=runs/block
Hardware  2 CPU cores, fp32
Time      a run 1 to 4 minutes; make evidence (36 runs, two at a time, and pages) 46 minutes beside tests
          (60 of CPU), shared AMD EPYC, JAX 0.12.0.1, 2026-11-27
Expect    bits/byte on the first 128 kB of Persuasion, seed 0: plain 2.627, block 2.517, full 2.544, mhc 2.554
          Another machine of the kind rounds otherwise: 0.001 in the median of 36 runs, at most 0.014, but for
          the window, which trains badly here: 0.056
"""

from attnres_jax.configs import base


def get_config(arg: str = "block") -> base.Config:
    """The residual scheme `arg`; block means S = 4: six AttnRes blocks of 24 sublayers."""
    config = base.get_config()
    config.residual = base.choose("residual scheme", arg or "block", base.KEYS["residual"].legal.options)
    config.block_size = 4
    config.model.update(blocks=12, width=48, heads=4, kv_heads=4, mlp_width=144, dtype="float32")
    config.data.update(corpus="austen", length=128, batch=8)
    config.train.update(steps=400, log_every=10, depth_every=50, eval_every=200, eval_tokens=131072)
    config.optim.update(lr=8e-3, warmup=40)
    config.checkpoint.update(every=200, keep=1)
    return config
