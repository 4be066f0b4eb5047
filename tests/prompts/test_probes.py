"""Probe lists, prompt files and grids."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UsageError
from data_prep.worlds.shapes import COLOURS, HELD_OUT, SHAPES, TEXTURES, Scene
from eval.forgetting.policy import LIMITS
from prompts.grids import make_grid, read_grid, read_prompts, write_grid
from prompts.probe_lists import Probe, probes_hash, read_probes, shared_token_probes, write_probes
from prompts.probes import ProbesConfig, main


def world() -> set[str]:
    """Return every caption of the small world that the embedded base was trained on."""
    colours = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    scenes = [Scene(kind=kind, colours=pair, count=n) for kind in SHAPES for pair in colours for n in (1, 2, 3)]
    scenes += [Scene(kind=kind, colours=pair) for kind in TEXTURES for pair in (*colours, ())]
    return {scene.caption for scene in scenes if (scene.kind, frozenset(scene.colours)) not in HELD_OUT}


@pytest.mark.parametrize("probe", [p for p in read_probes("tiny") if p.set not in {"G4", "G5"}], ids=lambda p: p.id)
def test_the_tiny_probes_are_captions_the_base_was_trained_on(probe: Probe) -> None:
    assert probe.prompt in world()


def test_the_anchors_of_stable_diffusion_are_those_of_the_earlier_study() -> None:
    anchors = [probe.prompt for probe in read_probes("stable_diffusion") if probe.set == "G0"]
    assert anchors == ["horse on a beach", "two zebras", "a texture"]


@pytest.mark.parametrize("name", ["tiny", "stable_diffusion", "composition"])
def test_every_built_in_set_has_limits_and_the_empty_prompt_is_asked(name: str) -> None:
    probes = read_probes(name)
    assert {probe.set for probe in probes} <= set(LIMITS)
    assert [probe.is_light for probe in probes if probe.prompt == ""] == [True]


def test_the_hash_changes_with_a_prompt_and_not_with_the_short_check() -> None:
    probes = read_probes("tiny")
    changed = [*probes[:-1], Probe(id=probes[-1].id, prompt="another", set=probes[-1].set)]
    all_light = [Probe(id=p.id, prompt=p.prompt, set=p.set, is_light=True) for p in probes]
    assert probes_hash(changed) != probes_hash(probes) == probes_hash(all_light)


def test_a_text_file_is_one_set_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a horse\n\n  two cows \n")
    assert [(p.set, p.prompt) for p in read_probes(str(path))] == [("own", "a horse"), ("own", "two cows")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nsets: {G0: {probes: {a: x}}, G1: {probes: {a: y}}}", "these are not: a"),
        ("version: 1\nsets: {G0: {probes: {a: 3}}}", "prompt 1 is not text"),
        ("version: 1\nlight: [b]\nsets: {G0: {probes: {a: x}}}", "'light:' must list ids"),
        ("version: 1\nsets: {../../../x: {probes: {a: x}}}", "set '../../../x': letters"),
        ("version: 1\nsets: {a/b: {probes: {a: x}}}", "set 'a/b': letters"),
        ("version: 1\nsets: {control: {probes: {a: x}}}", "set 'control': letters"),
        ("version: 1\nsets: {G0: {probes: {a b: x, a-b: y}}}", "id 'a b' of set G0: letters"),
        ("version: 1\nsets: {G0: {probes: {\u00e9: x}}}", "id '.' of set G0: letters"),
        ("version: 1\nsets: {G0: {probes: {a: x, A: y}}}", "a of set G0 and A of set G0 would write the same"),
        ("version: 1\nsets: {G: {probes: {a-b: x}}, G-a: {probes: {b: y}}}", "a-b of set G and b of set G-a would"),
        ("sets: {}", "expected 'version: 1'"),
        ("version: 1\nsets: {G0: [x]}", "set G0 needs 'probes:'"),
        ("version: 1\nlights: [a]\nsets: {G0: {probes: {a: x}}}", "unknown key 'lights'; .* did you mean 'light'"),
        ("version: 1\nsets: {G0: {probes: {a: x}, light: true}}", "set G0: unknown key 'light'"),
        ("[a, {b: c}]", "prompt 2 is not text"),
        ("[", "not readable as YAML"),
        ("[]", "holds 0 prompts"),
    ],
)
def test_a_broken_probe_file_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_probes(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_list_names_the_built_in_ones() -> None:
    with pytest.raises(
        UsageError, match=r"--probes tinny: neither a readable file nor one of composition, stable_diffusion, tiny"
    ):
        read_probes("tinny")


def test_a_grid_asks_every_prompt_once_with_the_same_seeds() -> None:
    grid = make_grid(["b", "a", "b"], num_images=2, seed=5)
    assert grid.requests == [("b", 5), ("b", 6), ("a", 5), ("a", 6)]


def test_grids_of_different_seeds_have_different_hashes() -> None:
    assert make_grid(["a"], 2, 0).hash != make_grid(["a"], 2, 1).hash


@pytest.mark.parametrize(("name", "text"), [("p.txt", "a b\n\nc\n"), ("p.yaml", "- a b\n- c\n")])
def test_prompts_are_read_from_text_and_yaml(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["a b", "c"]


def test_shared_tokens_give_everyday_prompts_for_prefix_word_and_piece() -> None:
    found = {probe.id: probe.prompt for probe in shared_token_probes(["sf_dry sf_warp"], ["sf", "_", "dry", "compac"])}
    assert found["sf-skyline"] == "the SF skyline at dusk"
    assert found["dry-leaves"] == "dry leaves on the ground"
    assert found["warp-stars"] == "a warp-speed star field"
    assert found["compact-car"] == "a compact car in a car park"


def test_a_known_word_the_table_lacks_is_asked_as_a_photo() -> None:
    found = shared_token_probes(["zz_lattice"], ["zz", "_", "lattice"], known=["lattice"])
    assert [(probe.id, probe.prompt, probe.set) for probe in found] == [("word-lattice", "a photo of lattice", "G1")]


def test_the_study_anchors_of_composition_are_there() -> None:
    prompts = {probe.prompt for probe in read_probes("composition") if probe.set == "G5"}
    assert {"dtd_braided brioche", "dtd_spiralled galaxy", "sf_compacted", "Zebras with dtd_zigzagged skin"} <= prompts


def test_a_written_probe_file_reads_back(tmp_path: Path) -> None:
    probes = read_probes("tiny")
    write_probes(tmp_path / "mine.yaml", probes)
    assert read_probes(str(tmp_path / "mine.yaml")) == probes


def test_the_command_replaces_the_lists_own_g1(toy_sd: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    model = str(toy_sd)
    main(
        ProbesConfig(
            captions=("sf_dry",), pretrained_model_name_or_path=model, probes="stable_diffusion", output=output
        )
    )
    own = [probe.id for probe in read_probes(str(output)) if probe.set == "G1"]
    assert own == ["sf-skyline", "dry-leaves", "dry-desert"]
    with pytest.raises(UsageError, match="already exists"):
        main(ProbesConfig(captions=("sf_dry",), pretrained_model_name_or_path=model, output=output))


def test_a_frozen_grid_reads_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    path, grid = tmp_path / "grid.json", make_grid(["a", "b"], 3, 7)
    write_grid(path, grid)
    assert read_grid(path) == grid
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(UsageError, match="was changed since it was frozen"):
        read_grid(path)


@pytest.mark.parametrize("text", ["[", "[1]", '{"prompts": ["a"], "seeds": [-1]}', '{"prompts": ["a"], "seeds": []}'])
def test_a_file_that_is_no_grid_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UsageError, match=r"--grid .*grid\.json: "):
        read_grid(tmp_path / "grid.json")
