"""bench_recycle on a tiny model: every case runs, is right, and becomes a row."""

import csv

from support.recycling import tiny_vit

from benchmarks import bench_recycle


def test_every_case_becomes_rows(tmp_path, capsys):
    path = tmp_path / "recycle.csv"
    argv = ["--rounds", "1", "--images", "1", "2", "--csv", str(path)]
    bench_recycle.main(argv, make=tiny_vit)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "timed" and float(row["ms_p50"]) > 0 for row in rows)
    found = [(row["direction"], row["impl"]) for row in rows]
    batched = ("lora_fused", "lora_fused one at a time", "merged one at a time")
    batched += ("no adapters, in one batch",)
    dropped = ("whole images", "0% dropped", "25% dropped", "50% dropped", "75% dropped")
    cases = [("invert", batched)] * 2 + [("invert pruned", dropped), ("distil", dropped)]
    assert found == [(case, name) for case, names in cases for name in names]
    whole = [row for row in rows if row["impl"] == "0% dropped"]
    assert all(float(row["max_error"]) == 0 for row in whole), "the unpruned network itself"
    assert "x as fast" in capsys.readouterr().out
