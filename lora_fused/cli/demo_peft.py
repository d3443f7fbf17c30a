"""PEFT doing the demo's work, as the yardstick for its results and for its time."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lora_fused.adapters import BASE
from lora_fused.mixture import Row


class PeftRows:
    """A PEFT model that holds the demo's adapters and applies a weighted set of them to a batch.

    Without ``heads`` the fully trained modules in the folders are left out.
    """

    def __init__(self, model: nn.Module, folders: dict[str, Path], heads: bool = False):
        from peft import PeftModel

        # PEFT's module dictionaries accept no dots, and folders may have any name.
        self.ids = {name: f"adapter{i}" for i, name in enumerate(folders)}
        first, *rest = folders
        options = {"is_trainable": False, "autocast_adapter_dtype": False}
        self.model = PeftModel.from_pretrained(
            model, str(folders[first]), adapter_name=self.ids[first], **options
        )
        for name in rest:
            self.model.load_adapter(str(folders[name]), self.ids[name], **options)
        self.heads = heads
        self._drop_heads()
        self.model.to(next(model.parameters()).dtype).eval()
        self._cat: dict[tuple, str] = {}

    def load_copies(self, folders: list[Path], count: int) -> None:
        """Load more adapters, which no row uses, until there are ``count``."""
        for i in range(len(self.ids), count):
            folder = folders[i % len(folders)]
            self.model.load_adapter(str(folder), f"copy{i}", autocast_adapter_dtype=False)
        self._drop_heads()
        self.model.eval()

    def _drop_heads(self) -> None:
        # Again after every addition, a merged one too: PEFT wraps the head anew for each.
        from peft.utils import ModulesToSaveWrapper

        if self.heads:
            return
        for path, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, module.original_module)

    def weighted(self, tokens: dict[str, Tensor], row: Row) -> Tensor:
        """All rows under one weighted set: PEFT's own forward with several active adapters."""
        weights = as_weights(row)
        if not weights:
            return self.base(tokens)
        self.model.base_model.set_adapter([self.ids[name] for name in weights], inference_mode=True)
        layers = [m for m in self.model.modules() if hasattr(m, "set_scale")]
        for layer in layers:
            for name, weight in weights.items():
                layer.set_scale(self.ids[name], weight)
        try:
            return output(self.model, tokens)
        finally:
            for layer in layers:
                for name in weights:
                    layer.set_scale(self.ids[name], 1.0)

    def base(self, tokens: dict[str, Tensor]) -> Tensor:
        with self.model.disable_adapter():
            return output(self.model, tokens)

    def by_adapter_names(self, tokens: dict[str, Tensor], names: list[str | None]) -> Tensor:
        """Each row under its one adapter, in PEFT's mixed batch."""
        ids = [BASE if name is None else self.ids[name] for name in names]
        return output(self.model, tokens, adapter_names=ids)

    def by_group(self, tokens: dict[str, Tensor], rows: list[Row]) -> list[Tensor]:
        """One forward per distinct weighted set, each merged beforehand by ``merge``."""
        done = []
        for key, members in groups(rows).items():
            part = {name: t[members] for name, t in tokens.items()}
            if not key:
                done.append(self.base(part))
                continue
            self.model.base_model.set_adapter(self._cat[key], inference_mode=True)
            done.append(output(self.model, part))
        return done

    def merge(self, rows: list[Row]) -> None:
        """Make one adapter of each weighted set (add_weighted_adapter, the exact "cat")."""
        for key in groups(rows):
            names = [self.ids[name] for name, _ in key]
            if len(key) == 1 and key[0][1] == 1.0:
                self._cat[key] = names[0]
            elif key and key not in self._cat:
                self._cat[key] = f"cat{len(self._cat)}"
                weights = [weight for _, weight in key]
                self.model.base_model.add_weighted_adapter(
                    names, weights, self._cat[key], combination_type="cat"
                )
        self._drop_heads()
        self.model.eval()


def as_weights(row: Row) -> dict[str, float]:
    """A row of a mixture as a dict; empty for the base."""
    if row is None or row == BASE:
        return {}
    return {row: 1.0} if isinstance(row, str) else dict(row)


def groups(rows: list[Row]) -> dict[tuple, list[int]]:
    """Rows that share one weighted set: the set as pairs -> the rows' numbers."""
    found: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(tuple(as_weights(row).items()), []).append(i)
    return found


@torch.no_grad()
def output(model: nn.Module, tokens: dict[str, Tensor], **options) -> Tensor:
    """What is compared: the logits of a model that has a head, else its last hidden states."""
    result = model(**tokens, **options)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state
