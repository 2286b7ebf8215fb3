"""What a device's PCI Express capability says of requests: their size, and how many may be outstanding."""
from __future__ import annotations

from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
_CAPABILITIES, _EXPRESS = 0x34, 0x10  # where the list begins; the id of the one
_UNREADABLE = 64  # bytes that a user other than root gets


def pcie_of(bus_id: str) -> dict[str, int]:
    """Fields of the PCI Express capability of the device at an address.

    Args:
        bus_id: as NVML spells it, "00000000:3B:00.0".

    Returns:
        As `pcie_capability`.

    Raises:
        OSError: the system does not give the configuration space, or to root alone (PermissionError).
        ValueError: the device has no such capability.
    """
    path = PCI_DEVICES / bus_id.lower()[-12:] / "config"
    config = path.read_bytes()
    if len(config) <= _UNREADABLE:
        raise PermissionError(f"{path}: {len(config)} bytes are readable, the capability lies behind them: run as root")
    found = pcie_capability(config)
    if not found:
        raise ValueError(f"{path}: there is no PCI Express capability")
    return found


def pcie_capability(config: bytes) -> dict[str, int]:
    """Fields of the PCI Express capability in a device's configuration space; empty where it is not in these bytes.

    Args:
        config: the configuration space, 64 bytes without root, else 256 or 4096.

    Returns:
        payload_bytes and read_request_bytes, the largest; extended_tags, ten_bit_tags_possible and ten_bit_tags_on (0 or 1); and
        tag_bits, 5, 8 or 10: 2 to their power reads may be outstanding, save what 10 bits reserve.

    Source: PCI Express Base Specification, Device Control (offset 8), Device Capabilities 2 (0x24), Device Control 2 (0x28).
    """
    at = config[_CAPABILITIES] if len(config) > _UNREADABLE else 0
    for _ in range(48):  # as many as there is room for: a list that is broken may go in circles
        if not at or at + 0x2C > len(config):
            break
        if config[at] == _EXPRESS:
            control, capabilities_2, control_2 = (int.from_bytes(config[at + o:at + o + 4], "little") for o in (8, 0x24, 0x28))
            extended, ten_on = control >> 8 & 1, control_2 >> 12 & 1
            return {"payload_bytes": 128 << (control >> 5 & 7), "read_request_bytes": 128 << (control >> 12 & 7),
                    "extended_tags": extended, "ten_bit_tags_possible": capabilities_2 >> 17 & 1, "ten_bit_tags_on": ten_on,
                    "tag_bits": 10 if ten_on else 8 if extended else 5}
        at = config[at + 1]
    return {}
