"""What the long runs of ``lora-fused recycle`` are given and leave: options, files, records."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_fused.checks import invalid
from lora_fused.cli.console import Reporter

_OP = "recycle"
PRIORS = ("tv", "batchnorm", "tokens", "none")


def check_prior(kind: str, images: str | None) -> None:
    if kind not in PRIORS or (kind == "tokens") != (images is not None):
        rule = f"be one of {PRIORS}, tokens with --prior-images and no other"
        got = repr(kind) + (" without" if images is None else " with")
        raise invalid(_OP, "--prior", rule, got)


def prior_of(kind: str, path: str | None, vision, device: str):
    from lora_fused.cli.recycle_images import open_images
    from lora_fused.methods import recycle

    if kind == "batchnorm":
        return recycle.FeatureStatistics.of_batchnorm(vision.model)
    if kind == "tokens":
        data = open_images(path)
        batches = list(data.batches(vision.prepare, 64))
        return recycle.FeatureStatistics.of_tokens(vision.model, torch.cat(batches).to(device))
    return recycle.TotalVariation() if kind == "tv" else None


def ratios_of(text: str | None) -> dict[int, float] | None:
    if text is None:
        return None
    try:
        pairs = [part.split(":") for part in text.split(",")]
        ratios = {int(block): float(share) for block, share in pairs}
    except ValueError:
        rule = "be pairs of block:share with commas between, as in 1:0.5,3:0.5"
        raise invalid(_OP, "--prune", rule, repr(text)) from None
    if len(ratios) != len(pairs):
        raise invalid(_OP, "--prune", "name each block once", repr(text))
    return ratios


def checkpoint_of(path: str | None, resume: bool):
    from lora_fused.io import Checkpoint

    if path is None:
        if resume:
            raise invalid(_OP, "--resume", "come with --checkpoint", "none")
        return None
    if Path(path).exists() and not resume:
        raise FileExistsError(f"{_OP}: {path} exists (--resume goes on from it)")
    return Checkpoint(path)


def check_files(overwrite: bool, *paths: str | None) -> None:
    """Before anything is read: what could not be written would be lost at the end."""
    named = [Path(path).resolve() for path in paths if path is not None]
    if len(set(named)) < len(named):
        raise invalid(_OP, "files to write", "have names of their own", list(map(str, named)))
    for path in paths:
        if path is not None and Path(path).is_dir():
            raise IsADirectoryError(f"{_OP}: {path} is a folder, not a file")
        if path is not None and Path(path).exists() and not overwrite:
            raise FileExistsError(f"{_OP}: {path} exists (--overwrite replaces it)")


def check_pool(pool, vision, path: str) -> None:
    """The pool's images must be in the model's scaling: those of another one are refused."""
    ends = (pool.images.amin((0, 2, 3)), pool.images.amax((0, 2, 3)))
    slack = 1e-4 * (vision.white - vision.black)
    fits = len(ends[0]) == len(vision.black)
    if not fits or (ends[0] < vision.black - slack).any() or (ends[1] > vision.white + slack).any():
        rule = f"hold images that the model can take ({vision.black.tolist()} to "
        rule += f"{vision.white.tolist()} per channel)"
        raise invalid(_OP, f"pool {path}", rule, f"{ends[0].tolist()} to {ends[1].tolist()}")


def write_record(path: str | Path, record: dict, result: dict) -> None:
    from lora_fused import __version__

    content = {**record, "result": result, "lora_fused": __version__}
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


@contextmanager
def timed(reporter: Reporter, label: str) -> Iterator[list[float]]:
    """Say what begins and how long it took; on a terminal the method itself shows step and loss."""
    reporter.say(f"{label} ...")
    start, clock = time.perf_counter(), [0.0]
    yield clock
    clock[0] = round(time.perf_counter() - start, 1)
    reporter.say(f"{label}: {clock[0]} s")
