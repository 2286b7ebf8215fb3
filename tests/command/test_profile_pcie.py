"""What `profile` reads of a GPU's PCI Express capability."""
import re

import fake_gpu
import pytest
from profile_machine import quiet_machine

from engram_kernels.profile import pcie, probes_gpu
from engram_kernels.profile.nvml import Nvml
from engram_kernels.profile.session import Options, Session


def express_config(extended_tags=1, ten_bit_tags=0):
    """A configuration space with power management, then PCI Express."""
    config = bytearray(256)
    config[0x34], config[0x60], config[0x61], config[0x78] = 0x60, 0x01, 0x78, 0x10
    config[0x78 + 8:0x78 + 10] = ((1 << 5) | (2 << 12) | (extended_tags << 8)).to_bytes(2, "little")
    config[0x78 + 0x24:0x78 + 0x28] = (1 << 17).to_bytes(4, "little")
    config[0x78 + 0x28:0x78 + 0x2A] = (ten_bit_tags << 12).to_bytes(2, "little")
    return bytes(config)


def test_pcie_capability_says_how_many_reads_may_be_outstanding():
    config = express_config()
    assert pcie.pcie_capability(config) == {"payload_bytes": 256, "read_request_bytes": 512, "extended_tags": 1,
                                            "ten_bit_tags_possible": 1, "ten_bit_tags_on": 0, "tag_bits": 8}
    assert pcie.pcie_capability(express_config(0))["tag_bits"] == 5
    assert pcie.pcie_capability(express_config(1, 1))["tag_bits"] == 10
    assert pcie.pcie_capability(config[:64]) == {} == pcie.pcie_capability(b"")
    circle = bytearray(config)
    circle[0x78], circle[0x79] = 0x05, 0x60  # no PCI Express, and back to the first
    assert pcie.pcie_capability(bytes(circle)) == {}


@pytest.mark.parametrize(("config", "why"), [
    (None, "FileNotFoundError"), (64, "PermissionError: .*64 bytes are readable.*run as root"),
    (0, "ValueError: .*there is no PCI Express capability"), (256, None)])
def test_profile_says_what_the_pcie_capability_has_or_why_it_is_not_known(config, why, tmp_path, monkeypatch):
    monkeypatch.setattr(pcie, "PCI_DEVICES", tmp_path)
    if config is not None:
        (tmp_path / "0000:00:00.0").mkdir()
        (tmp_path / "0000:00:00.0" / "config").write_bytes(express_config()[:config] if config else bytes(256))
    session = Session(Options("quick"), quiet_machine())
    nvml = Nvml(fake_gpu.FakeGpu(0), fake_gpu.FakeNvml())
    probes_gpu._describe(session, nvml, None)
    block = session.machine["gpu"][0]
    if why is None:
        assert block["pcie"]["tag_bits"] == 8 and block["pcie"]["read_request_bytes"] == 512 and "pcie" not in block["unread"]
    else:
        assert block["pcie"] is None and re.search(why, block["unread"]["pcie"])
