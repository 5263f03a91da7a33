"""A mesh over several slices: data goes between them, everything else stays inside one."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnres_jax.bench import target
from attnres_jax.configs import ConfigError
from attnres_jax.parallel import mesh
from attnres_jax.placement import Placement


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that is not there."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def two_slices(each=4):
    """Out of order, as they may come."""
    return [Device(i, i % 2) for i in range(2 * each)]


def slices(made, axis):
    """The slices that devices which differ along `axis` only lie in."""
    rows = made.devices.swapaxes(mesh.AXES.index(axis), -1).reshape(-1, made.shape[axis])
    return {tuple(device.slice_index for device in row) for row in rows}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (8, 1, 1), (-1, 4, 1)])
def test_only_data_leaves_a_slice(sizes):
    made = mesh.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), two_slices())
    assert len({device.id for device in made.devices.flat}) == 8
    for axis in ("stage", "fsdp", "expert", "tensor"):
        assert all(len(set(row)) == 1 for row in slices(made, axis)), axis
    half = made.shape["data"] // 2
    assert slices(made, "data") == {(0,) * half + (1,) * half}  # neighbours stay together


def test_data_must_be_whole_on_every_slice():
    with pytest.raises(ConfigError, match=r"mesh\.data = 1 must be a multiple of the 2 slices: .*4 devices"):
        mesh.make_mesh({"data": 1, "fsdp": 8}, two_slices())
    with pytest.raises(ConfigError, match=r"mesh\.data = 4 must be a multiple of the 3 slices"):
        mesh.make_mesh({"data": 4, "fsdp": 3}, [Device(i, i % 3) for i in range(12)])


@pytest.mark.parametrize("wanted", [{"data": 0}, {"data": -2, "fsdp": -1}, {"dta": 2}])
def test_sizes_that_are_none(wanted):
    axis = next(iter(wanted))
    with pytest.raises(ConfigError, match=rf"mesh\.{axis} = .*: axes are stage, data, .*, sizes from 1 on"):
        mesh.sizes(wanted, 4)


@pytest.mark.parametrize("spec", [P(), P("data"), P("data", "tensor")], ids=str)
def test_a_placement_of_any_axes(spec):
    """Entering and leaving a sublayer: T whole inside, as the spec has it outside; what it does not name is
    whole."""
    made = mesh.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    place, x = Placement(made, spec), jnp.ones((2, 4, 8))
    inside, outside = jax.jit(lambda x: (place.enter(x), place.leave(x)))(x)
    assert inside.sharding.is_equivalent_to(NamedSharding(made, P(*spec[:1])), 3)
    assert outside.sharding.is_equivalent_to(NamedSharding(made, spec), 3)


@pytest.mark.parametrize("slice_index", [0, 7])
def test_one_slice_is_no_network(slice_index):
    made = mesh.make_mesh({"data": 1, "fsdp": 4}, [Device(i, slice_index) for i in range(4)])
    assert [device.id for device in made.devices.flat] == [0, 1, 2, 3]


def test_hosts_of_gpus_are_no_slices():
    made = mesh.make_mesh({"data": 1, "fsdp": 8}, [Device(i, i // 4, platform="gpu") for i in range(8)])
    assert made.shape["fsdp"] == 8


ON_A_SLICE = """
from jax.experimental import topologies
from attnres_jax.parallel import mesh
for name in ("v6e:4x4", "v5p:4x4x4", "v5e:4x4"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    assert mesh.make_mesh({"data": 2, "fsdp": -1, "tensor": 2}, devices).size == len(devices)
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
made = mesh.make_mesh({"data": 4, "fsdp": 2}, devices).devices[0, :, :, 0, 0]
assert [[d.slice_index for d in row] for row in made] == [[0, 0], [0, 0], [1, 1], [1, 1]], made
"""


@pytest.mark.libtpu
@pytest.mark.slow
def test_real_slices():
    """Axes that are only part of an axis of links; two slices as libtpu has them."""
    ran = subprocess.run(
        [sys.executable, "-c", ON_A_SLICE],
        env=os.environ | target.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
