"""One dial: `d12` sets the depth in transformer blocks; width, heads, MLP width and rate follow.

Command   python -m attnres_jax train --config=lm:d12,block8 --workdir=runs/d12
          (block8: S = 8 sublayers; or plain, full), with --config.data.corpus=DIR
Hardware  one accelerator, bf16 activations over fp32 parameters
Time      not measured: no accelerator was at hand
Expect    not measured either (austen, 3.6 MB, is too small: bring a corpus made by data prepare)
"""

import re

from attnres_jax.configs import base

HEAD_WIDTH = 64


def get_config(arg: str = "d12,block8") -> base.Config:
    """`dDEPTH,SCHEME` with SCHEME one of plain, full, blockS."""
    dial = re.fullmatch(r"d([1-9]\d{0,3}),(plain|full|block([1-9]\d{0,3}))", arg or "d12,block8")
    if not dial:
        raise base.ConfigError(
            f"lm:{arg!r} is not lm:dDEPTH,SCHEME, as d12,block8 or d12,plain or d12,full are"
        )
    depth, width = int(dial[1]), HEAD_WIDTH * int(dial[1])
    config = base.get_config()
    config.residual = "block" if dial[3] else dial[2]
    config.block_size = int(dial[3] or 1)
    config.model.update(blocks=depth, width=width, heads=depth, kv_heads=depth, dtype="bfloat16")
    config.model.mlp_width = -(-8 * width // 3 // 64) * 64  # SwiGLU of 8 D^2 weights, whole tiles
    config.data.update(length=1024, batch=64)
    config.train.update(steps=5000, log_every=10, depth_every=250, eval_every=500, eval_tokens=0)
    # 1/D through Table 2's first row (D = 896), no higher than what quick was measured with.
    config.optim.update(lr=min(4e-3, 2.99e-3 * 896 / width), warmup=250, decay=1000)
    config.checkpoint.update(every=500, keep=3)
    return config
