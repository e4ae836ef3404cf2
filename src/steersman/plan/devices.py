"""What devices and their links can do, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from steersman.types import SteersmanError


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` in bytes; `flops` a second, dense, in bfloat16; bytes a second of its own memory (`bandwidth`), to the
    devices of the same node (`link`, one direction), and to other nodes (`network`)."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float = 50e9
    process: float = 1e9
    """Bytes of it that the driver, libraries and the allocator's gaps take."""


KNOWN = {
    device.name: device
    for device in (
        Device("H100-80GB", 80e9, 989e12, 3.35e12, 450e9),
        Device("H200-141GB", 141e9, 989e12, 4.8e12, 450e9),
        Device("B200-180GB", 180e9, 2250e12, 8e12, 900e9),
        Device("A100-80GB", 80e9, 312e12, 2.039e12, 300e9),
        Device("A100-40GB", 40e9, 312e12, 1.555e12, 300e9),
        Device("L40S-48GB", 48e9, 362e12, 0.864e12, 32e9, 12.5e9),
        Device("A10G-24GB", 24e9, 70e12, 0.6e12, 32e9, 12.5e9),
        Device("RTX4090-24GB", 24e9, 165e12, 1.008e12, 32e9, 12.5e9),
        Device("RTX3090-24GB", 24e9, 71e12, 0.936e12, 32e9, 12.5e9),
    )
}
"""NVLink of eight devices in a node (PCIe for the last four), 400 Gbit/s to other nodes for each device (100 for the
last four)."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` times `per_node` equal devices."""

    device: Device
    per_node: int
    nodes: int = 1

    @property
    def count(self) -> int:
        return self.per_node * self.nodes

    def link(self, devices: int) -> float:
        """Bytes a second between so many devices, laid node by node: the slowest link on the way."""
        return self.device.link if devices <= self.per_node else self.device.network


def cluster(words: str, nodes: int = 1) -> Cluster:
    """`8xH100-80GB` on each node. A size alone is the memory of a device of the same kind: `8xH100-64GB`.

    Raises SteersmanError for a device that is not known, with those that are.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9]+)-(\d+)GB", words)
    if found is not None:
        count, kind, gigabytes = int(found[1] or 1), found[2].upper(), int(found[3])
        like = [device for device in KNOWN.values() if device.name.split("-")[0] == kind]
        if like and count > 0:
            same = next((device for device in like if device.name == f"{kind}-{gigabytes}GB"), like[0])
            device = same if same.memory == gigabytes * 1e9 else replace(
                same, name=f"{kind}-{gigabytes}GB", memory=gigabytes * 1e9
            )  # fmt: skip
            return Cluster(device, count, nodes)
    raise SteersmanError(f"devices: {words!r} is not known; write NxNAME, such as 8xH100-80GB, of {', '.join(KNOWN)}")
