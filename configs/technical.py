r"""Twelve transformer blocks on 58 MB of English technical text: some depth, on two cores.

Command   launch/technical_corpus.sh texts/technical
          python -m attnres_jax data prepare --text=texts/technical --glob='**/*.txt' --glob='**/*.rst' \
              --out=corpora/technical --tokenizer=bpe
          python -m attnres_jax train --config=technical:block --workdir=runs/block   (or plain, full)
Hardware  2 CPU cores, fp32
Time      25 minutes (plain), 31 (block), tests beside them, shared AMD EPYC, JAX 0.12.0.1, 2026-11-25
Expect    bits/byte on the 62 held-out documents, seed 0: plain 2.019, block 1.952, full 1.950
"""

from attnres_jax.configs import base


def get_config(arg: str = "block") -> base.Config:
    """The residual scheme `arg`; block means S = 4: six AttnRes blocks of 24 sublayers."""
    config = base.get_config()
    config.residual = base.choose("residual scheme", arg or "block", base.KEYS["residual"].legal.options)
    config.block_size = 4
    config.model.update(blocks=12, width=64, heads=4, kv_heads=4, mlp_width=192, dtype="float32")
    config.data.update(corpus="corpora/technical", length=128, batch=16)
    config.train.update(steps=1500, log_every=20, depth_every=250, eval_every=500, eval_tokens=0)
    config.optim.update(lr=4e-3, warmup=50)
    config.checkpoint.update(every=250, keep=2)
    return config
