from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError, UsageError
from data_prep.folders.hashes import sha256_of
from data_prep.folders.manifest import MANIFEST_NAME, SliceRow, read_manifest, read_rows, write_rows
from data_prep.folders.publish import check_free, check_writable, publish

ROW = SliceRow(
    file_name="dry-warp-00003.png",
    text="sf_dry sf_warp",
    volume="dry",
    state="dry",
    axis="warp",
    index=3,
    box=(0, 4, 3, 4, 0, 6),
    width=6,
    height=4,
)


def test_publish_puts_the_folder_in_place_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with publish(target, mark=MANIFEST_NAME) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_publish_leaves_nothing_behind_when_the_body_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with publish(tmp_path / "out", mark=MANIFEST_NAME) as folder:
            (folder / "a.txt").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_publish_refuses_a_folder_that_holds_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("x: 1")
    with pytest.raises(UsageError, match="--overwrite"), publish(tmp_path, mark=MANIFEST_NAME):
        pass
    assert (tmp_path / "config.yaml").exists()


def test_publish_keeps_the_old_folder_when_overwriting_fails(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError), publish(target, overwrite=True, mark=MANIFEST_NAME):
        raise RuntimeError
    assert (target / "manifest.json").read_text() == "old"


def test_publish_replaces_the_old_folder_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with publish(target, overwrite=True, mark=MANIFEST_NAME) as folder:
        (folder / "new.txt").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_never_replaces_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"), publish(tmp_path, overwrite=True, mark=MANIFEST_NAME):
        pass
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("row", [ROW, dataclasses.replace(ROW, um_per_px=(10.0, 12.5))])
def test_rows_survive_a_round_trip(tmp_path: Path, row: SliceRow) -> None:
    write_rows(tmp_path, [row])
    assert read_rows(tmp_path) == [row]


def test_a_row_has_exactly_the_columns_of_the_contract(tmp_path: Path) -> None:
    write_rows(tmp_path, [dataclasses.replace(ROW, um_per_px=(10, 12))])
    line = (tmp_path / "metadata.jsonl").read_text()
    names = ["file_name", "text", "volume", "state", "axis", "index", "box", "width", "height", "um_per_px"]
    assert list(json.loads(line)) == names
    assert line.endswith('"um_per_px": [10.0, 12.0]}\n')


def test_an_unknown_pixel_size_is_absent_from_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW])
    assert "um_per_px" not in (tmp_path / "metadata.jsonl").read_text()


def test_rows_with_and_without_pixel_size_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="um_per_px"):
        write_rows(tmp_path, [ROW, dataclasses.replace(ROW, um_per_px=(1.0, 1.0))])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "metadata.jsonl:1: not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"file_name": "a.png"}', "no column 'text'"),
        (json.dumps(dataclasses.asdict(ROW) | {"file_name": "../../etc/a.png"}), "leaves its folder"),
        (json.dumps(dataclasses.asdict(ROW) | {"file_name": "/etc/a.png"}), "leaves its folder"),
        (json.dumps(dataclasses.asdict(ROW) | {"box": [0, 1]}), "box must be six"),
        (json.dumps(dataclasses.asdict(ROW) | {"index": "3"}), "whole numbers"),
        (json.dumps(dataclasses.asdict(ROW) | {"index": 2**63}), "whole numbers"),
        (json.dumps(dataclasses.asdict(ROW) | {"box": [0, 1, 0, 1, 0, 2**63]}), "box must be six"),
        (json.dumps(dataclasses.asdict(ROW) | {"um_per_px": [1.0, float("inf")]}), "two positive numbers"),
        (json.dumps(dataclasses.asdict(ROW) | {"um_per_px": [10**400, 1]}), "two positive numbers"),
        ('{"box": ' + "[" * 100_000, "metadata.jsonl:1: nested too deeply"),
        ('{"index": ' + "9" * 6000 + "}", "metadata.jsonl:1: a number with too many digits"),
        ('{"file_name": "\\ud800.png"}', "metadata.jsonl:1: text with half of a character"),
        ('{"file_name": "a.png", "text": "\\udfff"}', "metadata.jsonl:1: text with half of a character"),
        (json.dumps({"file_name": "a/" + "b" * 300}), "metadata.jsonl:1: file_name has 300 bytes"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path)


