"""The architecture is as drawn: the tree in the README, the direction of imports, the names of modules."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_prep", "eval", "finetune", "prompts")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# What each package may import of ours; "everyone -> configs" and a package's own modules go without saying.
ALLOWED = {
    "configs": (),
    "prompts": (),
    "data_prep": ("prompts",),
    "eval": ("prompts",),
    "finetune": ("eval", "prompts"),
}
DATA_LEAVES = ("data_prep.manifest", "data_prep.intensity", "data_prep.verify")
MODEL_LEAVES = ("finetune.core.noise", "finetune.core.objective", "finetune.core.models")
# Leaves may be imported against the direction, because of what they keep to themselves.
LEAVES = {
    **dict.fromkeys(DATA_LEAVES, ("data_prep", "prompts", "configs")),
    **dict.fromkeys(MODEL_LEAVES, ("finetune.core", "prompts", "configs", *DATA_LEAVES)),
}
PRESETS = ("configs/*.yaml", "configs/accelerate/*.yaml", "prompts/probes/*.yaml")
TREE = (*(f"{package}/**/*.py" for package in PACKAGES), "benchmarks/*.py", *PRESETS)
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@functools.cache
def imported(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where a name comes from"
            module = str(node.module)
            submodules = {f"{module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {module}
    return found


def ours(name: str) -> set[str]:
    """Return the modules of ours that a module imports."""
    return {target for target in imported(MODULES[name]) if target.partition(".")[0] in PACKAGES}


@functools.cache
def installed() -> dict[str, set[str]]:
    """Return what can be imported besides our own packages, with the distributions it comes from."""
    found = {name: set(distributions) - {"tisserand"} for name, distributions in packages_distributions().items()}
    return {name: distributions for name, distributions in found.items() if distributions}


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    package = name.partition(".")[0]
    places = (package, "configs", *ALLOWED[package])
    places += DATA_LEAVES if package in ("eval", "finetune") else ()
    places += MODEL_LEAVES if package == "eval" else ()
    assert [target for target in sorted(ours(name)) if not within(target, places)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("finetune.")])
def test_no_training_module_imports_a_recipe(name: str) -> None:
    assert [target for target in sorted(ours(name)) if within(target, ("finetune",)) and "core" not in target] == []


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf in MODULES])
def test_leaf_reaches_nothing_above_itself(leaf: str) -> None:
    reached: set[str] = set()
    ahead = [leaf]
    while ahead:
        name = ahead.pop()
        if name in MODULES and name not in reached:
            reached.add(name)
            ahead += ours(name)
    assert [name for name in sorted(reached) if not within(name, LEAVES[leaf])] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("data_prep", "configs"))])
def test_data_preparation_and_settings_never_import_torch(name: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate"}
    assert sorted({target.partition(".")[0] for target in imported(MODULES[name])} & heavy) == []


@pytest.mark.parametrize(
    "path", sorted({path for folder in PACKAGES for path in (ROOT / folder).glob("*.py")}), ids=str
)
def test_module_in_a_script_folder_shadows_no_other(path: Path) -> None:
    """A script's own folder comes first on ``sys.path``: ``finetune/datasets.py`` would hide the library."""
    assert path.stem not in sys.stdlib_module_names | set(installed())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_installed_package_has_the_name_of_ours(package: str) -> None:
    assert package not in installed()


@pytest.mark.parametrize("name", MODULES)
def test_module_name_says_something(name: str) -> None:
    assert VAGUE.isdisjoint(re.split(r"[._]", name))


def tracked_files() -> list[Path]:
    """Return the files under version control that are still there."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_name_no_place_on_somebodys_machine() -> None:
    place = re.compile(rb"(?<![\w.-])/(home|root|work|Users)/|\.\./shared")
    assert [str(path.relative_to(ROOT)) for path in tracked_files() if place.search(path.read_bytes())] == []


def test_package_list_for_installing_is_complete() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert listed == sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


def purpose(path: Path) -> str:
    """Suggest a line for the tree: the first line of a module's docstring or of a preset's comment."""
    text = path.read_text(encoding="utf-8")
    first = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else text.lstrip("# ")
    return (first or "?").splitlines()[0]


def test_tree_in_the_readme_equals_the_files() -> None:
    """The tree stands between ``<!-- tree -->`` and ``<!-- /tree -->``, a line a file: path, two spaces, purpose.

    Paths are from the root; a line whose path ends in ``/`` introduces a folder and stands for nothing else.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\n(.*?)<!-- /tree -->", readme, re.DOTALL)
    text = tree[1] if tree else ""
    lines = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines()]
    listed = {line[0]: line[1:] for line in lines if line[0] and not line[0].startswith("```")}
    files = {
        str(path.relative_to(ROOT)) for pattern in TREE for path in ROOT.glob(pattern) if path.name != "__init__.py"
    }
    missing = [f"{name}  {purpose(ROOT / name)}" for name in sorted(files - set(listed))]
    gone = [name for name in listed if not name.endswith("/") and name not in files]
    gone += [name for name in listed if name.endswith("/") and not (ROOT / name).is_dir()]
    assert (missing, gone) == ([], []), "add to the tree:\n" + "\n".join(missing)
    assert "assets/tiny-sd/" in listed
    assert [name for name, said in listed.items() if not said] == []
