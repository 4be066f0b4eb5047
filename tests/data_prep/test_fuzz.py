"""Damaged files by the thousand: the pixels that an independent reader finds in the same bytes, or one line.

The independent reader is below: a few dozen lines over ``struct`` and ``zlib`` that know nothing of tifffile. Every
mutated file must end, within 10 s and 1 GiB, as the planes this reader gets from the file's own bytes and tags, or as
an InputError of one line; a cut file must be refused unless every plane is still there.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from configs.errors import InputError
from configs.load import load
from data_prep.readers.open import open_volume
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig

SHAPE = (5, 12, 16)
# Steps of a few counts, so that compression has something to find.
VOLUME = (np.random.default_rng(3).integers(0, 40, SHAPE).cumsum(axis=2) + 30000).astype(np.uint16)
TEXT = "Panel 7, 180 kV, 20 um; weft to the right"
SECONDS, MEMORY = 10, 1 << 30


# ---- The independent reader ----

SIZES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
TYPES = {(1, 8): "u1", (1, 16): "u2", (1, 32): "u4", (1, 64): "u8", (2, 8): "i1", (2, 16): "i2", (2, 32): "i4",
         (2, 64): "i8", (3, 16): "f2", (3, 32): "f4", (3, 64): "f8"}  # fmt: skip


def tags_of(data: bytes) -> tuple[str, list[dict[int, Any]]]:
    """Return the byte order and the tags of every directory."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    number, entry, room = ("Q", "HHQ8s", 8) if is_big else ("H", "HHI4s", 4)
    at = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0]
    directories = []
    while at:
        count = struct.unpack_from(order + number, data, at)[0]
        at += struct.calcsize(number)
        tags: dict[int, Any] = {}
        for _ in range(count):
            code, kind, length, inline = struct.unpack_from(order + entry, data, at)
            at += struct.calcsize(order + entry)
            if kind not in SIZES or code in tags:
                continue
            size = length * struct.calcsize(SIZES[kind])
            where = struct.unpack(order + ("Q" if is_big else "I"), inline)[0]
            raw = inline[:size] if size <= room else data[where : where + size]
            tags[code] = raw if kind == 2 else struct.unpack(f"{order}{length}{SIZES[kind]}", raw)
        directories.append(tags)
        at = struct.unpack_from(order + ("Q" if is_big else "I"), data, at)[0]
        if len(directories) > 100:
            raise ValueError("a circle")
    return order, directories


def lzw(data: bytes) -> bytes:
    """Decode the LZW of TIFF: 9 to 12 bits, most significant first, wider one code early."""
    table, out, previous, bits, width, filled = [bytes([i]) for i in range(256)] + [b"", b""], [], b"", 0, 9, 0
    for byte in data:
        bits, filled = (bits << 8) | byte, filled + 8
        if filled < width:
            continue
        filled -= width
        code, bits = bits >> filled, bits & ((1 << filled) - 1)
        if code == 257:
            break
        if code == 256:
            table, width, previous = table[:258], 9, b""
            continue
        entry = table[code] if code < len(table) else previous + previous[:1]
        out.append(entry)
        if previous:
            table.append(previous + entry[:1])
        previous = entry
        width = 9 if len(table) < 511 else 10 if len(table) < 1023 else 11 if len(table) < 2047 else 12
    return b"".join(out)


