"""Voxels without a format: a raw file described by the command line, or by a header in text beside or before them.

Headers: MetaImage (``.mhd`` with a raw file, ``.mha`` with the voxels inside), VGStudio (``.vgi``), Nikon
(``.xtekct``). A raw file says nothing of itself, so its size must be exactly what the shape and the type ask for.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from data_prep.readers.info import ReadConfig, Unopened, VolumeInfo
from data_prep.readers.places import Place, beside, open_place, read_into, size_of
from data_prep.readers.tiff_metadata import UNITS_UM, plausible
from data_prep.readers.tiff_pages import native

_HEADERS, _RAW = (".mhd", ".mha", ".vgi", ".xtekct"), (".raw", ".vol", ".bin", ".dat")
# Bytes of a header that are looked at; real ones have a few hundred.
_LONGEST_HEADER = 1 << 20
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_VGI_TYPES = {"unsigned integer": "u", "integer": "i", "signed integer": "i", "float": "f"}
_RAW_TYPES = {1: "uint8", 2: "uint16", 4: "float32", 8: "float64"}


@dataclass(frozen=True, kw_only=True)
class RawVolume:
    """Voxels that follow one another from ``offset`` on, the X axis fastest."""

    info: VolumeInfo
    voxels: Place
    stored_dtype: np.dtype[Any]
    offset: int

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z, plane of shape (Y, X) in native byte order), in the order asked for, each read once."""
        with open_place(self.voxels) as file:
            for z in indices:
                plane = np.empty(self.info.shape[1:], self.stored_dtype)
                if read_into(file, self.offset + z * plane.nbytes, plane) < plane.nbytes:
                    raise InputError(f"{self.voxels}: plane {z} ends early; did the file change while it was read?")
                yield z, native(plane)


def is_described(at: Unopened) -> bool:
    """Tell a file that the command line describes as raw voxels, whatever it holds."""
    return at.config.raw_shape is not None and at.path.suffix.lower() not in _HEADERS


def has_header(at: Unopened) -> bool:
    """Tell a header of raw voxels by its name."""
    return bool(at.head) and at.path.suffix.lower() in _HEADERS


def is_raw(at: Unopened) -> bool:
    """Tell raw voxels by the name of their file; what they are must be said."""
    return bool(at.head) and at.path.suffix.lower() in _RAW


def open_raw(path: Place, config: ReadConfig) -> RawVolume:
    """Open a raw file that the command line describes.

    Raises:
        InputError: shape or type were not given, or the file is longer or shorter than they ask for.
    """
    if config.raw_shape is None or config.raw_dtype is None:
        raise InputError(
            f"{path}: a raw file says nothing of itself; give --raw_shape (z y x) and --raw_dtype, and --raw_offset "
            f"and --raw_byteorder where they differ from 0 and little{_guess(path)}"
        )
    dtype = np.dtype(config.raw_dtype).newbyteorder("<" if config.raw_byteorder == "little" else ">")
    volume = RawVolume(
        info=VolumeInfo(path=path, shape=config.raw_shape, dtype=dtype.name, storage="raw", num_bytes=0),
        voxels=path,
        stored_dtype=dtype,
        offset=config.raw_offset,
    )
    return _checked(volume, config, "--raw_shape, --raw_dtype and --raw_offset ask for")


def _guess(path: Place) -> str:
    """Suggest a shape where the name holds three numbers that fit the size of the file."""
    import re

    size = size_of(path)
    for found in re.finditer(r"(?=(?<!\d)(\d+)[x_](\d+)[x_](\d+)(?!\d))", path.name):
        x, y, z = map(int, found.groups())
        for item, name in _RAW_TYPES.items():
            if x * y * z * item == size:
                return f"; its name and size would fit --raw_shape {z} {y} {x} --raw_dtype {name}"
    return ""


