"""The catalogue on an object store, served on loopback: two clients, one library."""

import importlib.util
import secrets
import threading
import urllib.request

import pytest
import torch
from support.models import adapter

from lora_fused.library import AdapterLibrary


@pytest.fixture
def place(tmp_path):
    """Where a library can be: its address, the folder of its weights, the options to reach it."""
    if any(importlib.util.find_spec(name) is None for name in ("moto", "flask", "flask_cors")):
        pytest.skip("no object store to run: pip install 'moto[s3]' flask flask-cors")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        bucket = f"bucket-{secrets.token_hex(4)}"  # one memory serves all servers of a process
        with urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")):
            pass
        options = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        options |= {"aws_region": "us-east-1", "endpoint": address, "allow_http": "true"}
        uri = f"s3://{bucket}/library"
        yield {"uri": uri, "store": tmp_path / "weights", "storage_options": options}
    finally:
        server.stop()


def test_two_clients_share_a_library(place, base, make):
    adapters, prototypes = make(5)
    with pytest.raises(FileNotFoundError, match="holds no library"):
        AdapterLibrary.open(**place)
    one = AdapterLibrary.create(base=base, size=6, **place)
    with pytest.raises(FileExistsError, match="holds a library already"):
        AdapterLibrary.create(base=base, size=6, **place)
    other = AdapterLibrary.open(base=base, **place)
    one.add_many(adapters, prototypes, batch=2, tags=["first"], progress=False)
    assert len(other) == 0
    other.refresh()
    assert other.names == [a.name for a in adapters]
    nearest = other.search(prototypes.vectors, k=1, tags=["first"])
    assert [hit.names[0] for hit in nearest] == other.names
    other.update("a0003", prototypes=torch.ones(2, 6), counts=[10, 10])
    one.remove(["a0004"])
    assert one.entry("a0003").counts == (10, 10) and len(one) == 4
    assert one.load(one.names).names == ["a0000", "a0001", "a0002", "a0003"]
    one.compact()
    other.refresh()
    assert other.verify(progress=False) == [] == one.verify(progress=False)


def test_concurrent_commits_on_an_object_store(place, base):
    AdapterLibrary.create(base=base, size=6, **place)
    failures = []

    def add(number: int) -> None:
        try:
            client = AdapterLibrary.open(**place)
            for i in range(4):
                name = f"w{number}-{i}"
                client.add(adapter(name, seed=10 * number + i), torch.zeros(6), counts=10)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=add, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library = AdapterLibrary.open(**place)
    assert failures == [] and len(library) == 12
    assert library.verify(progress=False) == []


def test_weights_must_have_a_folder(base):
    with pytest.raises(ValueError, match="store must be the folder of the weights"):
        AdapterLibrary.create("s3://bucket/library", base=base, size=6)
