"""kill -9 during a bulk add, fifty times: nothing committed is lost, and the library goes on."""

import itertools
import multiprocessing
import os
import random
import signal
import time

import torch
from support.models import adapter

from lora_fused.library import AdapterLibrary
from lora_fused.methods.rpe import Prototypes

KILLS, BATCH, SIZE = 50, 3, 6


def entry(i: int):
    return adapter(f"a{i:05}", seed=i, rank=1 + i % 3)


def bulk_add(uri: str, first: int, pipe) -> None:
    """Add without end; tell how many are in after each commit has returned."""
    torch.set_num_threads(1)
    library = AdapterLibrary.open(uri)
    for start in itertools.count(first, 300):
        adapters = [entry(i) for i in range(start, start + 300)]
        vectors = torch.stack([torch.full((SIZE,), float(i)) for i in range(start, start + 300)])
        names = tuple(one.name for one in adapters)
        made = Prototypes(names, vectors, counts=torch.full((300,), 10))

        def told(done, total, start=start):
            pipe.send(start + done)

        pipe.send(start)
        library.add_many(adapters, made, batch=BATCH, progress=told)


def killed_adding(processes, uri: str, first: int, draw: random.Random) -> int:
    """Start a bulk add, kill it some commits later, at any moment of one; what it said is in."""
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=bulk_add, args=(uri, first, theirs), daemon=True)
    child.start()
    theirs.close()
    reported, took = ours.recv(), 0.1  # it is about to write
    for _ in range(draw.randrange(4)):
        began = time.monotonic()
        reported = ours.recv()
        took = time.monotonic() - began
    time.sleep(draw.uniform(0, took))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, "it was killed, and did not fail"
    try:
        while True:
            reported = ours.recv()
    except EOFError:
        return reported


def test_fifty_kills_lose_nothing(empty):
    # Forked from a process that has imported the engine and not used it: 50 imports take minutes.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lancedb", "lora_fused.library", "support.models"])
    draw, count, caught = random.Random(0), 0, 0
    for kill in range(KILLS):
        reported = killed_adding(processes, empty.uri, count, draw)
        library = AdapterLibrary.open(empty.uri)
        names = library.names
        assert len(names) >= reported, f"kill {kill} lost a committed entry"
        assert len(names) % BATCH == 0, "a batch is in or not"
        assert names == [f"a{i:05}" for i in range(len(names))]
        assert library.verify(progress=False) == []
        records = os.path.getsize(os.path.join(empty.uri, "weights", "0", "index")) / 16
        caught += records > library.entry(names[-1]).record + 1 if names else 0
        count = len(names)
    assert count >= KILLS and caught, f"{caught} kills between weights and commit"
    library.add(entry(count), torch.zeros(SIZE), counts=10)
    library.compact()
    again = AdapterLibrary.open(empty.uri)
    assert len(again) == count + 1 and again.verify(progress=False) == []
    last = again.adapter(f"a{count:05}").modules["up"]
    assert torch.equal(last.lora_a, entry(count).modules["up"].lora_a)
