"""Fully trained modules (PEFT's modules_to_save): each row runs its own adapter's copy.

A module is taken where its tensors lie: a head of several layers is served layer by layer, which is
the same computation row by row.
"""

import functools
from collections import defaultdict
from collections.abc import Container

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid, shape
from lora_fused.mixture import Route
from lora_fused.nn.routing import Routing, Saved, Site, check_forward, check_rows


def owners(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path -> parameter name -> tensor."""
    table: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path, tensor in tensors.items():
        module, _, leaf = path.rpartition(".")
        table[module][leaf] = tensor
    return dict(table)


def saved_of(
    op: str,
    bank: AdapterBank,
    modules: dict[str, nn.Module],
    policy: str,
    known: Container[int] = (),
) -> list[Saved]:
    """The bank's saved tensors but for those of ids ``known``; refused if the policy is "error".

    PEFT adds the base weights of adapted embeddings and heads to a file. Modules whose tensors are
    all equal to the model's own are such copies, which nobody trained.
    """
    if policy == "ignore":
        return []
    found, refused = [], {}
    for adapter, tensors in bank.saved.items():
        if id(tensors) in known:
            continue
        differing = {
            name: text
            for name, leaves in owners(tensors).items()
            if (text := _difference(leaves, modules.get(name)))
        }
        trained = {p: t for p, t in tensors.items() if p.rpartition(".")[0] in differing}
        found.append(Saved(tensors, trained))
        if differing:
            refused[adapter] = [f"{name} ({differing[name]})" for name in sorted(differing)]
    if refused and policy == "error":
        rule = "have no saved modules (pass saved_modules='ignore' or 'apply')"
        raise invalid(op, "bank", rule, refused)
    return found


def _difference(leaves: dict[str, Tensor], module: nn.Module | None) -> str | None:
    """How a module's saved tensors differ from its own; None if they do not."""
    if module is None:
        return "the model has none"
    own = _own(module)
    for leaf, tensor in leaves.items():
        mine = own.get(leaf)
        if mine is None:
            return f"the model's has no {leaf}"
        if mine.shape != tensor.shape:
            return f"{leaf} is {shape(tensor)}, the model's {shape(mine)}"
        if mine.is_meta or mine.is_floating_point() != tensor.is_floating_point():
            return f"{leaf} is {tensor.dtype}, the model's {mine.dtype} on {mine.device}"
        # In the narrower dtype: a model, or a file, may have been rounded since.
        narrow = min(mine.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        mine, tensor = mine.detach().to(narrow), tensor.to(mine.device, narrow)
        if not torch.equal(mine, tensor):
            gap = (mine.float() - tensor.float()).abs().max().item()
            return f"{leaf} differs by up to {gap:.3g}"
    return None


def check_saved(
    op: str, bank: AdapterBank, saved: list[Saved], modules: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Check the bank's saved modules against the model's; return those that have copies."""
    found = {}
    for adapter, each in zip(bank.saved, saved, strict=True):
        for name, leaves in owners(each.trained).items():
            what = f"saved module {name!r} of adapter {adapter!r}"
            if name not in modules:
                raise invalid(op, what, "be a module of the model", "none of that name")
            if name == "":
                raise invalid(op, what, "be a submodule", "the model itself")
            if name in bank.stacks:
                rule = "not be adapted as well, unless it equals the model's own"
                raise invalid(op, what, rule, _difference(leaves, modules[name]))
            module = found[name] = modules[name]
            check_forward(op, what, name, modules)
            own = _own(module)
            if leaves.keys() != own.keys():
                raise invalid(op, what, f"have the tensors {sorted(own)}", sorted(leaves))
            for leaf, tensor in leaves.items():
                if tensor.shape != own[leaf].shape:
                    rule = f"have {leaf} of the model's shape {shape(own[leaf])}"
                    raise invalid(op, what, rule, shape(tensor))
                if tensor.is_floating_point() != own[leaf].is_floating_point():
                    rule = f"have {leaf} of the model's kind {own[leaf].dtype}"  # quantised, say
                    raise invalid(op, what, rule, tensor.dtype)
    return found


def saved_rows(routing: Routing, route: Route) -> dict[int | None, Tensor | None]:
    """Which rows run which adapter's saved modules: position in ``routing.saved`` (None: the
    model's own modules) -> row numbers, None for all rows."""
    bank = routing.bank
    names = {bank.id(name): name for name in bank.names}
    table = [{k for k in ids if k in names} for ids in route.adapter_ids.tolist()]
    position = {id(saved.tensors): i for i, saved in enumerate(routing.saved)}
    picks = [
        _pick(routing, position, [names[k] for k in sorted(ids)], row)
        for row, ids in enumerate(table)
    ]
    if len(set(picks)) <= 1:
        return {picks[0] if picks else None: None}
    if route.row_mixture is not None:
        picks = [picks[m] for m in route.row_mixture.tolist()]
    if route.per == "token":
        rule = "be per='sample' to apply saved modules"
        raise invalid("mix", "mixture", rule, "per='token' with saved modules")
    device = route.adapter_ids.device
    return {
        pick: torch.tensor([row for row, p in enumerate(picks) if p == pick], device=device)
        for pick in dict.fromkeys(picks)
    }


def _pick(routing: Routing, position: dict[int, int], names: list[str], row: int) -> int | None:
    found = {name: routing.bank.saved[name] for name in names if name in routing.bank.saved}
    late = next((name for name, tensors in found.items() if id(tensors) not in position), None)
    if late is not None:
        raise RuntimeError(
            f"mix: adapter {late!r} must have been in the bank when it was attached, for it has "
            "saved modules, got one added since; detach and attach again"
        )
    picks = {name: position[id(tensors)] for name, tensors in found.items()}
    picks = {name: at for name, at in picks.items() if routing.saved[at].trained}
    if picks and len(names) > 1:
        rule = f"name one adapter, for {list(picks)} have saved modules (or attach with 'ignore')"
        raise invalid("mix", f"mixture row {row}", rule, names)
    return next(iter(picks.values()), None)


class SavedLayer:
    """What a module's class gains: rows of an adapter with a copy of the module run that copy.

    Attributes (both absent from state_dict):
        lora_saved: a module whose buffers ``<position>_<parameter>`` are the copies.
        lora_site: as in MixtureLayer.
    """

    lora_site: Site | None = None

    def forward(self, x: Tensor) -> Tensor:
        name, routing = self.lora_site
        if not torch.compiler.is_compiling():
            routing.watch(name)
        active = routing.active
        batch = x.shape if x.dim() > 1 or isinstance(self, nn.Embedding) else torch.Size()
        rows: dict[int | None, list[Tensor | None]] = defaultdict(list)
        for position, index in (active.saved_rows or {None: None}).items():
            rows[position if position in self.lora_held else None].append(index)
        if len(rows) == 1:
            (position,) = rows
            if rows[position][0] is not None:
                check_rows(name, active.route, batch)
            return self._run(position, x)
        check_rows(name, active.route, batch)
        order = [torch.cat(parts).to(x.device) for parts in rows.values()]
        outs = [self._run(position, x[at]) for position, at in zip(rows, order, strict=True)]
        return torch.cat(outs)[torch.cat(order).argsort()]

    def _run(self, position: int | None, x: Tensor) -> Tensor:
        if position is None:
            return super().forward(x)
        base = type(self).__mro__[2]
        twin = base.__new__(base)  # this module with other tensors
        vars(twin).update(vars(self))
        for kind in ("_parameters", "_buffers"):
            copies = {leaf: self._copy(position, leaf, t) for leaf, t in vars(self)[kind].items()}
            vars(twin)[kind] = copies
        return twin.forward(x)

    def _copy(self, position: int, leaf: str, own: Tensor | None) -> Tensor | None:
        return getattr(self.lora_saved, f"{position}_{leaf}", own)


def equip(module: nn.Module, name: str, routing: Routing) -> None:
    """Turn a module into a SavedLayer in place, with copies in the module's dtype and device."""
    own = {**module._parameters, **module._buffers}
    held = nn.Module()
    positions = []
    for position, saved in enumerate(routing.saved):
        leaves = owners(saved.trained).get(name, {})
        if leaves:
            positions.append(position)
        for leaf, tensor in leaves.items():
            held.register_buffer(f"{position}_{leaf}", tensor.to(own[leaf]), persistent=False)
    module.__class__ = _saved_class(type(module))
    module.lora_saved, module.lora_held = held, frozenset(positions)
    module.lora_site = Site(name, routing)


@functools.cache
def _saved_class(base: type) -> type:
    return type(f"Saved{base.__name__}", (SavedLayer, base), {"__doc__": SavedLayer.__doc__})


def _own(module: nn.Module) -> dict[str, Tensor]:
    skip = module._non_persistent_buffers_set
    buffers = {n: t for n, t in module.named_buffers(recurse=False) if n not in skip}
    return {**dict(module.named_parameters(recurse=False)), **buffers}
