"""The tree is as the design says: one name in five places, short files, no versions."""

import ast
import re
from pathlib import Path

import pytest
from support import ROOT

OPS = sorted(p.parent.name for p in (ROOT / "lora_fused" / "ops").glob("*/api.py"))
SEVEN = (
    "matches_reference",
    "gradients_match_reference",
    "registration",
    "compiles",
    "edges",
    "rejects",
    "impl_choice",
)
LIMITS = {"api.py": 150, "contract.py": 150, "reference.py": 150, "registration.py": 150}
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def files(folder: str) -> list[Path]:
    """Source files below a folder of the repository, without build products."""
    found = (ROOT / folder).rglob("*")
    return sorted(p for p in found if p.suffix in SOURCES and "__pycache__" not in p.parts)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def of_op(names, op: str) -> list[str]:
    return [n for n in names if re.fullmatch(rf"{op}(_[a-z0-9_]+)?", n)]


def test_there_are_ops():
    assert "mixture_lora" in OPS
    folders = [p.name for p in (ROOT / "lora_fused" / "ops").iterdir() if p.is_dir()]
    assert sorted(set(folders) - {"__pycache__"}) == OPS, "every folder of ops/ has an api.py"


@pytest.mark.parametrize("op", OPS)
def test_one_name_in_five_places(op):
    package = ROOT / "lora_fused" / "ops" / op
    for part in ("__init__.py", "api.py", "reference.py", "registration.py"):
        assert (package / part).is_file(), f"{op}: {part}"
    native = ROOT / "csrc" / op
    assert (native / f"{op}_cpu.cpp").is_file()
    assert all(p.name.startswith(op) for p in native.iterdir()), "csrc files carry the op's name"
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()
    table = (ROOT / "lora_fused" / "ops" / "README.md").read_text()
    assert re.search(rf"^\|[^|]*`{op}`", table, re.M), "a row of the table in ops/README.md"


@pytest.mark.parametrize("op", OPS)
def test_the_readers_pages_know_the_op(op):
    for page in ("README.md", "CHANGELOG.md"):
        assert f"`{op}`" in (ROOT / page).read_text(), page


def test_nothing_is_named_after_an_op_that_is_not_there():
    csrc = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {"common"}
    assert csrc <= set(OPS)
    stems = [p.stem.removeprefix("test_") for p in (ROOT / "tests" / "ops").glob("test_*.py")]
    assert all(any(of_op([stem], op) for op in OPS) for stem in stems), stems


@pytest.mark.parametrize("op", OPS)
def test_the_seven_tests_stand_in_order(op):
    tree = ast.parse((ROOT / "tests" / "ops" / f"test_{op}.py").read_text())
    named = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    found = [re.sub(r"^(test_|Test)", "", n).lower() for n in named]
    assert [n for n in found if n in SEVEN] == list(SEVEN)


@pytest.mark.parametrize("op", OPS)
def test_operators_are_named_by_direction_and_implementation(op):
    text = (ROOT / "lora_fused" / "ops" / op / "registration.py").read_text()
    names = re.findall(r"lora_fused::(\w+)", text)
    pattern = rf"{op}_(fwd|bwd|out|gram)_(native|triton)"
    assert names and all(re.fullmatch(pattern, n) for n in names)
    entry = (ROOT / "lora_fused" / "ops" / op / "reference.py").read_text()
    assert re.search(r"^def forward\(", entry, re.M)


def test_files_are_short():
    long = []
    for path in files("lora_fused/ops") + files("csrc") + files("tests"):
        limit = LIMITS.get(path.name, 400) if "ops" in path.parts else 400
        if lines(path) > limit:
            long.append(f"{path.relative_to(ROOT)}: {lines(path)} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_setup_is_short():
    assert lines(ROOT / "setup.py") < 100


def test_no_module_is_called_triton():
    assert not [p for p in files("lora_fused") + files("tests") if p.name == "triton.py"]


def test_no_stem_twice_in_a_csrc_folder():
    """setuptools would give both objects one name."""
    sources = [p for p in files("csrc") if p.suffix in (".cpp", ".cu")]
    assert len({(p.parent, p.stem) for p in sources}) == len(sources)


def test_no_versions_in_names():
    bad = re.compile(r"(_v\d+|_new|_old|_copy|^exp_| |copy$)")
    everywhere = [p for top in ("lora_fused", "csrc", "tests", "benchmarks") for p in files(top)]
    assert not [p.name for p in everywhere if bad.search(p.stem)]


def test_every_environment_variable_is_in_the_readme():
    used = set()
    for path in [*files("lora_fused"), *files("csrc"), ROOT / "setup.py"]:
        used |= set(
            re.findall(r'(?:environ|getenv)[^"\n]*"(LORA_FUSED_[A-Z_]+)"', path.read_text())
        )
    missing = [n for n in sorted(used) if f"`{n}`" not in (ROOT / "README.md").read_text()]
    assert used and not missing, missing


def test_the_checks_can_fail():
    """Negative control of the patterns above."""
    assert of_op(["mixture_lora_grad"], "mixture_lora") and not of_op(
        ["mixture_lorax"], "mixture_lora"
    )
    assert len(files("lora_fused")) > 10 and len(files("csrc")) > 5
