"""The prefetcher on a GPU: every policy, stream order, graphs, errors that the device finds, many threads. `make test-gpu`."""
import random
import threading

import pytest
import torch

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.capacity import CapacityError
from engram_kernels.prefetch.row_prefetcher import PrefetchQueueFull
from engram_kernels.prefetch.runtime import RuntimeOptions, check_room_of_cache
from engram_kernels.testing import random_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NUM_ROWS, ROW_DIM, TIMEOUT_S = 5000, 256, 60
POLICIES = ("staged", "staged_cached", "uva_pinned", "device", "file", "file_cached")
CACHE_BYTES = 1500 * ROW_DIM  # of the cached ones: a part of the table
FORMATS = ("bf16", "f32", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32")


def make_table(policy, path, row_format="fp8_e4m3_block32_packed"):
    """(the table in host memory that is the truth, the table of the policy)"""
    rows, scales = random_rows(row_format, NUM_ROWS, ROW_DIM, torch.Generator().manual_seed(0))
    options = dict(row_format=row_format, row_dim=ROW_DIM if row_format.endswith("packed") else None)
    truth = RowTable.from_tensor(rows, scales, **options)
    if policy.startswith("file"):
        return truth, RowTable.create(path, rows, scales, row_format, row_dim=options["row_dim"])
    move = {"device": torch.Tensor.cuda, "uva_pinned": torch.Tensor.pin_memory}.get(policy, torch.Tensor.clone)
    return truth, RowTable.from_tensor(move(rows), None if scales is None else move(scales), **options)


def make_ids(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, NUM_ROWS, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, ids % 7, ids)


def prefetcher(table, policy, **options):
    options = {"ring_bytes": 64 << 20, "staging_bytes": 1 << 20, **options}  # large requests take several blocks
    if policy.endswith("cached"):
        options.setdefault("cache_bytes", CACHE_BYTES)
    return RowPrefetcher(table, "cuda", policy=policy.partition("_")[0], **options)


@pytest.fixture(params=POLICIES)
def policy(request):
    return request.param


@pytest.mark.parametrize("row_format", FORMATS)
def test_prefetch_device_equals_gather_rows(row_format, policy, tmp_path):
    truth, table = make_table(policy, tmp_path / "t", row_format)
    with prefetcher(table, policy) as pf:
        for shape in ((4, 24), (0,), (1,), (9000,)):
            ids = make_ids(*shape)
            want = gather_rows(truth, ids)
            for wanted in (ids, ids.int(), ids.cuda(), ids.int().cuda()):
                rows = pf.wait(pf.submit(wanted), timeout_s=TIMEOUT_S)
                assert rows.is_cuda
                torch.testing.assert_close(rows.cpu(), want, rtol=0, atol=0, equal_nan=True)
        stats = pf.stats()
    assert stats["policy"] == policy.partition("_")[0] and stats["failed"] == 0
    assert (stats["unique"] < stats["requested"]) == policy.startswith(("staged", "file"))
    assert (stats["hits"]["device_cache"] > 0) == policy.endswith("cached")


def test_prefetch_device_wait_does_not_block_and_is_ordered(policy, tmp_path):
    """The caller's stream is behind: neither submit nor wait may wait for it, and rows that it has yet to read must stay."""
    truth, table = make_table(policy, tmp_path / "t")
    requests = [make_ids(200, seed=s) for s in range(12)]
    on_device = [ids.cuda() for ids in requests]
    out = [torch.empty(200, ROW_DIM, dtype=torch.bfloat16, device="cuda") for _ in requests]
    stream = torch.cuda.Stream()
    with prefetcher(table, policy, depth=2) as pf, torch.cuda.stream(stream):
        pf.wait(pf.submit(on_device[0]), timeout_s=TIMEOUT_S)
        torch.cuda.synchronize()
        for i, ids in enumerate(on_device):
            ticket = pf.submit(requests[i] if policy.startswith(("staged", "file")) else ids)
            torch.cuda._sleep(20_000_000)
            rows = pf.wait(ticket, timeout_s=TIMEOUT_S)
            out[i].copy_(rows)
        assert not stream.query(), "the calls waited for the stream"
        stream.synchronize()
    for got, ids in zip(out, requests, strict=True):
        torch.testing.assert_close(got.cpu(), gather_rows(truth, ids), rtol=0, atol=0)


def test_prefetch_device_ids_of_the_current_stream(policy, tmp_path):
    """Ids that are made late on the caller's stream are the ones that are read."""
    truth, table = make_table(policy, tmp_path / "t")
    ids, late = torch.zeros(300, dtype=torch.int64, device="cuda"), make_ids(300)
    source = late.cuda()
    with prefetcher(table, policy) as pf, torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        ids.copy_(source)
        rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S).cpu()
    torch.testing.assert_close(rows, gather_rows(truth, late), rtol=0, atol=0)


