"""Mooncake Store for real, in a network namespace of its own: a master and a server that lends memory, over loopback.

    unshare -n python mooncake_world.py CASE

The engine listens on all interfaces whatever it is told, so it runs where there is only loopback. Prints JSON.
"""
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time

LIBC = ctypes.CDLL(None)
MASTER = "127.0.0.1:50151"
SERVER = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 256 << 20, 64 << 20, "tcp", "", sys.argv[1]) == 0
print("lends", flush=True)
time.sleep(1000)
"""


def raise_loopback():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def end_with_parent():
    """In a child: the kernel ends it with this process, which a time limit or a fault may end before `finally`."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def said_by(log):
    with open(log.name) as text:
        return text.read()[-2000:]


@contextlib.contextmanager
def world(lease_ms=5000):
    """A master and a server; both end with this."""
    import mooncake
    raise_loopback()
    binary = os.path.join(os.path.dirname(mooncake.__file__), "mooncake_master")
    host, _, port = MASTER.partition(":")
    log = open("master.log", "wb")  # noqa: SIM115
    master = subprocess.Popen([binary, f"--rpc_address={host}", f"--rpc_port={port}", f"--metrics_host={host}",
                               "--metrics_port=50153", f"--default_kv_lease_ttl={lease_ms}"], stdout=log, stderr=log,
                              preexec_fn=end_with_parent)
    server = None
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                break
            assert time.monotonic() < until and master.poll() is None, said_by(log)
            time.sleep(0.05)
        server = subprocess.Popen([sys.executable, "-c", SERVER, MASTER], stdout=subprocess.PIPE, stderr=log, text=True,
                                  preexec_fn=end_with_parent)
        while True:
            line = server.stdout.readline()
            assert line, said_by(log)
            if line.strip() == "lends":
                break
        yield master, server
    finally:
        for process in (server, master):
            if process is not None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def main():
    import torch

    import engram_kernels as ek
    from engram_kernels.testing import random_rows
    said = {}

    def error(call):
        try:
            call()
        except Exception as err:
            return f"{type(err).__name__}: {err}"
        return "nothing was raised"

    with world() as (master, server):
        address = f"mooncake://{MASTER}/rows"
        tables = {}
        for row_format in ("fp8_e4m3_block32_packed", "int8_group32", "fp8_e4m3_tensor"):
            rows, scales = random_rows(row_format, 3000, 64, torch.Generator().manual_seed(0))
            tables[row_format] = ek.RowTable.from_tensor(rows, scales, row_format, row_dim=64)
        ids = torch.randint(-1, 3000, (40, 9), generator=torch.Generator().manual_seed(1))
        for row_format, table in tables.items():
            ek.store_rows(table, f"{address}-{row_format}", object_bytes=30_000).close()
            remote = ek.RowTable.connect(f"{address}-{row_format}", cache_bytes=5000)
            with ek.RowPrefetcher(remote) as pf:
                rows = pf.wait(pf.submit(ids), timeout_s=60)
            every = remote.read_rows(torch.arange(2999, -1, -1))
            said[row_format] = [bool(torch.equal(rows, ek.gather_rows(table, ids))),
                                bool(torch.equal(every[0], table.rows.flip(0))), remote.fingerprint() == table.fingerprint()]
        table = tables["int8_group32"]
        stored = ek.store_rows(table, address)
        said["there"] = error(lambda: ek.store_rows(table, address))
        said["fingerprint"] = error(lambda: ek.RowTable.connect(address, fingerprint="0123"))
        said["unknown"] = error(lambda: ek.RowTable.connect(f"mooncake://{MASTER}/nothing"))
        said["nobody"] = error(lambda: ek.RowTable.connect("mooncake://127.0.0.1:50159/rows"))
        said["address"] = error(lambda: ek.RowTable.connect("mooncake://nowhere"))
        remote = ek.RowTable.connect(address)
        again = ek.store_rows(tables["fp8_e4m3_tensor"], address, replace=True)
        said["generation"] = error(lambda: remote.read_rows(torch.arange(5)))
        said["generations"] = [stored.generation, again.generation]
        again.remove()
        again.close()
        said["closed"] = error(again.remove)
        said["removed"] = error(lambda: ek.RowTable.connect(address))
        said["engram_store"] = engram_store(address)
        remote = ek.RowTable.connect(f"{address}-int8_group32", timeout_s=10)
        server.send_signal(signal.SIGKILL)
        server.wait()
        begin = time.monotonic()
        with ek.RowPrefetcher(remote) as pf:
            ticket = pf.submit(torch.arange(5))
            said["server"] = error(lambda: pf.wait(ticket, timeout_s=100))
        said["server_s"] = time.monotonic() - begin
        master.send_signal(signal.SIGKILL)
        master.wait()
        begin = time.monotonic()
        said["master"] = error(lambda: remote.read_rows(torch.arange(5)))
        said["master_s"] = time.monotonic() - begin
    print(json.dumps(said), flush=True)


def engram_store(address):
    """A layer that Mooncake's own EngramStore populated with rows of 264 bytes as 66 floats, read as packed rows."""
    import numpy as np
    import torch
    from mooncake.store import EngramStore, EngramStoreConfig, MooncakeDistributedStore

    import engram_kernels as ek
    from engram_kernels.testing import random_rows
    sizes = [101, 67, 203]
    rows, _ = random_rows("fp8_e4m3_block32_packed", sum(sizes), 256, torch.Generator().manual_seed(0))
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", MASTER) == 0
    config = EngramStoreConfig()
    config.table_vocab_sizes, config.embedding_dim = sizes, 66
    layer = EngramStore(3, config, store)
    layer.populate([np.ascontiguousarray(part).view(np.float32) for part in np.split(rows.numpy(), np.cumsum(sizes)[:-1])])
    remote = ek.RowTable.connect(f"mooncake://{MASTER}/engram:l3", row_format="fp8_e4m3_block32_packed", row_dim=256,
                                 table_vocab_sizes=sizes)
    return bool(torch.equal(remote.read_rows(torch.arange(sum(sizes) - 1, -1, -1))[0], rows.flip(0)))


if __name__ == "__main__":
    main()