def _checked(volume: RawVolume, config: ReadConfig, who: str) -> RawVolume:
    """Check that a file holds exactly the voxels it should, and take the whole planes of a cut one if asked to."""
    there, info = size_of(volume.voxels), volume.info
    plane = math.prod(info.shape[1:]) * volume.stored_dtype.itemsize
    needed = volume.offset + info.shape[0] * plane
    if min(info.shape) < 1:
        raise InputError(f"{info.path}: the shape {'x'.join(map(str, info.shape))} is empty")
    if info.shape[0] == 1:
        raise InputError(f"{info.path}: holds one picture, not a volume; python -m data_prep.images takes pictures")
    if there < needed and config.allow_truncated and there >= volume.offset + 2 * plane:
        count = (there - volume.offset) // plane
        said = f"is cut off ({there} of {needed} bytes); {count} whole planes are taken"
        info = replace(info, shape=(count, *info.shape[1:]), warnings=(*info.warnings, said))
    elif there != needed:
        kind = "is truncated: " if there < needed else ""
        raise InputError(
            f"{info.path}: {kind}{who} {'x'.join(map(str, info.shape))} {info.dtype} voxels after byte "
            f"{volume.offset}, {needed} bytes, and {volume.voxels.name} has {there}"
        )
    return replace(volume, info=replace(info, num_bytes=there))


def open_header(path: Place, config: ReadConfig) -> RawVolume:
    """Open the volume that a header in text describes.

    Raises:
        InputError: a line is missing or says what is not read, or the voxels are longer or shorter than it says.
    """
    with open_place(path) as file:
        head = _start(file, min(_LONGEST_HEADER, size_of(path)))
    suffix = path.suffix.lower()
    try:
        volume = _of_meta(path, head) if suffix in (".mhd", ".mha") else _of_sections(path, head, suffix)
    except (KeyError, ValueError, configparser.Error) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: the header {' '.join(what.split())[:200]}") from None
    return _checked(volume, config, "the header asks for")


def _start(file: Any, count: int) -> bytes:
    """Return the first bytes of a file."""
    head = np.empty(count, np.uint8)
    read_into(file, 0, head)
    return head.tobytes()


def _of_meta(path: Place, head: bytes) -> RawVolume:
    """Read a MetaImage header: lines of ``Key = value``, the last of which names the file of the voxels."""
    said: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in said:
        line, end, _ = head[position:].partition(b"\n")
        if not end and not line:
            raise KeyError("ElementDataFile")
        position += len(line) + len(end)
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals:
            raise ValueError(f"has a line without '=': {line[:60]!r}")
        if key.strip() in said:
            raise ValueError(f"gives {key.strip()} twice")
        said[key.strip()] = value.strip()
    if said["ElementDataFile"].upper() != "LOCAL" and head[position:].strip():
        raise ValueError("has lines after ElementDataFile, which is the last one by definition; move them before it")
    if said.get("NDims", "3") != "3" or said.get("ElementNumberOfChannels", "1") != "1":
        raise ValueError("describes no grey volume of three axes")
    if _flag(said, "CompressedData"):
        raise ValueError("says CompressedData = True, which is not read; save it uncompressed")
    if not _flag(said, "BinaryData", default=True):
        raise ValueError("says BinaryData = False, which is not read; save it as binary")
    type_name = said["ElementType"]
    if type_name not in _META_TYPES:
        raise ValueError(f"says ElementType = {type_name}; read are {', '.join(_META_TYPES)}")
    orders = {_flag(said, key) for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if key in said}
    if len(orders) > 1:
        raise ValueError("gives two byte orders")
    x, y, z = _numbers(said["DimSize"], int)
    dtype = np.dtype(_META_TYPES[type_name]).newbyteorder(">" if orders == {True} else "<")
    size = said.get("ElementSpacing", said.get("ElementSize"))
    edges = plausible(*(1000 * edge for edge in reversed(_numbers(size, float)))) if size else None
    name, offset = said["ElementDataFile"], int(said.get("HeaderSize", "0"))
    if name.upper() == "LOCAL":
        voxels, offset = path, position
    elif "%" in name or name.upper().startswith("LIST"):
        raise ValueError("names a list of files, which is not read; save one raw file")
    else:
        voxels = _named(path, name)
    if offset == -1:
        # By definition: the voxels are the end of the file.
        offset = size_of(voxels) - x * y * z * dtype.itemsize
    if offset < 0:
        raise ValueError(f"gives an offset of {offset}")
    turned = said.get("TransformMatrix", "1 0 0 0 1 0 0 0 1")
    is_turned = _numbers(turned, float, count=9) != [1, 0, 0, 0, 1, 0, 0, 0, 1]
    info = VolumeInfo(
        path=path,
        shape=(z, y, x),
        dtype=dtype.name,
        storage="MetaImage",
        num_bytes=0,
        files=(path,) if voxels == path else (path, voxels),
        voxel_um=edges,
        warnings=("the header turns the volume (TransformMatrix); planes are as stored",) * is_turned,
        notes=("spacing of the header taken as millimetres",) if edges else (),
    )
    return RawVolume(info=info, voxels=voxels, stored_dtype=dtype, offset=offset)