def test_prefetch_device_ids_outlive_their_gather(tmp_path):
    """Made on one stream, waited for on another: their memory is not given out again before they were read."""
    _, table = make_table("uva_pinned", tmp_path / "t")
    side = torch.cuda.Stream()
    with prefetcher(table, "uva_pinned") as pf:
        with torch.cuda.stream(side):
            ids = make_ids(300).cuda()
            ticket = pf.submit(ids)
        torch.cuda._sleep(500_000_000)
        pf.wait(ticket, timeout_s=TIMEOUT_S)
        at = ids.data_ptr()
        del ids
        with torch.cuda.stream(side):
            assert torch.empty(300, dtype=torch.int64, device="cuda").data_ptr() != at


def test_prefetch_device_ring_is_no_memory_in_use(tmp_path):
    """Torch gives out memory that kernels of the same stream have yet to read; the prefetcher writes on another."""
    _, table = make_table("staged", tmp_path / "t")
    torch.cuda.empty_cache()
    ring_bytes = 64 << 20
    used = torch.full((ring_bytes,), 7, dtype=torch.uint8, device="cuda")
    copy = torch.zeros_like(used)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    copy.copy_(used)
    at = used.data_ptr()
    del used
    with prefetcher(table, "staged", ring_bytes=ring_bytes) as pf:
        assert pf._runtime._ring.address == at
        pf.submit(make_ids(9000))
        pf.drain(TIMEOUT_S)
    assert (copy == 7).all()


@pytest.mark.parametrize("policy", ["uva_pinned", "device"])
def test_prefetch_device_graph_capture(policy, tmp_path):
    """Replays read the ids that are there at that time, into the same rows."""
    truth, table = make_table(policy, tmp_path / "t")
    ids, total = make_ids(64, 24).cuda(), torch.zeros(64, 24, ROW_DIM, device="cuda")
    with prefetcher(table, policy, depth=2) as pf:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)  # warm-up, outside of the graph
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tickets = [pf.submit(ids), pf.submit(ids)]  # two, so that slots are used again inside the graph
            for ticket in (*tickets, None):
                total += pf.wait(ticket if ticket is not None else pf.submit(ids)).float()
        for seed in range(4):
            ids.copy_(make_ids(64, 24, seed=seed))
            total.zero_()
            graph.replay()
            want = gather_rows(truth, ids.cpu()).float()
            torch.testing.assert_close(total.cpu(), want + want + want, rtol=0, atol=0)
        graph.reset()


def test_prefetch_device_refuses_host_work_under_capture(tmp_path):
    _, table = make_table("staged", tmp_path / "t")
    ids = make_ids(5).cuda()
    with prefetcher(table, "staged") as pf:
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="under graph capture the policy must be uva or device"), torch.cuda.graph(graph):
            pf.submit(ids)
    torch.cuda.synchronize()


@pytest.mark.parametrize("policy", ["uva_pinned", "device"])
def test_prefetch_device_bad_ids_are_raised_by_the_next_wait(policy, tmp_path):
    truth, table = make_table(policy, tmp_path / "t")
    good, bad = make_ids(10), make_ids(10)
    bad[3] = NUM_ROWS
    with prefetcher(table, policy) as pf:
        doomed = pf.submit(bad.cuda())
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match=rf"1 ids of ticket {doomed} are outside \[0, {NUM_ROWS}\); their rows are zeros"):
            pf.wait(doomed, timeout_s=TIMEOUT_S)
        with pytest.raises(IndexError, match=r"row_ids\[3\] is 5000"):
            pf.wait(pf.submit(bad), timeout_s=TIMEOUT_S)  # ids in host memory are looked at before
        rows = pf.wait(pf.submit(good.cuda()), timeout_s=TIMEOUT_S)
        torch.testing.assert_close(rows.cpu(), gather_rows(truth, good), rtol=0, atol=0)


def test_prefetch_device_cancel_close_and_full(policy, tmp_path):
    truth, table = make_table(policy, tmp_path / "t")
    with prefetcher(table, policy, depth=2) as pf:
        for i in range(50):
            doomed, ids = pf.submit(make_ids(500, seed=i), timeout_s=TIMEOUT_S), make_ids(30, seed=i)
            assert pf.cancel(doomed)
            rows = pf.wait(pf.submit(ids, timeout_s=TIMEOUT_S), timeout_s=TIMEOUT_S)
            torch.testing.assert_close(rows.cpu(), gather_rows(truth, ids), rtol=0, atol=0)
        pf.drain(TIMEOUT_S)
        tickets = [pf.submit(make_ids(500)) for _ in range(2)]
        with pytest.raises(PrefetchQueueFull):
            pf.submit(make_ids(500))
        assert len(tickets) == 2  # in flight when it closes


