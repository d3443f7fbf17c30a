"""Many adapters of one frozen model: AdapterStack (one layer) and AdapterBank (a model's worth).

The stack is the bank: all adapters of one linear layer lie in two row-packed matrices, one row per
rank component, which kernels read, factorisations factorise and checkpoints store; there is no
second copy. Ids are global to the bank, the same in every stack, and never reused.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_fused.checks import hint, invalid, shape

BASE = "__base__"  # the name that means "no adapter", as in PEFT's mixed batches


@dataclasses.dataclass
class LoraFactors:
    """One adapter's part in one module: the update is scale * lora_b^T lora_a.

    Attributes:
        lora_a: ``[R, I]``; for an embedding ``[R, V]``, V the vocabulary.
        lora_b: ``[R, O]``: B transposed, so that row r of both belongs to rank component r.
        scale: alpha / R, or alpha / sqrt(R) with rsLoRA.
        embedding: the module is an nn.Embedding.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    embedding: bool = False


@dataclasses.dataclass
class Adapter:
    """One adapter as it is read from and written to a file.

    Attributes:
        name: what mixtures call it.
        modules: module path in the base model -> factors.
        saved: tensors of fully trained modules (PEFT's modules_to_save), by their path.
        metadata: whatever must survive a round trip (the original config, dtypes, source path).
    """

    name: str
    modules: dict[str, LoraFactors]
    saved: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metadata: dict = dataclasses.field(default_factory=dict)


def peft_config(
    target_modules: Sequence[str] | str,
    rank: int,
    alpha: float,
    *,
    base: str | None = None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
    use_rslora: bool = False,
) -> dict:
    """The PEFT config of an adapter that no file gave one, for ``Adapter.metadata["config"]``.

    lora_fused.io adds patterns where modules differ from it.
    """
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules,
        "task_type": task_type,
        "use_rslora": use_rslora,
    }


def pointwise_of(bank: "AdapterBank", modules: Iterable[str]) -> dict[str, list[str]]:
    """Metadata of a new adapter of these modules: which are 1 x 1 convolutions, by the bank's own.

    lora_fused.io writes their factors in PEFT's four dimensions. Empty where there are none.
    """
    known = {module for facts in bank.metadata.values() for module in facts.get("pointwise", ())}
    found = [module for module in modules if module in known]
    return {"pointwise": found} if found else {}


