"""Mooncake's two API generations and its error codes, on a stand-in with the same signatures.

test_mooncake_world.py has the real one.

`EngramStore({layer: config}, store).lookup_into(layer, ids, out)` is on Mooncake's main branch and in no wheel
without CUDA yet.
"""
import ctypes
import json
import os
import socket
import types

import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels.table import mooncake_rows
from engram_kernels.testing import random_rows

pytestmark = pytest.mark.usefixtures("compiled")
ADDRESS = "mooncake://10.0.0.7:50051/rows"


class Store:
    """MooncakeDistributedStore in this process: setup, put, get, ranges; `answers` replaces what ranges answer."""

    def __init__(self, objects):
        self.objects, self.registered, self.code, self.asked = objects, {}, None, []

    def setup(self, hostname, metadata, segment, buffer, protocol, devices, master):
        return 0 if protocol == "tcp" else -600

    def close(self):
        self.objects = None  # what comes after it fails
        return 0

    def is_exist(self, key):
        return int(key in self.objects)

    def put(self, key, value, config):
        self.objects.setdefault(key, bytes(value))
        return 0

    def upsert(self, key, value, config):
        self.objects[key] = bytes(value)
        return 0

    def get(self, key):
        return self.objects.get(key, b"")

    def remove(self, key, force=False):
        return 0 if self.objects.pop(key, None) is not None else -704

    def register_buffer(self, pointer, size):
        self.registered[pointer] = size
        return 0

    def get_into_ranges(self, pointers, all_keys, targets, sources, sizes):
        answers = []
        self.asked.append([len(x) for x in sizes[0]])
        for key, to, at, size in zip(all_keys[0], targets[0], sources[0], sizes[0], strict=True):
            answers.append([])
            for target, source, count in zip(to, at, size, strict=True):
                stored = self.objects.get(key)
                if self.code is not None or stored is None:
                    answers[-1].append(-704 if self.code is None else self.code)
                    continue
                assert target + count <= self.registered[pointers[0]] and source + count <= len(stored)
                ctypes.memmove(pointers[0] + target, stored[source:source + count], count)
                answers[-1].append(count)
        return [answers]


class Config:
    pass


class EngramStore:
    """That of Mooncake after #4065."""

    def __init__(self, layers, store):
        (self.layer, self.config), self.store = *layers.items(), store

    def lookup_into(self, layer, ids, out):
        assert layer == self.layer and ids.dtype == np.int64 and out.shape == (*ids.shape, self.config.row_bytes)
        assert out.ctypes.data in self.store.registered
        for place in np.ndindex(*ids.shape):
            at = int(ids[place]) * self.config.row_bytes
            assert 0 <= ids[place] < self.config.table_vocab_sizes[place[2]]
            stored = self.store.objects[f"engram:l{layer}:h{place[2]}"]
            out[place] = np.frombuffer(stored[at:at + self.config.row_bytes], np.uint8)
        return self.store.code or 0


@pytest.fixture(params=["lookup_into", "ranges"])
def generation(request):
    return request.param


@pytest.fixture
def objects(monkeypatch):
    """Of the stand-in; `stores` are its clients."""
    found, stores = {}, []

    def make():
        stores.append(Store(found))
        return stores[-1]
    module = types.SimpleNamespace(MooncakeDistributedStore=make, ReplicateConfig=Config, EngramStoreConfig=Config,
                                   EngramStore=EngramStore)
    monkeypatch.setattr(mooncake_rows, "_mooncake", lambda: module)
    monkeypatch.setattr(mooncake_rows, "_expect_master", lambda *args: None)
    return types.SimpleNamespace(found=found, stores=stores, module=module)


def make_table(row_format="int8_group32", num_rows=500):
    rows, scales = random_rows(row_format, num_rows, 64, torch.Generator().manual_seed(0))
    return ek.RowTable.from_tensor(rows, scales, row_format, row_dim=64)