def test_prefetch_device_many_threads_each_on_its_stream(policy, tmp_path):
    truth, table = make_table(policy, tmp_path / "t")
    wrong = []

    def run(seed, pf):
        rng = random.Random(seed)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(60):
                    ids = make_ids(rng.randrange(400), seed=seed * 100 + i)
                    out = torch.empty(*ids.shape, ROW_DIM, dtype=torch.bfloat16, device="cuda")
                    pf.wait(pf.submit(rng.choice((ids, ids.cuda())), timeout_s=TIMEOUT_S), out=out, timeout_s=TIMEOUT_S)
                    if not torch.equal(out.cpu().view(torch.int16), gather_rows(truth, ids).view(torch.int16)):
                        wrong.append((seed, i))
        except BaseException as err:
            wrong.append(err)

    with prefetcher(table, policy, depth=5, background=True) as pf:
        threads = [threading.Thread(target=run, args=(seed, pf), daemon=True) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads) and wrong == []


def test_prefetch_device_does_not_grow(policy, tmp_path):
    _, table = make_table(policy, tmp_path / "t")
    ids = make_ids(24)
    with prefetcher(table, policy, depth=2) as pf:
        for i in range(5000):
            if i == 500:
                torch.cuda.synchronize()
                before = torch.cuda.mem_get_info()[0]
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        torch.cuda.synchronize()
        assert before - torch.cuda.mem_get_info()[0] < 1 << 20


@pytest.mark.parametrize("row_format", FORMATS)
def test_prefetch_device_cache(row_format, tmp_path):
    """Hot rows stay on the device and are right while others come and go; what is cached does not cross the bus."""
    truth, table = make_table("staged_cached", tmp_path / "t", row_format)
    generator = torch.Generator().manual_seed(0)
    with prefetcher(table, "staged_cached", depth=3, cache_bytes=1500 * table.row_bytes) as pf:
        pending = []
        for _ in range(200):
            ids = (NUM_ROWS * torch.rand(300, generator=generator) ** 4).long()  # some rows often, all of them at times
            pending.append((pf.submit(ids, timeout_s=TIMEOUT_S), ids))
            if len(pending) == 3:
                ticket, wanted = pending.pop(0)
                rows = pf.wait(ticket, timeout_s=TIMEOUT_S)
                torch.testing.assert_close(rows.cpu(), gather_rows(truth, wanted), rtol=0, atol=0, equal_nan=True)
        stats = pf.stats()
    assert stats["hits"]["device_cache"] > 0.3 * stats["unique"]
    assert stats["moved_bytes"] < 0.8 * (stats["unique"] * table.row_bytes + stats["requested"] * 4)


def test_prefetch_device_cache_cleared_and_too_large(tmp_path):
    _, table = make_table("staged_cached", tmp_path / "t")
    ids = make_ids(500)
    with prefetcher(table, "staged_cached") as pf:
        for _ in range(3):
            table.rows.bitwise_xor_(torch.tensor(1, dtype=torch.uint8))
            pf.clear_cache()
            rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
            torch.testing.assert_close(rows.cpu(), gather_rows(table, ids), rtol=0, atol=0, equal_nan=True)
    large = RowTable.from_tensor(torch.empty(1 << 34, 32, dtype=torch.bfloat16, device="meta"), row_format="bf16")
    with pytest.raises(CapacityError, match=r"a cache of \d+ rows, with ring and staging buffer needs .*, the memory of cuda"):
        check_room_of_cache(RuntimeOptions(large, "staged", torch.device("cuda"), torch.bfloat16, 1, 0, 1 << 20, 1, 0, 0,
                                           cache_bytes=1 << 40))


def test_prefetch_device_auto_and_its_reason(tmp_path):
    for policy, chosen in (("staged", "staged"), ("uva_pinned", "uva"), ("device", "device"), ("file", "file")):
        _, table = make_table(policy, tmp_path / "t")
        with RowPrefetcher(table, "cuda", ring_bytes=1 << 20) as pf:
            assert pf.stats()["policy"] == chosen and pf.stats()["policy_reason"]
            pf.trace(tmp_path / "trace.json")


def test_prefetch_device_uva_wants_pinned_memory(tmp_path):
    _, table = make_table("staged", tmp_path / "t")
    with pytest.raises(ValueError, match="policy 'uva' reads the table's rows where they are, and they are not pinned: call"):
        prefetcher(table, "uva")
