"""Rows of Ray actors: the rows of the table, errors that name the actor, no process left. One Ray runtime for the whole file."""
import os
import pickle
import signal
import threading
import time

import pytest
import torch

import engram_kernels as ek
from engram_kernels.testing import random_rows

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'engram-kernels[ray]'")
# alone: one process, and so one runtime, which takes 5 to 20 s to start
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("compiled", "cluster")]

NUM_ROWS, ROW_DIM = 3000, 64
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 without: a busy machine lets an actor wait for minutes
    # "local": a cluster that runs here already, or RAY_ADDRESS, is somebody else's
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
             configure_logging=False, namespace="tests")
    yield
    children = _children()
    ray.shutdown()
    until = time.monotonic() + 30
    while left := [pid for pid in children if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < until, f"Ray left processes: {left}"
        time.sleep(0.1)


def _children():
    """Processes of Ray's session: those that were started from this one."""
    found, parents = set(), {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stat:
                    parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    for pid in parents:
        at = pid
        while at in parents and at != os.getpid():
            at = parents[at]
        if at == os.getpid() and pid != at:
            found.add(pid)
    return found


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    """A table of the packed format in a file, served by two actors."""
    rows, scales = random_rows("fp8_e4m3_block32_packed", NUM_ROWS, ROW_DIM, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("served") / "t"
    table = ek.RowTable.create(path, rows, scales, "fp8_e4m3_block32_packed", row_dim=ROW_DIM)
    with ek.serve_rows(path, 2, name="packed", timeout_s=TIMEOUT_S) as server:
        yield table, server


def test_ray_rows_equal_those_of_the_table(served):
    table, server = served
    remote = ek.RowTable.connect(server.address, cache_bytes=20_000, timeout_s=TIMEOUT_S)
    assert (remote.tier, remote.num_rows, remote.row_format, remote.in_memory) == ("remote", NUM_ROWS, table.row_format, False)
    assert remote.fingerprint() == table.fingerprint() and "address='ray://packed'" in repr(remote)
    ids = torch.randint(-1, NUM_ROWS, (50, 9), generator=torch.Generator().manual_seed(1))
    want = ek.gather_rows(table, ids)
    for _ in range(2):
        assert torch.equal(ek.gather_rows(remote, ids).view(torch.int16), want.view(torch.int16))
    back = torch.arange(NUM_ROWS - 1, -1, -1)
    assert torch.equal(remote.read_rows(back)[0], table.read_rows(back)[0])
    stats = remote.io_stats()
    assert stats["cache_hits"] > 0 and stats["rows"] == stats["cache_hits"] + stats["remote_rows"]
    assert stats["address"] == server.address and "io" not in stats
    again = pickle.loads(pickle.dumps(remote))
    assert again.address == server.address and torch.equal(again.read_rows(ids.abs())[0], table.read_rows(ids.abs())[0])


@pytest.mark.parametrize("staged", [False, True], ids=["cpu", "to_a_device"])
def test_ray_rows_prefetched(staged, served):
    from engine_faults import faulty_engine
    table, server = served
    remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
    engine = faulty_engine(1, staged) if staged else None
    cache_bytes = 1 << 16 if staged else 0
    with ek.RowPrefetcher(remote, depth=3, cache_bytes=cache_bytes, _engine=engine) as pf:
        requests = [torch.randint(-1, NUM_ROWS, (400,), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
        tickets = [pf.submit(ids) for ids in requests[:3]]
        for i, ids in enumerate(requests):
            rows = pf.wait(tickets[i], timeout_s=TIMEOUT_S)
            assert torch.equal(rows.view(torch.int16), ek.gather_rows(table, ids).view(torch.int16))
            if i + 3 < len(requests):
                tickets.append(pf.submit(requests[i + 3]))
        stats = pf.stats()
        assert stats["hits"]["remote"] > 0 and stats["hits"]["file"] == 0 and stats["policy"] == stats["tier"] == "remote"


@pytest.mark.parametrize(("row_format", "num_actors", "in_memory"), [
    ("int8_group32", 2, False), ("fp8_e4m3_tensor", 1, True), ("fp8_e4m3_row", 1, True)])
def test_ray_rows_of_a_table_in_memory_and_of_a_file_in_memory(row_format, num_actors, in_memory, cluster, tmp_path):
    """Scales in an array of their own, of each row and one for all."""
    rows, scales = random_rows(row_format, 501, ROW_DIM, torch.Generator().manual_seed(0))
    table = ek.RowTable.from_tensor(rows, scales, row_format)
    source = ek.RowTable.create(tmp_path / "t", rows, scales, row_format) if in_memory else table
    with ek.serve_rows(source, num_actors, name=row_format, in_memory=in_memory, timeout_s=TIMEOUT_S) as server:
        remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
        ids = torch.randint(0, 501, (300,), generator=torch.Generator().manual_seed(1))
        assert torch.equal(ek.gather_rows(remote, ids), ek.gather_rows(table, ids))


def test_ray_rows_a_killed_actor_comes_back(served):
    """Requests in between fail on their own tickets, by an error that names the actor and its rows."""
    table, server = served
    remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
    ids, second = torch.arange(100), torch.arange(NUM_ROWS - 100, NUM_ROWS)
    with ek.RowPrefetcher(remote, depth=4) as pf:
        pid = ray.get(server.actors[1].describe.remote())["process"]
        os.kill(pid, signal.SIGKILL)
        until, failed = time.monotonic() + TIMEOUT_S, 0
        while True:
            tickets = [pf.submit(x, timeout_s=None) for x in (ids, second)]
            rows = pf.wait(tickets[0], timeout_s=TIMEOUT_S)  # of the other actor
            assert torch.equal(rows.view(torch.int16), ek.gather_rows(table, ids).view(torch.int16))
            try:
                rows = pf.wait(tickets[1], timeout_s=TIMEOUT_S)
                assert torch.equal(rows.view(torch.int16), ek.gather_rows(table, second).view(torch.int16))
                if failed:
                    break
            except ConnectionError as err:
                assert "ray://packed: actor 'rows/packed/1' (rows [1500, 3000)) did not answer" in str(err)
                failed += 1
            assert time.monotonic() < until
            time.sleep(0.1)
        assert pf.stats()["failed"] == failed and pf.stats()["in_flight"] == 0
    assert ray.get(server.actors[1].describe.remote())["process"] != pid


def test_ray_rows_a_stopped_actor_deadline_cancel_and_close(served):
    """An actor that does not answer: `wait` times out, `cancel` and `close` end the request, a request has a time limit."""
    _, server = served
    remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
    short = ek.RowTable.connect(server.address, timeout_s=1.0)
    pid = ray.get(server.actors[0].describe.remote())["process"]
    os.kill(pid, signal.SIGSTOP)
    try:
        pf = ek.RowPrefetcher(remote, depth=2)
        ticket = pf.submit(torch.arange(10))
        with pytest.raises(TimeoutError, match=f"ticket {ticket} did not arrive in 0.2 s"):
            pf.wait(ticket, timeout_s=0.2)
        begin = time.monotonic()
        assert pf.cancel(ticket)
        ticket = pf.submit(torch.arange(10))
        pf.close()
        assert time.monotonic() - begin < 10
        with pytest.raises(TimeoutError, match=r"actor 'rows/packed/0' \(rows \[0, 1500\)\) did not answer in 1.0 s"):
            short.read_rows(torch.arange(10))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert remote.read_rows(torch.arange(10))[0].shape[0] == 10


def test_ray_rows_the_wrong_table_is_refused(served, tmp_path):
    table, server = served
    with pytest.raises(ValueError, match="serves a table with fingerprint .*, expected 0123"):
        ek.RowTable.connect(server.address, fingerprint="0123")
    with pytest.raises(ConnectionError, match="ray://nobody: there is no actor 'rows/nobody/0'"):
        ek.RowTable.connect("ray://nobody")
    for address in ("ray:packed", "http://packed", "ray://", 5):
        with pytest.raises(ValueError, match="expected 'ray://NAME' or 'mooncake://HOST:PORT/NAME'"):
            ek.RowTable.connect(address)
    with pytest.raises(ValueError, match="num_actors is 0"):
        ek.serve_rows(table, 0)
    with pytest.raises(OSError, match="no/such"):
        ek.serve_rows(tmp_path / "no/such")
    with pytest.raises(ValueError, match="name is 'packed', expected another"):
        ek.serve_rows(table, name="packed")


def test_ray_rows_of_another_table_by_the_same_name(cluster):
    """A server that ends and another one after it: an old table has an error, never the new rows."""
    tables = [ek.RowTable.from_tensor(torch.full((3, ROW_DIM), float(i)), row_format="f32") for i in range(2)]
    remote = None
    for table in tables:
        with ek.serve_rows(table, 1, name="again", timeout_s=TIMEOUT_S) as server:
            if remote is None:
                remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
                assert torch.equal(remote.read_rows(torch.arange(3))[0], table.rows)
                continue
            with pytest.raises(ConnectionError, match="'rows/again/0' .*did not answer: "):
                remote.read_rows(torch.arange(3))
            with pytest.raises(ValueError, match=f"expected {tables[0].fingerprint()}: it is"):
                pickle.loads(pickle.dumps(remote))


def test_ray_rows_after_a_fork_and_in_threads(served):
    from prefetch_cases import exit_status
    table, server = served
    remote = ek.RowTable.connect(server.address, timeout_s=TIMEOUT_S)
    ids = torch.arange(0, NUM_ROWS, 7)
    want = table.read_rows(ids)[0]

    def child():
        with pytest.raises(RuntimeError, match="connected before a fork"):
            remote.read_rows(ids)
        os._exit(0)
    assert exit_status(child) == 0
    wrong = []

    def read():
        for _ in range(5):
            if not torch.equal(remote.read_rows(ids)[0], want):
                wrong.append(1)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not wrong and not any(thread.is_alive() for thread in threads)
