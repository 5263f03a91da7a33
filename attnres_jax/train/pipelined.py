"""The trainer's model as a pipeline: what its stages run, and of which microbatches."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from attnres_jax import configs
from attnres_jax.analysis.inspect import parameters
from attnres_jax.configs import Config
from attnres_jax.models import transformer
from attnres_jax.models.attention import with_first_values
from attnres_jax.models.transformer import REMAT, ModelConfig
from attnres_jax.parallel import mesh as meshes
from attnres_jax.parallel import sharding
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.layout import Layout
from attnres_jax.parallel.mesh import BATCH
from attnres_jax.parallel.pipeline import Model, Parts, Pipeline
from attnres_jax.parallel.timetable import Chunks, Timetable
from attnres_jax.placement import Placement
from attnres_jax.train import state
from attnres_jax.train.loss import document_end, documents, objective, over_stages

_cut = lax.with_sharding_constraint
COLUMNS = P(None, "tensor")
"""Where the table of embeddings [V,D] lies on a device of a stage."""


def layout(config: Config, model: ModelConfig, stages: int) -> Layout:
    """Which layers each of so many stages has."""
    size = max(model.scheme.schedule(model.sublayers).sizes)
    return Layout(model.kinds, Chunks(model.sublayers, size, stages, config.train.virtual_stages))


class Pipelined:
    """`config` on the pipelined `mesh`; parameters are in order of stages (`layout`)."""

    def __init__(
        self, config: Config, model: ModelConfig, mesh: Mesh, end: int | None, implementation: str | None
    ):
        self.config, self.model, self.end = config, model, document_end(config, end)
        self.place = Placement(mesh, P(None, "tensor"))  # of the rows that a device has
        self.attend = transformer.attending(model, implementation, self.place)
        self.stages = mesh.shape[meshes.STAGE]
        self.specs = _specs(model, mesh, _automatic)
        layers = layout(config, model, self.stages)
        self.staged, self.unstaged = layers.staged, layers.unstaged
        scheme = replace(model.scheme, implementation=implementation, placement=self.place)
        self.abstract, own = transformer.abstract(model), self.specs["a"]
        self.shared = {name: own[name] for name in ("norm", "value")} if model.value_residual else ()
        table = Timetable(self.stages, config.train.virtual_stages, config.train.accumulation)
        self.pipeline = partial(
            Pipeline,
            Chunked(scheme, model.kinds, layers.chunks, REMAT[model.remat]),
            table=table,
            mesh=mesh,
            spec=self.place.spec,
            specs=self.specs,
            columns=COLUMNS,
            gradients=self._gradients(mesh),
            shared=self.shared,
        )

    def loss(
        self, params: Any, tokens: Int[Array, "B T1"], count: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """`loss.objective` of the batch, of `count` predictions."""
        batch = {"tokens": self._microbatches(tokens)}
        batch["count"] = jnp.broadcast_to(count, len(batch["tokens"]))

        def head(last, unembedding, h, micro):
            return objective(
                self._next(last, unembedding, h, micro), micro["count"], self.config.optim.z_loss
            )

        return self.pipeline(model=self._model(head)).loss(self._parts(params), batch)

    def value_and_grad(
        self, params: Any, tokens: Int[Array, "B T1"], count: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Any]:
        """The reported loss, of `count` predictions, and the gradient of `params`."""
        (_, value), gradient = jax.value_and_grad(self.loss, has_aux=True)(params, tokens, count)
        return value, gradient

    def nats(self, params: Any, tokens: Int[Array, "B T1"], mask: Bool[Array, "B T"]) -> Float[Array, " T"]:
        """`step.position_nats`."""
        batch = {"tokens": self._microbatches(tokens), "mask": self._microbatches(mask)}

        def head(last, unembedding, h, micro):
            return jnp.sum(jnp.where(micro["mask"], self._next(last, unembedding, h, micro).nats, 0), 0)

        return self.pipeline(model=self._model(head)).forward(self._parts(params), batch)

    def logits(self, params: Any, text: Int[Array, " T"], at: Int[Array, ""]) -> Float[Array, " V"]:
        """Of the token after position `at` of one text, which sees none behind it.

        The text fills a microbatch for each stage, of which the first row counts."""
        count = self.stages
        tokens = meshes.repeated(jnp.append(text, 0), self.place.mesh, count)
        batch = {"tokens": tokens, "counts": jnp.arange(len(tokens)) == 0}
        batch = {name: meshes.microbatches(value, count) for name, value in batch.items()}
        batch["at"] = jnp.broadcast_to(at, count)

        def head(last, unembedding, h, micro):
            h = self.place.enter(self._normed(last, h))[:, micro["at"]]
            own = transformer.logits(h, unembedding)  # of every P-th column
            own = jnp.sum(jnp.where(micro["counts"][:, None], own, 0), 0)
            mine = jnp.arange(self.stages) == lax.axis_index(meshes.STAGE)
            return lax.psum(jnp.where(mine, own[:, None], 0), meshes.STAGE).reshape(-1)

        table = Timetable(self.stages, self.config.train.virtual_stages, count)
        return self.pipeline(model=self._model(head), table=table).forward(self._parts(params), batch)

    def _parts(self, params):
        whole = state.merge(self.model, params)
        layers, last = (nnx.to_pure_dict(nnx.state(module)) for module in (whole.layers, whole.norm))
        shared = transformer.first_attention(layers) if self.shared else ()
        return Parts(whole.embed.embedding[...], layers, whole.mix.mix, last, whole.unembedding, shared)

    def _gradients(self, mesh):
        """`Pipeline.gradients`."""
        layers, head = _specs(self.model, mesh, _manual), P("fsdp")
        shared = jax.tree.map(lambda _: P(), self.shared)
        mix = jax.tree.map(lambda _: P(), self.model.scheme.init(self.model.sublayers, self.model.width))
        last = jax.tree.map(lambda _: P(), nnx.to_pure_dict(nnx.state(self.abstract.norm)))
        return Parts(P(None, "fsdp"), layers, mix, last, head, shared)

    def _model(self, head):
        return Model(
            embed=self._embed,
            embedded=self._embedded,
            rounded=self._rounded,
            layers=self._layers,
            head=head,
        )

    # XLA's partitioner, where some axes are manual, takes no lookup whose table and ids are cut over the same
    # axis.
    def _embed(self, table, micro):
        table, tokens = _cut(table, COLUMNS), _cut(_inputs(micro), P())
        return self.place.leave(_cut(table[tokens], P(None, *COLUMNS)).astype(self.model.dtype))

    def _embedded(self, total, d_x, micro):
        total, tokens = _cut(total, COLUMNS), _cut(_inputs(micro), P())
        d_x = _cut(self.place.leave(d_x), P(None, *COLUMNS))  # cut so before it is made wider
        return _cut(total.at[tokens].add(d_x.astype(total.dtype)), COLUMNS)

    def _rounded(self, parts):
        """Matrices in the dtype of activations; vectors, which have no place of their own, as they are."""

        def cast(a, spec=COLUMNS):
            return a.astype(self.model.dtype) if len(spec) else a

        layers = jax.tree.map(cast, parts.layers, self.specs)
        shared = jax.tree.map(cast, parts.shared, self.shared)
        whole = {"table": cast(parts.table), "unembedding": cast(parts.unembedding)}
        return parts._replace(layers=layers, shared=shared, **whole)

    def _layers(self, micro, shared, mix, x):
        inputs, attend = _inputs(micro), self.attend
        if shared:
            first = transformer.first_values(
                self.model, self.abstract.layers["a"], shared, mix, x, self.place
            )
            attend = with_first_values(attend, first, self.model.value_residual)
        seen = (None, transformer.counting(inputs)) if self.end is None else documents(inputs, self.end)
        segments, positions = seen
        return {
            kind: transformer.layer(stack, positions, segments, attend)
            for kind, stack in self.abstract.layers.items()
        }

    def _normed(self, last, h):
        return nnx.merge(nnx.graphdef(self.abstract.norm), last)(h)

    def _next(self, last, unembedding, h, micro):
        h = self._normed(last, h)
        chunks, stages = self.config.train.vocab_chunks, self.stages
        return over_stages(
            self.place.enter(h), unembedding, micro["tokens"], stages, chunks=chunks, end=self.end
        )

    def _microbatches(self, batch):
        return meshes.microbatches(batch, self.config.train.accumulation)


def _inputs(micro):
    return micro["tokens"][:, :-1]


def _specs(model, mesh, of):
    """Of the leaves of stacked layers."""
    places = sharding.shardings(state.shapes(model), parameters(model), mesh, of)
    return jax.tree.map(lambda place: place.spec, places["layers"])


def _automatic(parameter):
    """Where a layer's leaf lies on the axes that are automatic, the first axis of its stack left out."""
    return P(*(None if axis in BATCH else axis for axis in sharding.spec(parameter)[1:]))


def _manual(parameter):
    """Where the gradient of a stack of leaves lies on the axes that are manual."""
    rest = (axis if axis in BATCH else None for axis in sharding.spec(parameter)[1:])
    return P(meshes.STAGE, *rest)


def check(config: Config, model: ModelConfig) -> None:
    """Raise `ConfigError` where the vocabulary is not whole chunks on each stage."""
    stages, chunks = config.mesh.stage, config.train.vocab_chunks
    if model.vocab % (stages * chunks):
        legal = [n for n in meshes.divisors(model.vocab) if n <= model.blocks]
        raise configs.ConfigError(
            f"mesh.stage x train.vocab_chunks = {stages} x {chunks} must divide the corpus's vocabulary of "
            f"{model.vocab}: each stage computes its part of the logits, in that many chunks; without chunks "
            f"mesh.stage may be {', '.join(map(str, legal))}"
        )