def test_a_folder_without_rows_or_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; is .* the folder of a split"):
        read_rows(tmp_path)
    with pytest.raises(InputError, match=r"no such file; is .* a dataset folder"):
        read_manifest(tmp_path)


def test_the_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_publishing_touches_no_folder_beside_its_own(tmp_path: Path) -> None:
    for name in ("data.old", "data.old-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("kept")
    for text in ("first", "second"):
        with publish(tmp_path / "data", overwrite=True, mark=MANIFEST_NAME) as folder:
            (folder / "manifest.json").write_text(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.old", "data.old-1"]
    assert (tmp_path / "data.old" / "mine.txt").read_text() == "kept"
    assert (tmp_path / "data" / "manifest.json").read_text() == "second"


def test_publishing_leaves_a_partial_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "volume.tif").write_text("kept")
    with publish(tmp_path / "data", mark=MANIFEST_NAME) as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "data.partial" / "volume.tif").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.partial"]


@pytest.mark.parametrize("foreign", ["config.yaml", "pytorch_lora_weights.safetensors"])
def test_a_folder_without_the_mark_of_the_command_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text("a training run")
    with pytest.raises(UsageError, match=r"holds manifest\.json"):
        check_free(tmp_path, overwrite=True, mark=MANIFEST_NAME)


@pytest.mark.parametrize("place", ["file/out", "file/a/b", "/proc/nope/out", "loop", "loop/out", "x" * 300])
def test_a_place_where_nothing_can_be_written_is_refused_first(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match=r"^--output \S+: cannot be written there \("):
        check_writable(tmp_path / place, "--output")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_in_place_of_the_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metadata\.jsonl: cannot be read \(Is a directory"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "{}", '{"volumes": {}}', '{"volumes": ["dry"]}', "[" * 100_000, '{"volumes": "\xff"}']
)
def test_a_manifest_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest\.json: "):
        read_manifest(tmp_path)


# ---- Two runs, killed runs ----

WRITER = """
import sys, time
from pathlib import Path
from data_prep.folders.publish import publish
with publish(Path(sys.argv[1]), overwrite=True, mark="manifest.json") as folder:
    (folder / "manifest.json").write_text("{}")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(target: Path) -> subprocess.Popen[str]:
    """Start another process that writes into a folder, and wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_second_writer_is_refused_with_the_process_that_holds_the_folder(tmp_path: Path) -> None:
    with start_writer(tmp_path / "out") as first:
        try:
            with (
                pytest.raises(UsageError, match=rf"out: process {first.pid} on .* is writing there"),
                publish(tmp_path / "out", mark=MANIFEST_NAME),
            ):
                pass
            assert len(list(tmp_path.iterdir())) == 1
        finally:
            first.kill()


def test_what_a_killed_writer_left_is_cleared_away_at_the_next_start(tmp_path: Path) -> None:
    with start_writer(tmp_path / "out") as first:
        first.kill()
    assert [path.name.startswith("out.partial-") for path in tmp_path.iterdir()] == [True]
    with publish(tmp_path / "out", mark=MANIFEST_NAME) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_folder_that_was_moved_aside_when_the_writer_died_comes_back(tmp_path: Path) -> None:
    room = tmp_path / "out.partial-abcd"
    (room / "old").mkdir(parents=True)
    (room / "old" / MANIFEST_NAME).write_text("{}")
    (room / "lock").write_text("1 on here\n")
    with pytest.raises(RuntimeError), publish(tmp_path / "out", overwrite=True, mark=MANIFEST_NAME):
        raise RuntimeError
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_of_the_same_beginning_are_left_alone(tmp_path: Path) -> None:
    for name in ("out.partial-mine", "out.partials"):
        (tmp_path / name).mkdir()
    with publish(tmp_path / "out", mark=MANIFEST_NAME):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial-mine", "out.partials"]
