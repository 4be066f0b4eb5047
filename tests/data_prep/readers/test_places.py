"""URLs: the same planes through fsspec as from the disk, and one line when there is nothing there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume
from data_prep.readers.places import Url, place_of, sha256_of

fsspec = pytest.importorskip("fsspec")

VOLUME = np.random.default_rng(3).integers(0, 60000, (6, 20, 24), dtype=np.uint16)


def upload(folder: Path, url: str) -> None:
    """Copy a folder into fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe(f"/{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def planes_of(place: Any, **settings: Any) -> np.ndarray:
    source = open_volume(place, ReadConfig(**settings))
    return np.array([plane for _, plane in source.planes(range(source.info.shape[0]))])


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"tile": (16, 16)}, {"ome": True}])
def test_a_tiff_elsewhere_reads_as_here(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME, photometric="minisblack", metadata={"axes": "ZYX"}, **options)
    upload(tmp_path, "tiff")
    place = place_of("memory://tiff/scan.tif")
    assert isinstance(place, Url)
    assert np.array_equal(planes_of(place), VOLUME)
    assert sha256_of(place, ()) == sha256_of(tmp_path / "scan.tif", ())


def test_a_folder_of_slices_elsewhere_reads_as_here(tmp_path: Path) -> None:
    for z, plane in enumerate(VOLUME):
        tifffile.imwrite(tmp_path / f"recon_{z}.tif", plane)
    upload(tmp_path, "slices")
    assert np.array_equal(planes_of(place_of("memory://slices")), VOLUME)


def test_a_header_elsewhere_finds_its_voxels(tmp_path: Path) -> None:
    (tmp_path / "scan.raw").write_bytes(VOLUME.tobytes())
    (tmp_path / "scan.mhd").write_text("DimSize = 24 20 6\nElementType = MET_USHORT\nElementDataFile = scan.raw\n")
    upload(tmp_path, "raw")
    assert np.array_equal(planes_of(place_of("memory://raw/scan.mhd")), VOLUME)


def test_hdf5_elsewhere_reads_as_here(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("data", data=VOLUME, chunks=(2, 8, 8), compression="gzip")
    upload(tmp_path, "hdf5")
    assert np.array_equal(planes_of(place_of("memory://hdf5/scan.h5")), VOLUME)


def test_zarr_elsewhere_reads_as_here(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    zarr.create_array(str(tmp_path / "scan.zarr"), data=VOLUME, chunks=(2, 8, 8))
    upload(tmp_path, "zarr")
    assert np.array_equal(planes_of(place_of("memory://zarr/scan.zarr")), VOLUME)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/scan.tif", "no such file"),
        ("weird://a/scan.tif", "weird://a/scan.tif: cannot be opened .*weird"),
    ],
)
def test_what_is_not_there_is_one_line(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_volume(place_of(url))
    assert "\n" not in str(caught.value)


class Quiet(SimpleHTTPRequestHandler):
    """Serves ranges of files, as object stores do, and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        first, end = 0, len(data)
        if span := self.headers.get("Range"):
            low, high = span.removeprefix("bytes=").split("-")
            first, end = int(low), min(int(high) + 1, end) if high else end
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(end - first))
        self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[first:end])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of this machine for the files in ``tmp_path``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("HTTPFileSystem requires aiohttp")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=r"requires aiohttp\); for http and s3: pip install 'tisserand\[remote\]'"):
        open_volume(place_of("http://127.0.0.1/scan.tif"))


class Interrupted:
    """A file whose connection ends at a byte, as fsspec hands it out."""

    def __init__(self, file: Any, error: Exception, end: int) -> None:
        self.file, self.error, self.end = file, error, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        if self.file.tell() + size > self.end:
            raise self.error
        return self.file.read(size)


@pytest.mark.parametrize("flags", [{}, {"skip_bad_planes": True}])
@pytest.mark.parametrize("options", [{}, {"compression": "deflate"}])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("connection reset"), r"cannot be read \(connection reset\); try again, or download it first"),
        (ValueError("server doesn't appear to support range requests"), "sends whole files only; download it first"),
    ],
)
def test_a_connection_that_ends_is_one_line_and_no_bad_plane(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
    options: dict[str, Any],
    flags: dict[str, Any],
) -> None:
    with tifffile.TiffWriter(tmp_path / "scan.tif") as file:
        for plane in VOLUME:
            file.write(plane, photometric="minisblack", contiguous=False, **options)
    upload(tmp_path, "cut")
    files = type(fsspec.filesystem("memory"))
    opened = files.open
    with tifffile.TiffFile(tmp_path / "scan.tif") as tif:
        last = max(tif.pages[-1].dataoffsets)
    monkeypatch.setattr(files, "open", lambda *args: Interrupted(opened(*args), error, last + 1))
    with pytest.raises(InputError, match=message) as caught:
        planes_of(place_of("memory://cut/scan.tif"), **flags)
    assert "\n" not in str(caught.value)


def test_a_page_of_the_web_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "scan").write_text("<!DOCTYPE HTML>\n<html><title>Directory listing</title></html>")
    upload(tmp_path, "page")
    with pytest.raises(InputError, match="is a web page, not a volume; name a file"):
        open_volume(place_of("memory://page/scan"))


def test_a_tiff_on_a_web_server_reads_as_here(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    tifffile.imwrite(tmp_path / "scan.tif", VOLUME, photometric="minisblack", compression="deflate")
    assert np.array_equal(planes_of(place_of(f"{server}/scan.tif")), VOLUME)
    with pytest.raises(InputError, match="no such file"):
        open_volume(place_of(f"{server}/none.tif"))
