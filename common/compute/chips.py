"""Chips that JAX trains on: speed, memory, networks and prices, as their makers publish them.

Sources: for TPUs Google Cloud's tpu/docs/v4, v5e and tpu7x (whose table includes v5p and v6e); for v4's links arXiv
2304.01433; for v4's data-centre network arXiv 2204.02311, section 4 (measured: 1536 hosts of 4 chips send 81 Tbit/s).
For GPUs NVIDIA's data sheets of the SXM boards, dense. Prices are Google's list prices in the given region from
SkyPilot's catalog (v8); tpu7x's is not in it and unconfirmed. Prices change: `plan --price` takes another one.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """A list price, in USD per chip-hour."""

    on_demand: float
    spot: float | None
    region: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator. Rates and memory are per JAX device; rates are peaks that real programs do not reach."""

    name: str
    device_kinds: tuple[str, ...]
    """Values of `jax.Device.device_kind`."""
    devices_per_chip: int = 1
    flops_per_second: float
    """Matrix products in bf16."""
    hbm_bytes: float
    usable_hbm_bytes: float | None = None
    """What a program may reserve: the limit in libtpu 0.0.52's error for larger ones."""
    hbm_bytes_per_second: float
    links: int = 0
    """How many links (ICI) a chip has to its neighbours."""
    link_bytes_per_second: float = 0.0
    """Bandwidth of one link, one way."""
    dcn_bytes_per_second: float = 0.0
    """Bandwidth of one chip to other slices through the data centre's network, one way."""
    price: Price | None = None


GB, GIB = 1e9, 2**30

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            device_kinds=("TPU v4",),
            flops_per_second=275e12,
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=30.75 * GIB,
            hbm_bytes_per_second=1200 * GB,
            links=6,
            link_bytes_per_second=50 * GB,
            dcn_bytes_per_second=1.65 * GB,
            price=Price(on_demand=3.22, spot=0.92, region="us-central2"),
        ),
        Chip(
            name="v5e",
            device_kinds=("TPU v5 lite", "TPU v5e"),
            flops_per_second=197e12,
            hbm_bytes=16 * GIB,
            usable_hbm_bytes=15.75 * GIB,
            hbm_bytes_per_second=819 * GB,
            links=4,
            link_bytes_per_second=50 * GB,
            dcn_bytes_per_second=3.125 * GB,
            price=Price(on_demand=1.20, spot=0.48, region="us-west4"),
        ),
        Chip(
            name="v5p",
            device_kinds=("TPU v5", "TPU v5p"),
            flops_per_second=459e12,
            hbm_bytes=95 * GIB,
            usable_hbm_bytes=95.73 * GIB,
            hbm_bytes_per_second=2765 * GB,
            links=6,
            link_bytes_per_second=100 * GB,
            dcn_bytes_per_second=6.25 * GB,
            price=Price(on_demand=4.20, spot=1.68, region="us-east5"),
        ),
        Chip(
            name="v6e",
            device_kinds=("TPU v6 lite", "TPU v6e"),
            flops_per_second=918e12,
            hbm_bytes=32 * GIB,
            usable_hbm_bytes=31.24 * GIB,
            hbm_bytes_per_second=1638 * GB,
            links=4,
            link_bytes_per_second=100 * GB,
            dcn_bytes_per_second=12.5 * GB,
            price=Price(on_demand=2.70, spot=1.35, region="us-east5"),
        ),
        Chip(
            name="tpu7x",
            device_kinds=("TPU7x", "TPU v7x"),
            devices_per_chip=2,
            flops_per_second=2307e12 / 2,
            hbm_bytes=192 * GIB / 2,
            usable_hbm_bytes=94.74 * GIB,
            hbm_bytes_per_second=7380 * GB / 2,
            links=6,
            link_bytes_per_second=100 * GB,
            dcn_bytes_per_second=12.5 * GB,
            price=Price(on_demand=12.00, spot=None, region="us-central1"),
        ),
        Chip(
            name="A100-40GB",
            device_kinds=("NVIDIA A100-SXM4-40GB",),
            flops_per_second=312e12,
            hbm_bytes=40 * GB,
            hbm_bytes_per_second=1555 * GB,
        ),
        Chip(
            name="A100-80GB",
            device_kinds=("NVIDIA A100-SXM4-80GB",),
            flops_per_second=312e12,
            hbm_bytes=80 * GB,
            hbm_bytes_per_second=2039 * GB,
        ),
        Chip(
            name="H100",
            device_kinds=("NVIDIA H100 80GB HBM3",),
            flops_per_second=989e12,
            hbm_bytes=80 * GB,
            hbm_bytes_per_second=3350 * GB,
        ),
        Chip(
            name="H200",
            device_kinds=("NVIDIA H200",),
            flops_per_second=989e12,
            hbm_bytes=141 * GB,
            hbm_bytes_per_second=4800 * GB,
        ),
    )
}
"""By name."""


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this `jax.Device.device_kind`; None for CPUs and chips not listed here.

    >>> chip_of("TPU v5 lite").name, chip_of("cpu")
    ('v5e', None)
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
