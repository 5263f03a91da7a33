r"""Twelve transformer blocks of width 512 on 58 MB of English technical text: estimated minutes on one H200.

Command   bash tests/h200_evidence.sh, whose head says what to prepare; or one run, the text as for technical:
          python -m attnres_jax train --config=gpu:block --workdir=runs/block   (or plain, full, mhc)
Hardware  one H200 or H100, bf16 activations over fp32 parameters
Time      not measured: no GPU was lent. Estimate, H200: a token is 223 MFLOPs of training (inspect, plain;
          recomputation not counted), a run 8.2 M tokens, so 1.8 PFLOPs: 18 s at 0.1 of 990 TFLOP/s (bf16).
          A tenth, for half of the time of a step 2304 wide (docs/results/kernels) was no matrix product, and
          here these have a quarter of the width. With guesses for the others, Block 1.2 of plain, Full 1.6
          and mHC 3: 126 s for a seed of all four
Expect    not measured either; the rate was tried for no scheme
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
