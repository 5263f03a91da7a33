"""One dial: `d12` sets the depth in transformer blocks; width, heads, MLP width and rate follow. Or a size.

Command   python -m attnres_jax train --config=lm:d12,block8 --workdir=runs/d12
          (block8: S = 8 sublayers; or plain, full), with --config.data.corpus=DIR; 7b,block8 and
          70b,block16 are dense models of these sizes, for slices (mesh.fsdp)
Hardware  one accelerator, bf16 activations over fp32 parameters
Time      not measured: no accelerator was at hand
Expect    not measured either (austen, 3.6 MB, is too small: bring a corpus made by data prepare)
"""

import re

from attnres_jax.configs import base

HEAD_WIDTH = 64
SIZES = {
    "7b": {"blocks": 32, "width": 4096, "heads": 32, "kv_heads": 32, "mlp_width": 11008},
    "70b": {"blocks": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672},
}
"""6.7 and 69.0 G parameters with a vocabulary of 32,768; the head is not the embedding."""


def get_config(arg: str = "d12,block8") -> base.Config:
    """`SIZE,SCHEME` with SIZE dDEPTH or one of SIZES, SCHEME one of plain, full, blockS."""
    dial = re.fullmatch(r"(d([1-9]\d{0,3})|7b|70b),(plain|full|block([1-9]\d{0,3}))", arg or "d12,block8")
    if not dial:
        raise base.ConfigError(
            f"lm:{arg!r} is not lm:SIZE,SCHEME, as d12,block8 or d12,plain or d12,full or 7b,block8 are"
        )
    config = base.get_config()
    config.residual = "block" if dial[4] else dial[3]
    config.block_size = int(dial[4] or 1)
    config.model.update(SIZES.get(dial[1]) or _of_depth(int(dial[2])), dtype="bfloat16")
    width = config.model.width
    config.data.update(length=1024, batch=64)
    if dial[1] in SIZES:
        config.model.tied = False
        config.data.update(length=4096, batch=512)
        config.train.vocab_chunks = 8
    config.train.update(steps=5000, log_every=10, depth_every=250, eval_every=500, eval_tokens=0)
    # 1/D through Table 2's first row (D = 896), no higher than what quick was measured with.
    config.optim.update(lr=min(4e-3, 2.99e-3 * 896 / width), warmup=250, decay=1000)
    config.checkpoint.update(every=500, keep=3)
    return config


def _of_depth(depth: int) -> dict[str, int]:
    width = HEAD_WIDTH * depth
    mlp_width = -(-8 * width // 3 // 64) * 64  # SwiGLU of 8 D^2 weights, whole tiles
    return {"blocks": depth, "width": width, "heads": depth, "kv_heads": depth, "mlp_width": mlp_width}
