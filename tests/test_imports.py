"""What imports what: arrows point one way, and torch with safetensors is enough."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import lora_fused

# Each part may import those before it, and itself. backends loads the extension.
ORDER = (
    "checks",
    "backends",
    "ops",
    "adapters",
    "mixture",
    "report",
    "methods",
    "io",
    "library",
    "nn",
    "new",
    "serving",
    "cli",
    "__main__",
)
ASIDE = {"testing": ("checks", "ops", "adapters", "mixture")}  # for tests and benchmarks only
OPTIONAL = (
    *("transformers", "peft", "typer", "rich", "numpy", "scipy", "yaml", "cma", "lancedb"),
    *("pyarrow", "PIL", "timm", "triton"),
    "lora_fused._C",
)
PACKAGE = ROOT / "lora_fused"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> set[str]:
    """Parts of lora_fused that a module imports, also inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".")[1] for name in names if name.startswith("lora_fused.")]
    # A name that lora_fused itself exports belongs to the module that defines it.
    home = {n: getattr(lora_fused, n).__module__.split(".")[1] for n in ("Adapter", "AdapterBank")}
    home |= {"AdapterStack": "adapters", "LoraFactors": "adapters", "BASE": "adapters"}
    home |= {"Mixture": "mixture", "__version__": "checks", "_C": "backends"}
    return {home.get(part, part) for part in parts}


def allowed(part: str) -> set[str]:
    if part in ASIDE:
        return {part, *ASIDE[part]}
    return set(ORDER[: ORDER.index(part) + 1])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    part = part_of(path)
    found = imported_parts(ast.parse(path.read_text()))
    if part == "__init__":
        light = {"adapters", "mixture", "io", "nn", "new"}
        assert found <= light, "the package itself stays light"
    else:
        assert found <= allowed(part), f"{part} may not import {found - allowed(part)}"
    if path.name == "reference.py":
        assert not found, "a reference is plain torch"


def test_the_order_can_be_violated():
    """Negative control: an arrow the other way is seen, also inside a function."""
    code = "def f():\n    from lora_fused.nn import attach\n    import lora_fused.io.peft\n"
    found = imported_parts(ast.parse(code))
    assert found == {"nn", "io"} and not found <= allowed("adapters")
    assert imported_parts(ast.parse("from lora_fused import Mixture")) == {"mixture"}


def top_level(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_torch_and_safetensors_at_the_top(path):
    """The command line may need typer and rich, a Triton module triton; nothing else may."""
    extra = {"triton"} if "triton_impl" in str(path) else set()
    extra |= {"typer", "rich"} if part_of(path) == "cli" else set()
    known = {"torch", "safetensors", "lora_fused", *sys.stdlib_module_names, *extra}
    assert top_level(ast.parse(path.read_text())) <= known


def fresh(code: str, blocked=OPTIONAL) -> str:
    """Run in a process of its own in which the blocked modules cannot be imported."""
    block = f"import sys\nfor name in {list(blocked)}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_and_safetensors_alone():
    parts = ("ops", "methods", "io", "library", "nn", "testing")
    fresh("import " + ", ".join(f"lora_fused.{part}" for part in parts))


def test_import_does_not_reach_for_what_is_installed():
    code = "import sys, lora_fused\nprint([m for m in %r if m in sys.modules])"
    outside = [n for n in OPTIONAL if not n.startswith(("lora_fused", "numpy", "triton"))]
    assert fresh(code % outside, blocked=()).strip() == "[]"


def test_the_package_offers_what_most_scripts_need():
    code = "import lora_fused\nfor name in lora_fused.__all__: getattr(lora_fused, name)\n"
    names = "attach handle_of load_adapters new_adapter read_adapter save_adapters write_adapter"
    code += f"assert set({names.split()}) <= set(lora_fused.__all__)\nlora_fused.io, lora_fused.nn"
    fresh(code)


def test_blocking_blocks():
    """Negative control of the two tests above."""
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        fresh("import typer")


def test_the_reference_works_without_anything_else():
    code = """
import torch
from lora_fused import AdapterBank, Adapter, LoraFactors, Mixture, backends
from lora_fused.ops import mixture_lora
bank = AdapterBank()
bank.add(Adapter("a", {"q": LoraFactors(torch.ones(2, 3), torch.ones(2, 4), 0.5)}))
route, stack = Mixture.rows(["a", None]).resolve(bank), bank.stacks["q"]
args = (torch.ones(2, 3), stack.lora_a, stack.lora_b, stack.row_start, *route[:2])
y = mixture_lora(*args, scale=stack.scale)
print(y.tolist())
try:
    mixture_lora(*args, impl="native")
except RuntimeError as error:
    print(error)
"""
    values, error = fresh(code).splitlines()
    assert values == "[[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]"
    assert re.search(r"got 'native': the native extension was not built; install", error)


def test_the_command_line_says_what_it_needs():
    code = "from lora_fused.cli import main\ntry: main()\nexcept SystemExit as e: print(e)"
    said = fresh(code, blocked=("typer", "rich"))
    assert "typer and rich must be installed" in said and "pip install typer rich" in said
