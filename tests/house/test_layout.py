"""The architecture is as drawn: which room may import which, how large things are, the names of modules."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from configs.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "data_prep", "eval", "finetune", "prompts")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# Rooms from the ground floor up, and what each may import of ours beside itself. A module belongs to the longest name
# that it begins with; docs/architecture.md shows the same table.
BORDERS = {
    "configs": (),
    "prompts": ("configs",),
    "data_prep.folders": ("configs", "prompts"),
    "data_prep": ("configs", "prompts", "data_prep.folders"),
    "finetune.diffusion": ("configs", "prompts", "data_prep.folders"),
    "eval": ("configs", "prompts", "data_prep.folders", "finetune.diffusion"),
    "finetune.core": ("configs", "prompts", "data_prep.folders", "finetune.diffusion", "eval"),
    "finetune": ("configs", "prompts", "data_prep.folders", "finetune.diffusion", "eval", "finetune.core"),
}
MOST_FILES, MOST_LINES, MOST_FUNCTION, MOST_PARAMETERS, MOST_RECIPE = 14, 450, 80, 7, 80
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


def room_of(name: str) -> str:
    """Return the row of the table that a module belongs to."""
    return max((room for room in BORDERS if within(name, (room,))), key=len)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of names that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        ahead, found = [start], set[str]()
        while ahead:
            new = graph.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        reached[start] = found
    groups = {
        tuple(sorted(other for other in found if name in reached.get(other, ()))) for name, found in reached.items()
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def is_command(name: str) -> bool:
    """Tell whether a module is started from the command line."""
    return '__name__ == "__main__"' in MODULES[name].read_text(encoding="utf-8")


def test_imports_keep_to_the_borders() -> None:
    over = [
        f"{name} imports {target}"
        for name in MODULES
        for target in sorted(ours(name))
        if room_of(target) not in (room_of(name), *BORDERS[room_of(name)])
    ]
    assert over == []


def test_no_circle_of_modules() -> None:
    assert circles({name: ours(name) for name in MODULES}) == []


def folder_of(name: str) -> str:
    """Return the folder that a module lies in; one that lies beside folders stands for itself."""
    folder = name.rpartition(".")[0]
    has_folders = any(other.startswith(f"{folder}.") and other.count(".") > name.count(".") for other in MODULES)
    return name if has_folders else folder


def test_no_circle_of_folders() -> None:
    """A folder of code may import another only if that one never needs it back."""
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        folder = folder_of(name)
        graph.setdefault(folder, set()).update({folder_of(target) for target in ours(name)} - {folder})
    assert circles(graph) == []


def test_nobody_imports_a_command() -> None:
    commands = {name for name in MODULES if is_command(name)}
    assert [f"{name} imports {target}" for name in MODULES for target in sorted(ours(name) & commands)] == []


def test_recipes_say_in_eighty_lines_what_makes_them_different() -> None:
    """From the settings of the method to its end; above stand the docstring and the imports."""
    lengths = {}
    for recipe in RECIPES:
        lines = MODULES[f"finetune.{recipe}"].read_text(encoding="utf-8").splitlines()
        lengths[recipe] = len(lines) - next(n for n, line in enumerate(lines) if line.startswith("@dataclass"))
    assert {recipe: length for recipe, length in lengths.items() if length > MOST_RECIPE} == {}


def test_files_functions_and_folders_are_small() -> None:
    large = []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES:
            large.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([one for one in given if one not in ("self", "cls")])
            lines = int(node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_FUNCTION or count > MOST_PARAMETERS:
                large.append(f"{name}.{node.name}: {lines} lines, {count} parameters")
    for folder in sorted({path.parent for path in MODULES.values()}):
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        if count > MOST_FILES:
            large.append(f"{folder.relative_to(ROOT)}: {count} files")
    assert large == []


def test_only_the_diffusion_room_calls_a_unet_or_a_vae() -> None:
    calls = []
    for name, path in MODULES.items():
        if room_of(name) == "finetune.diffusion":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(
                r"(\bvae\.(encode|decode)|\b(unet|vae)(\.forward)?)$", ast.unparse(node.func)
            ):
                calls.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
    assert calls == []


def test_data_preparation_and_settings_never_import_torch() -> None:
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate"}
    names = [name for name in MODULES if name.startswith(("data_prep", "configs", "finetune.core.settings"))]
    found = {name: {target.partition(".")[0] for target in imported(MODULES[name])} & heavy for name in names}
    assert {name: sorted(which) for name, which in found.items() if which} == {}


def test_module_in_a_script_folder_shadows_no_other() -> None:
    """A script's own folder comes first on ``sys.path``: ``finetune/datasets.py`` would hide the library."""
    scripts = {path for folder in PACKAGES for path in (ROOT / folder).glob("*.py")}
    assert [path for path in sorted(scripts) if path.stem in sys.stdlib_module_names | set(installed())] == []


def test_no_installed_package_has_the_name_of_ours() -> None:
    assert set(PACKAGES) & set(installed()) == set()


def test_module_names_say_something() -> None:
    assert [name for name in MODULES if VAGUE & set(re.split(r"[._]", name))] == []


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