def _of_sections(path: Place, head: bytes, suffix: str) -> RawVolume:
    """Read a header of ``[section]`` and ``key = value`` lines, as VGStudio and Nikon write them."""
    lines = [line for line in head.decode("latin-1").splitlines() if not line.lstrip().startswith("{")]
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",), comment_prefixes=("#", ";"))
    parser.read_string("\n".join(lines))
    return _of_nikon(path, parser) if suffix == ".xtekct" else _of_vgi(path, parser)


def _of_vgi(path: Place, parser: configparser.ConfigParser) -> RawVolume:
    """Read a VGStudio header; what describes the file wins over what describes the volume in the program."""
    said: dict[str, str] = {}
    for section in ("representation", "geometry", "file1"):
        if parser.has_section(section):
            said |= dict(parser.items(section))
    if said.get("fileformat", "raw").lower() != "raw" or said.get("compressionmode", "none").lower() != "none":
        raise ValueError("describes a file that is not plain raw")
    x, y, z = _numbers(said["size"], int)
    kind, bits = said["datatype"].lower(), int(said["bitsperelement"])
    if kind not in _VGI_TYPES or bits not in (8, 16, 32, 64):
        raise ValueError(f"says datatype {kind} of {bits} bits, which is not read")
    dtype = np.dtype(f"{_VGI_TYPES[kind]}{bits // 8}").newbyteorder("<")
    size, unit = said.get("resolution"), UNITS_UM.get(said.get("unit", "").lower())
    edges = plausible(*(unit * edge for edge in reversed(_numbers(size, float)))) if size and unit else None
    return _beside(path, said["name"], int(said.get("skipheader", "0")), (z, y, x), dtype, "VGStudio raw", edges)


def _of_nikon(path: Place, parser: configparser.ConfigParser) -> RawVolume:
    """Read a Nikon header, which leaves the type of a voxel to the size of the file."""
    said = dict(parser.items("XTekCT"))
    z, y, x = (int(said[f"voxels{axis}"]) for axis in "zyx")
    z_mm, y_mm, x_mm = (float(said[f"voxelsize{axis}"]) for axis in "zyx")
    name = f"{said['name']}.vol"
    count, size = x * y * z, size_of(_named(path, name))
    bits = {4: "<f4", 2: "<u2"}
    if count < 1 or size % count or size // count not in bits:
        raise ValueError(
            f"asks for {z}x{y}x{x} voxels, and {name} of {size} bytes holds neither 16 nor 32 bits of each"
        )
    edges = plausible(1000 * z_mm, 1000 * y_mm, 1000 * x_mm)
    return _beside(path, name, 0, (z, y, x), np.dtype(bits[size // count]), "Nikon raw", edges)


def _beside(
    path: Place,
    name: str,
    offset: int,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    storage: str,
    voxel_um: tuple[float, float, float] | None,
) -> RawVolume:
    """Return the volume in a file beside its header."""
    voxels = _named(path, name)
    if offset < 0:
        raise ValueError(f"gives an offset of {offset}")
    info = VolumeInfo(
        path=path,
        shape=shape,
        dtype=dtype.name,
        storage=storage,
        num_bytes=0,
        files=(path, voxels),
        voxel_um=voxel_um,
    )
    return RawVolume(info=info, voxels=voxels, stored_dtype=dtype, offset=offset)


def _named(path: Place, name: str) -> Place:
    """Return the file that a header names; it must lie beside the header."""
    if not name or set(name) & set("/\\\0") or name in (".", ".."):
        raise ValueError(f"names a file outside its folder: {name[:80]!r}")
    voxels = beside(path, name)
    open_place(voxels).close()  # says in one line that it is missing
    return voxels


def _numbers(text: str, kind: Any, count: int = 3) -> list[Any]:
    """Read numbers between spaces."""
    numbers = [kind(word) for word in text.split()]
    if len(numbers) != count:
        raise ValueError(f"gives {len(numbers)} numbers for {count}: {text[:60]!r}")
    return numbers


def _flag(said: dict[str, str], key: str, *, default: bool = False) -> bool:
    """Read True or False."""
    text = said.get(key, str(default)).lower()
    if text not in ("true", "false"):
        raise ValueError(f"says {key} = {text[:20]}; True or False are known")
    return text == "true"
