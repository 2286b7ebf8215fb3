"""What tests of `profile` share: the schema, and the machine block of a machine that is only said to be."""
import json
from pathlib import Path

import engram_kernels.profile

SCHEMA = json.loads(Path(engram_kernels.profile.__file__).with_name("profile.schema.json").read_text())


def quiet_machine(**blocks):
    """A machine block: 2 GiB free, a cache of 1 MiB, one NUMA node, no GPU."""
    return {"versions": {"torch": "x"},
            "machine": {"memory_free_bytes": 2 << 30, "memory_bytes": 4 << 30, "huge_pages": "madvise"},
            "limits": {"cgroup_bytes": None, "memlock_bytes": None, "shm_free_bytes": 1 << 30, "open_files": 1024},
            "numa": [{"node": 0, "cpus": [0, 1], "memory_bytes": 4 << 30}], "caches": {"last_level_bytes": 1 << 20},
            "disk": {"folder": ".", "free_bytes": 1 << 33, "writable": True, "file_system": "ext4"}, "gpu": [], **blocks}