@pytest.mark.parametrize("row_format", ["bf16", "int8_group32", "fp8_e4m3_block32_packed"])
def test_mooncake_rows_equal_those_of_the_table(row_format, objects):
    table = make_table(row_format)
    stored = ek.store_rows(table, ADDRESS, object_bytes=1000)
    remote = ek.RowTable.connect(stored.address)
    ids = torch.randint(-1, 500, (70, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ek.gather_rows(remote, ids).view(torch.int16), ek.gather_rows(table, ids).view(torch.int16))
    assert torch.equal(remote.read_rows(torch.arange(499, -1, -1))[0], table.rows.flip(0))
    asked = objects.stores[-1].asked[-1]
    assert len(asked) == len(stored.keys) - 1 and set(asked) == {1}  # neighbours are one range of each object
    stored.remove()
    assert objects.found == {}


def test_mooncake_rows_of_an_engram_store(generation, objects):
    """What Mooncake's own EngramStore populated: an object per head."""
    if generation == "ranges":
        objects.module.EngramStore = type("EngramStore", (), {})  # of the wheel: lookup alone
    sizes, table = [101, 67, 203], make_table("fp8_e4m3_block32_packed", 371)
    for head, part in enumerate(table.rows.split(sizes)):
        objects.found[f"engram:l3:h{head}"] = part.numpy().tobytes()
    options = dict(row_format="fp8_e4m3_block32_packed", row_dim=64, table_vocab_sizes=sizes)
    remote = ek.RowTable.connect("mooncake://10.0.0.7:50051/engram:l3", fingerprint=table.fingerprint(), **options)
    for ids in (torch.arange(370, -1, -1), torch.tensor([370]), torch.tensor([100, 101, 167, 168])):
        assert torch.equal(remote.read_rows(ids)[0], table.rows[ids])
    assert bool(objects.stores[-1].asked) == (generation == "ranges")
    objects.stores[-1].code = -707
    with pytest.raises(ConnectionError, match=r"mooncake://10.0.0.7:50051: key 'engram:l3:h1' cannot be read: -707: its lease"):
        remote.read_rows(torch.tensor([101]))
    with pytest.raises(ValueError, match="should have a table with fingerprint 0123"):
        ek.RowTable.connect("mooncake://10.0.0.7:50051/engram:l3", fingerprint="0123", **options)
    for wrong, message in (({"row_format": None}, "needs row_format and row_dim"),
                           ({"row_format": "int8_group32"}, "hold their scales")):
        with pytest.raises(ValueError, match=message):
            ek.RowTable.connect("mooncake://10.0.0.7:50051/engram:l3", **{**options, **wrong})


@pytest.mark.parametrize(("code", "message"), [(-707, "-707: its lease expired while it was read"),
                                               (-704, "there is no such object"),
                                               (-800, "the transfer failed"), (-900, "the master does not answer"), (17, "17")])
def test_mooncake_rows_an_error_names_host_and_key(code, message, objects):
    remote = ek.RowTable.connect(ek.store_rows(make_table(), ADDRESS, object_bytes=1000).address)
    objects.stores[-1].code = code
    with ek.RowPrefetcher(remote) as pf:
        ticket = pf.submit(torch.tensor([499]))
        with pytest.raises(ConnectionError, match=rf"mooncake://10.0.0.7:50051: key 'engram_kernels/rows/\w+/\d+' cannot be "
                                                  rf"read: .*{message}"):
            pf.wait(ticket, timeout_s=60)


def test_mooncake_rows_generations_and_fingerprints(objects):
    table, other = make_table(), make_table("bf16")
    stored = ek.store_rows(table, ADDRESS)
    remote = ek.RowTable.connect(ADDRESS)
    with pytest.raises(FileExistsError, match="replace=True takes its place"):
        ek.store_rows(other, ADDRESS)
    again = ek.store_rows(other, ADDRESS, replace=True)
    with pytest.raises(ConnectionError, match=f"generation {stored.generation} is gone, there is one of generation "
                                              f"{again.generation} now"):
        remote.read_rows(torch.tensor([3]))
    assert set(objects.found) == set(again.keys)
    key = next(key for key in again.keys if key.endswith("/0"))
    objects.found[key] = bytes(len(objects.found[key]))
    with pytest.raises(ValueError, match="its rows have .*: they are of another table or generation"):
        ek.RowTable.connect(ADDRESS)
    manifest = json.loads(objects.found["engram_kernels/rows"])
    for damaged, message in ((b"{", "is no manifest of a table"), (json.dumps({**manifest, "version": 9}).encode(), "version 9"),
                             (json.dumps({**manifest, "table": {}}).encode(), "of another version, or is damaged")):
        objects.found["engram_kernels/rows"] = damaged
        with pytest.raises(OSError, match=f"key 'engram_kernels/rows'.* {message}"):
            ek.RowTable.connect(ADDRESS)
    with pytest.raises(ConnectionError, match="cannot join the store: -600"):
        ek.RowTable.connect(ADDRESS, protocol="rdma")


def test_mooncake_rows_a_write_that_fails_leaves_nothing(objects, monkeypatch):
    puts = []

    def put(self, key, value, config):
        puts.append(key)
        if len(puts) == 4:
            return -200
        self.objects[key] = bytes(value)
        return 0
    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(OSError, match=r"key 'engram_kernels/rows/\w+/3' cannot be put: -200: no memory is left in the store"):
        ek.store_rows(make_table(), ADDRESS, object_bytes=1000)
    assert objects.found == {}


def test_mooncake_rows_stopped_behind_its_manifest_are_whole(objects, monkeypatch):
    """Ctrl-C while the objects of the generation before are removed: the manifest names the new ones already."""
    ek.store_rows(make_table("bf16"), ADDRESS)
    remove = Store.remove

    def interrupted(self, key, force=False):
        monkeypatch.setattr(Store, "remove", remove)
        raise KeyboardInterrupt
    monkeypatch.setattr(Store, "remove", interrupted)
    table = make_table()
    with pytest.raises(KeyboardInterrupt):
        ek.store_rows(table, ADDRESS, replace=True)
    assert torch.equal(ek.RowTable.connect(ADDRESS).read_rows(torch.arange(500))[0], table.rows)


def test_mooncake_rows_arguments_are_named(objects):
    table = make_table()
    for args, options, error, message in (
            ((torch.zeros(3, 4), ADDRESS), {}, TypeError, "store_rows: table is Tensor, expected a RowTable"),
            ((table, ADDRESS), {"segment_bytes": -5}, ValueError, "store_rows: segment_bytes is -5, expected at least 0"),
            ((table, "ray://x"), {}, ValueError, "store_rows: address is 'ray://x', expected 'mooncake://HOST:PORT/NAME'")):
        with pytest.raises(error, match=message):
            ek.store_rows(*args, **options)
    assert objects.stores == []
    ek.store_rows(table, ADDRESS)
    for options, error, message in (
            ({"protocol": "tpc"}, ValueError, "protocol is 'tpc', expected 'tcp' or 'rdma'"),
            ({"row_format": "bf16"}, ValueError, "row_format is 'bf16' and row_dim None, expected neither without"),
            ({"bogus": 1}, TypeError, "mooncake:// has no option 'bogus', expected 'protocol' or 'rdma_devices' or"),
            ({"timeout_s": "5"}, TypeError, "timeout_s is '5', expected seconds, more than 0"),
            ({"timeout_s": None}, TypeError, "timeout_s is None, expected seconds"),
            ({"timeout_s": float("nan")}, ValueError, "timeout_s is nan, expected seconds"),
            ({"cache_bytes": -1}, ValueError, "cache_bytes is -1, expected at least 0"),
            ({"cache_bytes": 0.5}, TypeError, "cache_bytes is 0.5, expected an integer")):
        with pytest.raises(error, match=f"RowTable.connect: {message}"):
            ek.RowTable.connect(ADDRESS, **options)


def test_mooncake_rows_of_an_engram_store_take_sizes_of_any_kind(objects):
    """As numpy has them: the address of the table is JSON, for graphs that are saved."""
    table = make_table("fp8_e4m3_block32_packed", 371)
    for head, part in enumerate(table.rows.split([101, 270])):
        objects.found[f"engram:l3:h{head}"] = part.numpy().tobytes()
    for sizes in ((101, 270), np.array([101, 270]), torch.tensor([101, 270]), [np.int64(101), 270]):
        remote = ek.RowTable.connect("mooncake://10.0.0.7:50051/engram:l3", row_format="fp8_e4m3_block32_packed",
                                     row_dim=np.int64(64), table_vocab_sizes=sizes, cache_bytes=np.int64(1000))
        assert torch.equal(remote.read_rows(torch.tensor([370]))[0], table.rows[[370]])
    for sizes in (5, [], [0, -1], ["a"]):
        with pytest.raises(ValueError, match="table_vocab_sizes is .*, expected the rows of each head"):
            ek.RowTable.connect("mooncake://10.0.0.7:50051/engram:l3", row_format="bf16", row_dim=64, table_vocab_sizes=sizes)


def test_mooncake_rows_without_a_master_are_an_error_at_once(monkeypatch):
    """The engine itself tries for 90 s, in which nothing interrupts it."""
    monkeypatch.setattr(mooncake_rows, "_mooncake", lambda: None)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens to none
        address = f"mooncake://127.0.0.1:{nobody.getsockname()[1]}/rows"
        message = f"{address[:-5]}: no master answers there: .*refused"
        with pytest.raises(ConnectionError, match=f"RowTable.connect: {message}"):
            ek.RowTable.connect(address)
        with pytest.raises(ConnectionError, match=f"store_rows: {message}"):
            ek.store_rows(make_table(), address)
    for wrong in ("mooncake://127.0.0.1/rows", "mooncake://127.0.0.1:x/rows", "mooncake://127.0.0.1:99999/rows",
                  "mooncake://127.0.0.1:50051/", "mooncake://127.0.0.1:50051", "mooncake://:50051/rows"):
        with pytest.raises(ValueError, match=f"address is '{wrong}', expected 'mooncake://HOST:PORT/NAME'"):
            ek.RowTable.connect(wrong)


def test_mooncake_rows_after_a_fork_are_those_of_the_parent(objects, monkeypatch):
    """A child that leaves a `with` block, or drops a table, neither ends its parent's client nor removes its rows."""
    from prefetch_cases import exit_status
    stored = ek.store_rows(make_table(), ADDRESS)
    remote = ek.RowTable.connect(ADDRESS)

    def child():
        monkeypatch.setattr(Store, "close", lambda self: os._exit(3))
        stored.close()
        remote._file.client.__del__()
        with pytest.raises(RuntimeError, match="StoredRows.remove: mooncake://.* was stored before a fork"):
            stored.remove()
        with pytest.raises(RuntimeError, match="connected before a fork; connect again here"):
            remote.read_rows(torch.tensor([1]))
        os._exit(0)
    assert exit_status(child) == 0
    assert remote.read_rows(torch.tensor([1]))[0].shape[0] == 1


def test_mooncake_rows_are_removed_before_the_store_is_left(objects):
    """A call into an engine that was closed is a segmentation fault."""
    with ek.store_rows(make_table(), ADDRESS) as stored:
        stored.remove()
        stored.remove()
    stored.close()
    with pytest.raises(RuntimeError, match=f"StoredRows.remove: {ADDRESS} is closed here"):
        stored.remove()
    stored = ek.store_rows(make_table(), ADDRESS)
    objects.stores[-1].remove = lambda key, force: -900
    with pytest.raises(ConnectionError, match="key 'engram_kernels/rows': -900: the master does not answer"):
        stored.remove()


def test_mooncake_rows_deadline(objects):
    stored = ek.store_rows(make_table(num_rows=5000), ADDRESS)
    with pytest.raises(TimeoutError, match=r"mooncake://10.0.0.7:50051/rows: 1024 rows did not arrive in 1e-09 s"):
        ek.RowTable.connect(stored.address, timeout_s=1e-9)
