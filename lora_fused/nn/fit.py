"""Whether a bank fits a model: everything that attach checks before it changes anything."""

import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import torch
from torch import nn

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.backends import choose
from lora_fused.checks import invalid, some
from lora_fused.methods.basis import SharedBasis
from lora_fused.methods.subspace import Subspace
from lora_fused.nn.linear import layer_class, layer_sizes, unsupported
from lora_fused.nn.routing import check_forward, holder

_OP = "attach"
_SELECTION = "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern"


def check_words(saved_modules: str, missing: str, impl: str) -> None:
    """Check attach's options of fixed words."""
    words = {
        "saved_modules": (saved_modules, ("error", "ignore", "apply")),
        "missing": (missing, ("error", "warn", "ignore")),
    }
    for label, (word, known) in words.items():
        if word not in known:
            rule = f"be {known[0]!r}, {known[1]!r} or {known[2]!r}"
            raise invalid(_OP, label, rule, repr(word))
    choose(_OP, impl, torch.device("cpu"), torch.float32)


def parts_of(bank: object) -> tuple[AdapterBank, dict[str, SharedBasis] | None]:
    """The adapters of what attach was given and, of a subspace, its bases."""
    if isinstance(bank, AdapterBank):
        return bank, None
    if not isinstance(bank, Subspace):
        rule = "be an AdapterBank or a Subspace (of clusters: one of their parts)"
        raise invalid(_OP, "bank", rule, type(bank).__name__)
    for name, stack in bank.cores.stacks.items():
        if name not in bank.bases:
            rule = "have a basis for every module of its cores"
            raise invalid(_OP, "subspace", rule, f"none for {name!r}")
        basis = bank.bases[name]
        wanted = len(basis.a), len(basis.b)
        if (stack.in_features, stack.out_features) != wanted:
            got = (stack.in_features, stack.out_features)
            rule = f"have the sizes (P, P) = {wanted} of its bases"
            raise invalid(_OP, f"cores of {name!r}", rule, got)
    return bank.cores, bank.bases


def chooser(
    bank: AdapterBank, modules: Iterable[str] | Callable[[str], bool] | None
) -> Callable[[str], bool]:
    """attach's ``modules`` as a predicate."""
    if modules is None:
        return lambda name: True
    if callable(modules):
        return modules
    if isinstance(modules, str):
        raise invalid(_OP, "modules", "be a list of names or a function of a name", repr(modules))
    names = set(modules)
    unknown = [name for name in names if name not in bank.stacks]
    if unknown:
        close = get_close_matches(str(unknown[0]), bank.modules, n=3, cutoff=0.5)
        rule = f"name modules of the bank (close: {', '.join(map(repr, close)) or 'none'})"
        raise invalid(_OP, "modules", rule, repr(unknown[0]))
    return names.__contains__


def targets(
    bank: AdapterBank,
    modules: dict[str, nn.Module],
    wanted: Callable[[str], bool],
    bases: dict[str, SharedBasis] | None = None,
) -> dict[str, nn.Module]:
    """The model's modules under those of the bank's names that are wanted, each checked."""
    names = [name for name in bank.stacks if wanted(name)]
    if not names:
        raise invalid(_OP, "modules", "take in a module of the bank", "none of them")
    check_present(names, modules, "the bank")
    for name in names:
        basis = None if bases is None else bases[name]
        _check_target(f"module {name!r}", modules[name], bank.stacks[name], basis)
        check_forward(_OP, f"module {name!r}", name, modules)
        if holder(bank.stacks[name]) is not None:
            rule = "be attached to one model at a time (bank.subset(bank.names) is a copy)"
            raise invalid(_OP, "bank", rule, f"one whose {name!r} another model holds")
    return {name: modules[name] for name in names}


def check_distinct(layers: dict[str, nn.Module], op: str = _OP) -> None:
    """Check that no module stands under two of the names."""
    first: dict[int, str] = {}
    for name, module in layers.items():
        other = first.setdefault(id(module), name)
        if other != name:
            rule = "be adapted under one name"
            raise invalid(op, f"module {name!r}", rule, f"the same module as {other!r}")


