r"""Twelve transformer blocks of width 512 on 58 MB of English technical text: three minutes on an H200.

Command   bash tests/h200_evidence.sh, whose head says what to prepare; or one run, the text as for technical:
          python -m attnres_jax train --config=gpu:block --workdir=runs/block   (or plain, full, mhc)
Hardware  one H200 or H100, bf16 activations over fp32 parameters
Time      H200, eight runs at once (2026-11-27): 2.0 minutes plain, 3.0 Block, 3.1 Full, of which 30 to 50 s
          compile; mHC not finished
Expect    held-out bits/byte 1.784 plain, 1.646 Block, 1.638 Full (docs/results/gpu; one rate for all, tuned
          for none)
"""

from attnres_jax.configs import base


def get_config(arg: str = "block") -> base.Config:
    """The residual scheme `arg`; block means S = 4: six AttnRes blocks of 24 sublayers."""
    config = base.get_config()
    config.residual = base.choose("residual scheme", arg or "block", base.KEYS["residual"].legal.options)
    config.block_size = 4
    # A multiple of 256, or the Mosaic kernels of Block's reads do not run. Full has 25 sources: XLA's reads.
    config.model.update(blocks=12, width=512, heads=8, kv_heads=8, mlp_width=768, dtype="bfloat16")
    config.data.update(corpus="corpora/technical", length=512, batch=32)
    config.train.update(steps=500, log_every=10, depth_every=50, eval_every=250, eval_tokens=0)
    config.optim.update(lr=1e-3, warmup=50)
    config.checkpoint.update(every=250, keep=1)
    return config
