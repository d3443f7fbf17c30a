"""Modules that a file ought to hold and does not: it would load, and leave them without effect."""

from collections import defaultdict
from collections.abc import Iterable

from lora_fused.io.config import covers

Place = tuple[str, str]  # of a module in a layer: what stands before the layer's number and behind


def gaps(config: dict, modules: Iterable[str]) -> list[str]:
    """Modules that the config selects and that nearly every other layer of the file has.

    A whole layer is missed if it lies between the first and the last one and more than twice as
    many are there as are not: models of mixed layers have attention, say, in a few layers only. A
    module of a layer is missed if all others, three at least, have it, and the layer has nothing
    that they lack (such a layer is of another kind: dense among experts, say). The file cannot
    tell whether it lacks the first or the last layers.
    """
    layers_of: dict[Place, set[int]] = defaultdict(set)
    for module in modules:
        place, layer = _place(module)
        if layer is not None:
            layers_of[place].add(layer)
    stacks: dict[str, set[int]] = defaultdict(set)
    for (before, _), layers in layers_of.items():
        stacks[before] |= layers
    own = {(place[0], *layers) for place, layers in layers_of.items() if len(layers) == 1}
    missing = []
    for (before, behind), layers in layers_of.items():
        there = stacks[before]
        absent = set(range(min(there), max(there))) - there
        lost = absent if 2 * len(absent) < len(there) else set()
        odd = there - layers
        if len(odd) == 1 and len(layers) >= 3 and (before, *odd) not in own:
            lost = lost | odd
        missing += [f"{before}.{layer}.{behind}" for layer in sorted(lost)]
    return [module for module in missing if covers(config, module)]


def _place(module: str) -> tuple[Place, int | None]:
    # The first number is the layer's, as in PEFT; a number at the end is the module's own name.
    parts = module.split(".")
    for at, part in enumerate(parts[1:-1], 1):
        if part.isdecimal():
            return (".".join(parts[:at]), ".".join(parts[at + 1 :])), int(part)
    return (module, ""), None