class AdapterStack(nn.Module):
    """The adapters of one layer, packed by rank rows, or a host's padded slots served in place.

    Attributes:
        lora_a: packed ``[T, I]``; slotted ``[K, R, I]`` with any strides.
        lora_b: packed ``[T, O]``; slotted ``[K, R, O]``.
        row_start: ``[K + 1]`` int32; None for a slotted stack.
        slot_ranks: slotted only, ``[K]`` int32, or None where every slot has rank R.
        scale: ``[K]`` float32.
        ranks: the ranks on the host, K ints (0: an empty segment); slotted: R for every slot.
        embedding: the layer is an nn.Embedding (I is its vocabulary).

    Adapters in training are Parameters of their own (see ``train_adapters``); ``factors()`` returns
    the stack with them in place. Neither buffers nor Parameters enter a state_dict: adapters are
    saved by lora_fused.io.
    """

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: Tensor,
        *,
        ranks: Sequence[int] | None = None,
        slot_ranks: Tensor | None = None,
        embedding: bool = False,
    ):
        super().__init__()
        if lora_a.dim() not in (2, 3) or lora_a.shape[:-1] != lora_b.shape[:-1]:
            rule = "be [T, I] and [T, O], or [K, R, I] and [K, R, O]"
            got = f"{shape(lora_a)} and {shape(lora_b)}"
            raise invalid("AdapterStack", "lora_a and lora_b", rule, got)
        packed = lora_a.dim() == 2
        if packed and (ranks is None or sum(ranks) != len(lora_a) or min(ranks, default=0) < 0):
            rule = f"be given, not negative, and sum to the {len(lora_a)} rows of lora_a"
            raise invalid("AdapterStack", "ranks", rule, ranks)
        ranks = tuple(ranks) if packed else (lora_a.shape[1],) * lora_a.shape[0]
        _check_rows(sum(ranks) if packed else 0)
        if scale.shape != (len(ranks),):
            raise invalid("AdapterStack", "scale", f"be [{len(ranks)}]", shape(scale))
        self.embedding = embedding
        self.trained: tuple[int, ...] = ()
        self._spare = 0  # rows of our own allocation behind lora_a and lora_b
        for name in ("lora_a", "lora_b", "row_start", "slot_ranks", "scale"):
            self.register_buffer(name, None, persistent=False)
        self._commit(lora_a, lora_b, scale, ranks, 0)
        if not packed:
            self.row_start, self.slot_ranks = None, slot_ranks

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[-1]

    @property
    def out_features(self) -> int:
        return self.lora_b.shape[-1]

    def rows(self, k: int) -> slice:
        """The rows of adapter k in a packed stack."""
        if self.row_start is None:
            raise invalid("AdapterStack", "stack", "be packed", "padded slots, which a host owns")
        return slice(self._starts[k], self._starts[k + 1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """``lora_a`` and ``lora_b`` for the kernels, adapters in training in place."""
        if not self.trained:
            return self.lora_a, self.lora_b
        parts: tuple[list, list] = ([], [])
        done = 0
        for k in self.trained:
            at = self.rows(k)
            for side, part in zip("ab", parts, strict=True):
                frozen = getattr(self, f"lora_{side}")[done : at.start]
                part += [frozen, getattr(self, f"trained_{side}_{k}")]
            done = at.stop
        return tuple(
            torch.cat([*part, buffer[done:]])
            for part, buffer in zip(parts, (self.lora_a, self.lora_b), strict=True)
        )

    def train_adapters(self, ids: Iterable[int]) -> None:
        """Make exactly these adapters Parameters (``trained_a_<id>``), each on its own.

        On its own, because an optimiser with weight decay or momentum would also move the frozen
        rows of one shared Parameter. Adapters that were trainable stay the same Parameters.
        """
        wanted = {k for k in set(ids) if self.ranks[k]}
        self._write_back([k for k in self.trained if k not in wanted])
        for k in sorted(wanted.difference(self.trained)):
            for side in "ab":
                rows = getattr(self, f"lora_{side}")[self.rows(k)]
                self.register_parameter(f"trained_{side}_{k}", nn.Parameter(rows.clone()))
        self.trained = tuple(sorted(wanted))

    def freeze(self) -> None:
        """Write trained adapters back into the stack; their Parameters are gone then."""
        self._write_back(self.trained)

    @torch.no_grad()
    def _write_back(self, ids: Sequence[int]) -> None:
        for k in ids:
            for side in "ab":
                name = f"trained_{side}_{k}"
                getattr(self, f"lora_{side}")[self.rows(k)] = getattr(self, name)
                delattr(self, name)
        self.trained = tuple(k for k in self.trained if k not in ids)

    @torch.no_grad()
    def with_appended(self, parts: Sequence[LoraFactors | None], dtype: torch.dtype) -> tuple:
        """What the stack becomes with these adapters behind its own; nothing is changed yet.

        Rows are copied once, behind the visible ones where there is room, else into a new
        allocation: exact for an empty stack, doubled for a growing one. Pass to ``_commit``.
        """
        ranks = [0 if part is None else part.lora_a.shape[0] for part in parts]
        old, added = self.lora_a.shape[0], sum(ranks)
        _check_rows(old + added)
        fits = added <= self._spare and dtype == self.lora_a.dtype and self._owns_spare()
        capacity = old + added if old == 0 else max(old + added, 2 * old)
        spare = (self._spare if fits else capacity - old) - added
        grown = []
        for side in ("lora_a", "lora_b"):
            buffer = getattr(self, side)
            if fits:
                size = (old + added, buffer.shape[1])
                rows = buffer.as_strided(size, buffer.stride(), buffer.storage_offset())
            else:
                rows = buffer.new_empty(capacity, buffer.shape[1], dtype=dtype)[: old + added]
                rows[:old] = buffer
            filled = [getattr(part, side) for part in parts if part is not None]
            at = old
            for tensor in filled:
                rows[at : at + tensor.shape[0]] = tensor
                at += tensor.shape[0]
            grown.append(rows)
        scale = torch.tensor([1.0 if part is None else part.scale for part in parts])
        scale = torch.cat([self.scale, scale.to(self.scale)])
        return *grown, scale, (*self.ranks, *ranks), spare

    @torch.no_grad()
    def selected(self, ids: Sequence[int]) -> "AdapterStack":
        """A new stack that holds a copy of these adapters, in this order."""
        index = [row for k in ids for row in range(self.rows(k).start, self.rows(k).stop)]
        rows = torch.tensor(index, dtype=torch.long, device=self.lora_a.device)
        lora_a, lora_b = (t.detach().index_select(0, rows) for t in self.factors())
        scale = self.scale[list(ids)]
        ranks = [self.ranks[k] for k in ids]
        return AdapterStack(lora_a, lora_b, scale, ranks=ranks, embedding=self.embedding)

    @torch.no_grad()
    def drop(self, k: int) -> None:
        """Turn adapter k into an empty segment."""
        at = self.rows(k)
        kept = [torch.cat([t[: at.start], t[at.stop :]]) for t in (self.lora_a, self.lora_b)]
        self._commit(*kept, self.scale, (*self.ranks[:k], 0, *self.ranks[k + 1 :]), 0)

    def _commit(self, lora_a, lora_b, scale, ranks, spare: int) -> None:
        start = torch.tensor([0, *ranks]).cumsum(0)
        self._starts = start.tolist()  # a host copy of row_start
        self.row_start = start.to(lora_a.device, torch.int32)
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale.float()
        self.ranks, self._spare = tuple(ranks), spare

    def _owns_spare(self) -> bool:
        # Module.to() replaces a buffer by an exact copy, without the room behind it.
        rows = self.lora_a.shape[0] + self._spare
        return all(
            t.untyped_storage().nbytes() >= rows * t.shape[1] * t.element_size()
            for t in (self.lora_a, self.lora_b)
        )

    def _apply(self, fn, recurse=True):
        # model.half() converts the factors; scales are read as float32 and stay so.
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.lora_a.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass


class AdapterBank:
    """The adapters of a whole model: module name -> AdapterStack, under one set of names and ids.

    An adapter's id is its position in order of addition, the same in every stack. A module that an
    adapter lacks is an empty segment and adds nothing. ``remove`` leaves empty segments, so ids
    stay; ``compact`` renumbers. Both raise ``version``: mixtures resolved before are refused.

    Args:
        dtype: storage dtype. Default: that of the adapters if all agree, else float32.
        device: where the stacks live.
    """

    def __init__(self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        self.stacks: dict[str, AdapterStack] = {}
        self.metadata: dict[str, dict] = {}
        self.saved: dict[str, dict[str, Tensor]] = {}
        self.version = 0
        self._device, self._forced_dtype = torch.device(device), dtype
        self._names: list[str | None] = []  # of each id; None: removed
        self._ids: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Names of the adapters held, in id order."""
        return [name for name in self._names if name is not None]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules; the order of per-layer weights."""
        return tuple(self.stacks)

    @property
    def count(self) -> int:
        """Number of ids given out (K), removed ones included."""
        return len(self._names)

    @property
    def dtype(self) -> torch.dtype | None:
        """Storage dtype of the factors; None while the bank is empty and none was asked for."""
        return next((s.lora_a.dtype for s in self.stacks.values()), self._forced_dtype)

    @property
    def device(self) -> torch.device:
        return next((s.lora_a.device for s in self.stacks.values()), self._device)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        rows = sum(s.lora_a.shape[0] for s in self.stacks.values())
        kind = str(self.dtype).removeprefix("torch.")
        return f"AdapterBank({len(self)} adapters, {len(self.stacks)} modules, {rows} rows, {kind})"

    def id(self, name: str) -> int:
        """The id of an adapter; an unknown name is an error that lists close ones, if any."""
        if name not in self._ids:
            known = hint(name, self.names) if self._ids else "none; the bank is empty"
            raise invalid("AdapterBank", "name", f"be a loaded adapter ({known})", repr(name))
        return self._ids[name]

    def is_live(self, adapter_id: int) -> bool:
        return 0 <= adapter_id < self.count and self._names[adapter_id] is not None

    def add(self, adapter: Adapter) -> int:
        """Add one adapter and return its id; on an error the bank is as it was."""
        return self.add_many([adapter])[0]

    @torch.no_grad()
    def add_many(self, adapters: Iterable[Adapter]) -> list[int]:
        """Add adapters, sizing every stack once; return their ids. All or none are added."""
        adapters = list(adapters)
        self._refuse_training("add_many")
        self._check_new(adapters)
        dtype = self._dtype_with(adapters)
        wanted = dict.fromkeys(m for a in adapters for m in a.modules)
        new = [m for m in wanted if m not in self.stacks]
        stacks = {**self.stacks, **{m: self._empty_stack(m, adapters) for m in new}}
        grown = {}
        for module, stack in stacks.items():
            parts = [adapter.modules.get(module) for adapter in adapters]
            grown[module] = stack.with_appended(parts, dtype)
            old = stack.lora_a.shape[0]
            if not all(_finite(rows[old:]) for rows in grown[module][:2]):
                raise _explain_non_finite(module, adapters, dtype)
        # Nothing below can fail: either every adapter is in, or none.
        for module, stack in stacks.items():
            stack._commit(*grown[module])
        self.stacks = stacks
        first = self.count
        for adapter in adapters:
            self._ids[adapter.name] = self.count
            self._names.append(adapter.name)
            self.metadata[adapter.name] = adapter.metadata
            if adapter.saved:
                self.saved[adapter.name] = adapter.saved
        return list(range(first, self.count))

    def remove(self, name: str) -> None:
        """Take an adapter out; its id is never given to another."""
        self._refuse_training("remove")
        k = self.id(name)
        for stack in self.stacks.values():
            stack.drop(k)
        self._names[k] = None
        del self._ids[name]
        self.metadata.pop(name, None)
        self.saved.pop(name, None)
        self.version += 1

    def compact(self) -> None:
        """Renumber the adapters held without gaps and drop modules that none of them has."""
        self._refuse_training("compact")
        live = [k for k, name in enumerate(self._names) if name is not None]
        for module, stack in list(self.stacks.items()):
            kept = stack.selected(live)
            stack._commit(kept.lora_a, kept.lora_b, kept.scale, kept.ranks, 0)
            if not any(stack.ranks):
                del self.stacks[module]
        self._names = [self._names[k] for k in live]
        self._ids = {name: k for k, name in enumerate(self._names)}
        self.version += 1

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; its id stays."""
        k = self.id(old)
        self._check_name(new, "rename")
        self._names[k] = new
        for table in (self._ids, self.metadata, self.saved):
            if old in table:
                table[new] = table.pop(old)

    def subset(self, names: Sequence[str]) -> "AdapterBank":
        """A new bank with copies of these adapters, ids in the order given."""
        ids = [self.id(name) for name in names]
        if len(set(ids)) != len(ids):
            raise invalid("AdapterBank.subset", "names", "be distinct", list(names))
        bank = AdapterBank(device=self.device, dtype=self._forced_dtype)
        bank._names = list(names)
        bank._ids = {name: k for k, name in enumerate(names)}
        stacks = {m: stack.selected(ids) for m, stack in self.stacks.items()}
        bank.stacks = {m: stack for m, stack in stacks.items() if any(stack.ranks)}
        bank.metadata = {name: self.metadata[name] for name in names}
        bank.saved = {name: self.saved[name] for name in names if name in self.saved}
        return bank

    def to(self, device=None, dtype: torch.dtype | None = None) -> "AdapterBank":
        """Move or convert the stacks in place. A narrower dtype loses digits for good."""
        if dtype is not None and dtype != self.dtype:
            for module, stack in self.stacks.items():
                if not all(_finite(t.to(dtype)) for t in stack.factors()):
                    raise invalid("AdapterBank.to", "dtype", f"hold the values of {module}", dtype)
        for stack in self.stacks.values():
            stack.to(device=device, dtype=dtype)
        self._device = self._device if device is None else torch.device(device)
        self._forced_dtype = dtype or self._forced_dtype
        return self

    def adapter(self, name: str) -> Adapter:
        """One adapter as ``add`` takes it and lora_fused.io writes it.

        Factors are views of the stacks, saved and metadata the bank's own: read, do not write.
        """
        k = self.id(name)
        modules = {}
        for module, stack in self.stacks.items():
            if stack.ranks[k]:
                lora_a, lora_b = (t.detach()[stack.rows(k)] for t in stack.factors())
                modules[module] = LoraFactors(
                    lora_a, lora_b, float(stack.scale[k]), stack.embedding
                )
        return Adapter(name, modules, self.saved.get(name, {}), self.metadata[name])

    def trainable(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """Make exactly these adapters (default: all) trainable; return their Parameters.

        Give these to the optimiser: the frozen model's own parameters are as they were, and a later
        call keeps the Parameters of adapters that stay trainable. A step costs as much as the bank
        is large (its rows are joined anew): train few of many in ``bank.subset(names)``.
        """
        ids = [self.id(name) for name in (self.names if names is None else names)]
        for stack in self.stacks.values():
            stack.train_adapters(ids)
        return [p for stack in self.stacks.values() for p in stack.parameters()]

    def freeze(self) -> None:
        """Write trained values back; an optimiser made before then steps on nothing."""
        for stack in self.stacks.values():
            stack.freeze()

    def _refuse_training(self, what: str) -> None:
        if any(stack.trained for stack in self.stacks.values()):
            rule = "be frozen while its adapters change (call freeze())"
            raise invalid(f"AdapterBank.{what}", "bank", rule, "adapters in training")

    def _check_name(self, name: str, what: str) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            rule = f"be a non-empty string other than {BASE!r}"
            raise invalid(f"AdapterBank.{what}", "name", rule, repr(name))
        if name in self._ids:
            raise invalid(f"AdapterBank.{what}", "name", "be new", f"{name!r}, which is loaded")

    def _check_new(self, adapters: Sequence[Adapter]) -> None:
        seen: set[str] = set()
        sizes = {m: (s.in_features, s.out_features, s.embedding) for m, s in self.stacks.items()}
        for adapter in adapters:
            self._check_name(adapter.name, "add")
            if adapter.name in seen:
                raise invalid("AdapterBank.add", "name", "be new", f"{adapter.name!r} twice")
            seen.add(adapter.name)
            if not adapter.modules:
                rule = "adapt at least one module"
                raise invalid("AdapterBank.add", f"adapter {adapter.name!r}", rule, "none")
            for module, part in adapter.modules.items():
                _check_part(f"{adapter.name!r} at {module!r}", part, module, sizes)

    def _dtype_with(self, adapters: Sequence[Adapter]) -> torch.dtype:
        if self._forced_dtype is not None:
            return self._forced_dtype
        parts = [part for adapter in adapters for part in adapter.modules.values()]
        dtypes = {t.dtype for part in parts for t in (part.lora_a, part.lora_b)}
        if self.dtype is not None:
            dtypes.add(self.dtype)
        kernels = {torch.float32, torch.float16, torch.bfloat16}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= kernels else torch.float32

    def _empty_stack(self, module: str, adapters: Sequence[Adapter]) -> AdapterStack:
        part = next(a.modules[module] for a in adapters if module in a.modules)
        sizes = (part.lora_a.shape[1], part.lora_b.shape[1])
        a, b = (torch.empty(0, n, dtype=part.lora_a.dtype, device=self.device) for n in sizes)
        scale = torch.ones(self.count, device=self.device)
        return AdapterStack(a, b, scale, ranks=[0] * self.count, embedding=part.embedding)


def _check_rows(total: int) -> None:
    if total >= 2**31:  # row_start is int32
        raise invalid("AdapterStack", "ranks", "sum to less than 2^31", total)


def _check_part(where: str, part: LoraFactors, module: str, sizes: dict) -> None:
    """Check one part by itself and against ``sizes``, which learns the sizes of a new module."""
    a, b = part.lora_a, part.lora_b
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0] or a.shape[0] == 0:
        rule = "have factors [R, I] and [R, O] with R >= 1"
        raise invalid("AdapterBank.add", f"adapter {where}", rule, f"{shape(a)} and {shape(b)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        got = f"{a.dtype} and {b.dtype}"
        raise invalid("AdapterBank.add", f"adapter {where}", "have floating-point factors", got)
    stored = abs(float(torch.tensor(part.scale, dtype=torch.float32)))
    if not 0 < stored < float("inf"):
        rule = "have a scale that is finite in float32 and not 0"
        raise invalid("AdapterBank.add", f"adapter {where}", rule, part.scale)
    found = (a.shape[1], b.shape[1], part.embedding)
    known = sizes.setdefault(module, found)
    if found != known:
        rule = f"fit the other adapters' sizes (I, O) = {known[:2]}, embedding {known[2]}"
        got = f"{found[:2]}, embedding {found[2]}"
        raise invalid("AdapterBank.add", f"adapter {where}", rule, got)


def _finite(rows: Tensor) -> bool:
    # A finite sum settles it at memory speed, without a temporary (the infinity norm: 8 times as
    # slow, half of what loading cost). Only an overflowed sum needs the extremes; they keep NaN.
    if rows.numel() == 0 or rows.sum().isfinite():
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(rows))


def _explain_non_finite(module: str, adapters: Sequence[Adapter], dtype) -> ValueError:
    for adapter in adapters:
        part = adapter.modules.get(module)
        for side in () if part is None else ("lora_a", "lora_b"):
            values = getattr(part, side)
            if not _finite(values.to(dtype)):
                what = "non-finite values" if not _finite(values) else f"values beyond {dtype}"
                where = f"{side} of adapter {adapter.name!r} at {module!r}"
                return invalid("AdapterBank.add", where, "be finite in the bank's dtype", what)
    raise AssertionError(f"no non-finite value found in {module}")