def _check_target(
    what: str, module: nn.Module, stack: AdapterStack, basis: SharedBasis | None
) -> None:
    if layer_class(module) is None:
        raise invalid(_OP, what, *unsupported(module))
    embedding = isinstance(module, nn.Embedding)
    wanted = (stack if basis is None else basis).embedding
    if embedding != wanted:
        kinds = ("a linear layer", "an embedding")
        rule = f"be {kinds[wanted]}, as the bank's adapters of it are"
        raise invalid(_OP, what, rule, kinds[embedding])
    if embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        raise invalid(_OP, what, "have no max_norm and no scale_grad_by_freq", module)
    if stack.row_start is None and embedding:
        raise invalid(_OP, what, "have a packed stack", "a slotted one")
    sizes = (stack.in_features, stack.out_features)
    if basis is not None:
        sizes = (basis.basis_a.shape[1], basis.basis_b.shape[1])
    if layer_sizes(module) != sizes:
        rule = f"have the adapters' in and out features {sizes}"
        raise invalid(_OP, what, rule, layer_sizes(module))


def check_present(
    names: list[str], modules: dict[str, nn.Module], whose: str, op: str = _OP
) -> None:
    """Check that all names are modules; the error says which are not, and close ones that are."""
    unknown = [name for name in names if name not in modules]
    if not unknown:
        return
    known = [name for name, module in modules.items() if layer_class(module) is not None]
    lines = []
    for name in unknown[:5]:
        close = get_close_matches(name, known, n=2, cutoff=0.5)
        lines.append(f"{name!r} (close: {', '.join(map(repr, close)) or 'none'})")
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    got = f"no {', '.join(lines)}{more}"
    raise invalid(op, "model", f"have every module of {whose}", got)


def check_base(bank: AdapterBank, model: nn.Module, op: str = _OP) -> None:
    """Warn of adapters whose config names another base model than this one."""
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    found = _parts(path)
    if not found:
        return
    others: dict[str, list[str]] = {}
    for name in bank.names:
        base = (bank.metadata[name].get("config") or {}).get("base_model_name_or_path")
        if _parts(base) and _parts(base)[-1] not in found:
            others.setdefault(base, []).append(name)
    for base, names in others.items():
        _warn(f"the model is {path!r}, but {base!r} is the base of {_list(names)}", op)


def _parts(path: object) -> list[str]:
    """What a model path may be called by: its last component, or the name in a hub cache."""
    parts = [part for part in re.split(r"[/\\]", path) if part] if isinstance(path, str) else []
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return cached[-1:] or parts[-1:]


def check_missing(
    bank: AdapterBank, modules: dict[str, nn.Module], wanted: Callable[[str], bool], policy: str
) -> None:
    """Find modules that an adapter's config targets and that it has no factors for.

    A gap, where the adapter has the same module of another layer, is an error by default; anything
    else only a warning, for a file may be of the same model without some part (a pooler).
    """
    if policy == "ignore":
        return
    supported = {n: m for n, m in modules.items() if layer_class(m) is not None and wanted(n)}
    found: dict[object, tuple[list[str], list[str]]] = {}
    absent: dict[tuple[str, ...], list[str]] = {}
    for name in bank.names:
        config, k = bank.metadata[name].get("config") or {}, bank.id(name)
        if config.get("target_modules") is None:
            continue
        held = frozenset(module for module, stack in bank.stacks.items() if stack.ranks[k])
        key = held, repr([_sorted(config.get(option)) for option in _SELECTION.split()])
        if key not in found:
            found[key] = _missing(config, held, supported, modules)
        gaps, others = found[key]
        if gaps and policy == "error":
            rule = "have factors for every layer it targets (or pass missing='warn' or 'ignore')"
            raise invalid(_OP, f"adapter {name!r}", rule, f"none for {_list(gaps)}")
        if gaps or others:
            absent.setdefault((*gaps, *others), []).append(name)
    for missing, names in absent.items():
        _warn(f"no factors for {_list(missing)}, targets of {_list(names)}")


def _missing(
    config: dict, held: frozenset[str], supported: dict[str, nn.Module], modules: dict
) -> tuple[list[str], list[str]]:
    """The covered modules without factors: those with a held sibling in another layer, others."""
    from lora_fused.io.config import covers

    taken = {id(modules[name]) for name in held if name in modules}  # under any of its names
    siblings = {_anonymous(name) for name in held}
    gaps, others = [], []
    for name, module in supported.items():
        if id(module) not in taken and covers(config, name):
            (gaps if _anonymous(name) in siblings else others).append(name)
    # "all-linear" spares heads and embeddings, so only its gaps are telling.
    return gaps, [] if config["target_modules"] == "all-linear" else others


def _anonymous(name: str) -> str:
    """A module's path without the numbers of its layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _sorted(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


def _list(names: Iterable[str]) -> str:
    return some(map(repr, names), 5)


def _warn(text: str, op: str = _OP) -> None:
    warnings.warn(f"{op}: {text}", stacklevel=4)