def plane_of(data: bytes, order: str, tags: dict[int, Any]) -> NDArray[Any]:
    """Return the pixels of one directory."""
    one = lambda code, default: tags.get(code, (default,))[0]  # noqa: E731
    rows, columns, bits, packing, predictor = one(257, 0), one(256, 0), one(258, 1), one(259, 1), one(317, 1)
    dtype = np.dtype(order + TYPES[one(339, 1), bits])
    if one(277, 1) != 1 or one(262, 9) not in (0, 1) or one(266, 1) != 1 or predictor not in (1, 2):
        raise ValueError("not a plain grey page")
    if is_tiled := 322 in tags:
        height, width = one(323, 0), one(322, 0)
        offsets, counts = tags[324], tags[325]
    else:
        height, width = min(one(278, rows), rows), columns
        offsets, counts = tags[273], tags[279]
    plane = np.zeros((rows, columns), dtype)
    per_row = -(-columns // width)
    if len(offsets) != per_row * -(-rows // height):
        raise ValueError("wrong number of parts")
    for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        y, x = index // per_row * height, index % per_row * width
        lines = height if is_tiled else min(height, rows - y)
        raw = data[offset : offset + count]
        if len(raw) != count:
            raise ValueError("a part is not all there")
        raw = {1: bytes, 5: lzw, 8: zlib.decompress, 32946: zlib.decompress}[packing](raw)
        part = np.frombuffer(raw[: lines * width * dtype.itemsize], dtype).reshape(lines, width)
        if predictor == 2:
            part = part.astype(dtype.newbyteorder("=")).cumsum(axis=1, dtype=dtype.newbyteorder("="))
        plane[y : y + lines, x : x + width] = part[: rows - y, : columns - x]
    return plane.astype(dtype.newbyteorder("="))


def tiff_planes(path: Path) -> NDArray[Any]:
    """Return all planes of a TIFF file; one directory heads a block where the description says so."""
    data = path.read_bytes()
    order, directories = tags_of(data)
    planes = [plane_of(data, order, tags) for tags in directories]
    if len(directories) > 1:
        return np.stack(planes)
    text = directories[0][270].rstrip(b"\0").decode("latin-1")
    if text.startswith("ImageJ="):
        said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        count = int(said.get("images", said.get("slices", 1)))
    else:
        count = json.loads(text)["shape"][0]
    offset, plane = directories[0][273][0], planes[0]
    dtype = plane.dtype.newbyteorder(order)
    return np.frombuffer(data, dtype, count * plane.size, offset).reshape(count, *plane.shape)


def page_of_file(path: Path) -> NDArray[Any]:
    data = path.read_bytes()
    order, (tags,) = tags_of(data)
    return plane_of(data, order, tags)


def meta_planes(path: Path) -> NDArray[Any]:
    lines = path.read_bytes().decode("latin-1").split("\n")
    said = {line.split("=")[0].strip(): line.split("=")[1].strip() for line in lines if "=" in line}
    kind = {"MET_USHORT": "u2", "MET_SHORT": "i2", "MET_UCHAR": "u1", "MET_CHAR": "i1"}[said["ElementType"]]
    order = ">" if said.get("BinaryDataByteOrderMSB", "False").lower() == "true" else "<"
    x, y, z = map(int, said["DimSize"].split())
    data = path.with_name(said["ElementDataFile"]).read_bytes()[int(said.get("HeaderSize", "0")) :]
    return np.frombuffer(data, order + kind).reshape(z, y, x)


# ---- What is mutated ----


@dataclass(frozen=True)
class Sort:
    """A way to store ``VOLUME`` in a folder, the file of it that is mutated, and its independent reader."""

    write: Callable[[Path], Path]
    victim: str
    read: Callable[[Path], NDArray[Any]]


def one_file(**options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "scan.tif"
        tifffile.imwrite(path, VOLUME, **({} if options.get("imagej") else {"photometric": "minisblack"}) | options)
        return path

    return write


def paged(folder: Path) -> Path:
    with tifffile.TiffWriter(folder / "scan.tif") as file:
        for plane in VOLUME:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None, description=TEXT, software="x")
    return folder / "scan.tif"


def slices(folder: Path) -> Path:
    (folder / "scan").mkdir()
    for z, plane in enumerate(VOLUME):
        tifffile.imwrite(folder / "scan" / f"recon_{z + 8}.tif", plane, photometric="minisblack", metadata=None)
    return folder / "scan"


def raw(folder: Path) -> Path:
    (folder / "scan.raw").write_bytes(VOLUME.tobytes())
    said = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    said += ["ElementSpacing = 0.02 0.02 0.02", f"DimSize = {SHAPE[2]} {SHAPE[1]} {SHAPE[0]}"]
    said += ["ElementType = MET_USHORT", "ElementDataFile = scan.raw", ""]
    (folder / "scan.mhd").write_text("\n".join(said))
    return folder / "scan.mhd"


def page_planes(path: Path) -> NDArray[Any]:
    files = sorted(path.iterdir(), key=lambda file: int(re.findall(r"\d+", file.name)[0]))
    return np.stack([page_of_file(file) for file in files])


SORTS = {
    "one block": Sort(one_file(), "scan.tif", tiff_planes),
    "one directory": Sort(one_file(truncate=True), "scan.tif", tiff_planes),
    "big-endian": Sort(one_file(byteorder=">", bigtiff=True), "scan.tif", tiff_planes),
    "pages": Sort(paged, "scan.tif", tiff_planes),
    "deflate": Sort(one_file(compression="deflate", predictor=True), "scan.tif", tiff_planes),
    "lzw": Sort(one_file(compression="lzw", rowsperstrip=5), "scan.tif", tiff_planes),
    "tiles": Sort(one_file(tile=(16, 16), compression="deflate"), "scan.tif", tiff_planes),
    "ome": Sort(one_file(ome=True, metadata={"axes": "ZYX"}), "scan.tif", tiff_planes),
    "imagej": Sort(one_file(imagej=True, metadata={"axes": "ZYX"}), "scan.tif", tiff_planes),
    "folder": Sort(slices, "scan/recon_10.tif", page_planes),
    "header": Sort(raw, "scan.mhd", meta_planes),
    "raw": Sort(raw, "scan.raw", meta_planes),
}


def is_text(data: bytes, victim: str) -> NDArray[np.bool_]:
    """Return which bytes are free text."""
    mask = np.zeros(len(data), bool)
    if victim.endswith(".tif"):
        for text in (TEXT.encode(), b"tifffile.py"):
            for found in re.finditer(re.escape(text), data):
                mask[found.start() : found.end()] = True
    return mask


def structure_of(data: bytes) -> NDArray[np.intp]:
    """Return the positions of bytes that are not pixels: those outside the rows of the volume."""
    mask = np.ones(len(data), bool)
    for plane in VOLUME:
        for stored in (plane, plane.astype(">u2")):
            at = data.find(stored.tobytes())
            if at >= 0:
                mask[at : at + plane.nbytes] = False
    return np.flatnonzero(mask)


def mutations(data: bytes, victim: str, num_cuts: int, num_flips: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield cuts at every k bytes, and single flipped bits, half of them where the structure is."""
    for size in np.linspace(0, len(data) - 1, num_cuts).astype(int):
        yield f"cut at {size}", data[:size]
    rng = np.random.default_rng(seed)
    structure = structure_of(data)
    for number in range(num_flips):
        at = int(rng.choice(structure)) if number % 2 and structure.size else int(rng.integers(len(data)))
        bit = int(rng.integers(8))
        changed = bytearray(data)
        changed[at] ^= 1 << bit
        yield f"bit {bit} of byte {at}", bytes(changed)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let a file take 10 s of the processor, not of a busy machine, and 1 GiB more than the process holds already."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {name: signal.signal(name, stop) for name in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(30 * SECONDS)  # what waits for ever uses no processor
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome_of(path: Path) -> NDArray[Any] | str:
    """Return the planes of a volume, or the line that refuses it."""
    try:
        with limits():
            source = open_volume(path)
            return np.stack([plane for _, plane in source.planes(range(source.info.shape[0]))])
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    assert str(path.parent) in line
    return line


def check(sort: Sort, folder: Path, what: str, is_free_text: bool) -> str:
    """Compare the outcome of a mutated file with the independent reader's; say which it was."""
    found = outcome_of(target_of(sort, folder))
    if isinstance(found, str):
        assert not is_free_text, f"{what} is in free text and was refused: {found}"
        return "refused"
    expected = sort.read(target_of(sort, folder))
    assert found.dtype == expected.dtype, what
    assert np.array_equal(found, expected), what
    if what.startswith("cut"):
        assert np.array_equal(found, VOLUME), f"{what} was taken and is not the whole volume"
    return "unchanged" if np.array_equal(found, VOLUME) and found.dtype == VOLUME.dtype else "other pixels"


def target_of(sort: Sort, folder: Path) -> Path:
    """Return the volume of a folder: the file, its header, or the folder of slices."""
    names = {"scan/recon_10.tif": "scan", "scan.raw": "scan.mhd"}
    return folder / names.get(sort.victim, sort.victim)


def fuzz(sort: Sort, folder: Path, *, num_cuts: int, num_flips: int, sliced_every: int, seed: int) -> Counter[str]:
    """Mutate one sort of file many times; every n-th goes through the slicer, too."""
    sort.write(folder)
    victim = folder / sort.victim
    data = victim.read_bytes()
    assert np.array_equal(outcome_of(target_of(sort, folder)), VOLUME)
    assert np.array_equal(sort.read(target_of(sort, folder)), VOLUME)
    text = is_text(data, sort.victim)
    outcomes = Counter[str]()
    for number, (what, changed) in enumerate(mutations(data, sort.victim, num_cuts, num_flips, seed)):
        victim.write_bytes(changed)
        at = re.fullmatch(r"bit \d of byte (\d+)", what)
        outcome = check(sort, folder, what, bool(at and text[int(at[1])]))
        outcomes[outcome] += 1
        if number % sliced_every == 0:
            check_slices(target_of(sort, folder), folder / "out", outcome)
    return outcomes


def check_slices(path: Path, out: Path, outcome: str) -> None:
    """Slice a mutated volume; a dataset appears exactly if the volume is taken, and nothing else is left."""
    before = sorted(out.parent.iterdir())
    words = ["--volumes", f"dry={path}", "--output_dir", str(out), "--split", "none", "--slice_axes", "thickness"]
    with limits(), contextlib.suppress(InputError), contextlib.redirect_stdout(None):
        main(load(SliceConfig, [*words, "--workers", "1"]))
    # Grey levels that are all the same are refused later than a damaged file.
    assert not (out.exists() and outcome == "refused")
    if out.exists():
        assert (out / "manifest.json").is_file()
        shutil.rmtree(out)
    assert sorted(out.parent.iterdir()) == before


def report(outcomes: dict[str, Counter[str]]) -> None:
    """Print how the files ended, and check that neither taking nor refusing is the answer to everything."""
    total = sum(outcomes.values(), Counter[str]())
    for name, some in outcomes.items():
        print(f"{name:<14} " + ", ".join(f"{what} {count}" for what, count in sorted(some.items())))
    accepted = total.total() - total["refused"]
    print(
        f"{total.total()} mutated files: {accepted} taken ({accepted / total.total():.0%}), {total['refused']} refused"
    )
    assert 0 < accepted < total.total()


def test_a_sample_of_damaged_files(tmp_path: Path) -> None:
    outcomes = {}
    for name, sort in SORTS.items():
        (tmp_path / name).mkdir()
        outcomes[name] = fuzz(sort, tmp_path / name, num_cuts=3, num_flips=4, sliced_every=7, seed=1)
    report(outcomes)


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {}
    for name, sort in SORTS.items():
        (tmp_path / name).mkdir()
        outcomes[name] = fuzz(sort, tmp_path / name, num_cuts=60, num_flips=240, sliced_every=10, seed=0)
    with capsys.disabled():
        print()
        report(outcomes)
    assert sum(some.total() for some in outcomes.values()) >= 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MEMORY


def test_every_bit_of_free_text_may_flip(tmp_path: Path) -> None:
    path = paged(tmp_path)
    data = path.read_bytes()
    places = np.flatnonzero(is_text(data, "scan.tif"))
    assert places.size >= len(TEXT) * SHAPE[0]
    rng = np.random.default_rng(0)
    for at in rng.choice(places, 60, replace=False):
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert np.array_equal(outcome_of(path), VOLUME)


@pytest.mark.slow
def test_the_command_answers_with_one_line_and_its_code(tmp_path: Path) -> None:
    path = paged(tmp_path)
    data = path.read_bytes()
    codes = Counter[int]()
    for what, changed in mutations(data, "scan.tif", 6, 12, seed=5):
        path.write_bytes(changed)
        command = [sys.executable, "-m", "data_prep.slice", "--volumes", f"dry={path}", "--split", "none"]
        done = subprocess.run(
            [*command, "--output_dir", str(tmp_path / "out"), "--overwrite"],
            capture_output=True,
            text=True,
            check=False,
        )
        codes[done.returncode] += 1
        assert done.returncode in (0, 3), what
        if done.returncode:
            assert done.stderr.startswith("error: "), what
            assert done.stderr.count("\n") == 1, what
    assert min(codes[0], codes[3]) > 0
