"""What the text in a TIFF file says about its axes and the size of a voxel: ImageJ, OME, and tifffile's own JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tifffile

from configs.errors import InputError
from data_prep.readers.places import Place

# Factor to micrometres by the spellings that microscopes, scanners and ImageJ write.
UNITS_UM = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0}
UNITS_UM |= {"\u00b5m": 1.0, "\u03bcm": 1.0, "\\u00b5m": 1.0, "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3}
UNITS_UM |= {"cm": 1e4, "centimeter": 1e4, "m": 1e6, "meter": 1e6, "inch": 25400.0, "in": 25400.0}
UNITS_UM |= {"nanometer": 1e-3, "angstrom": 1e-4, "\u00c5": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What the metadata says of one stack.

    Attributes:
        names: letters of the axes in stored order, such as ``TZYX``.
        sizes: their lengths.
        pages: directory of each plane where the metadata names them; None if they follow in order.
    """

    names: str
    sizes: tuple[int, ...]
    pages: tuple[int | None, ...] | None = None

    @property
    def num_planes(self) -> int:
        """Planes in the stack."""
        return math.prod(size for name, size in zip(self.names, self.sizes, strict=True) if name not in "YXS")

    @property
    def words(self) -> str:
        """The axes in words."""
        return ", ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


def axes_of(path: Place, tif: tifffile.TiffFile) -> list[Axes]:
    """Return what the metadata says of each stack in the file; nothing if there is no such metadata.

    Raises:
        InputError: the metadata contradict themselves, or the volume is spread over several files.
    """
    if not (tif.is_ome or tif.is_imagej or tif.is_shaped or tif.is_stk):
        return []
    found = []
    for series in tif.series:
        if series.kind not in ("ome", "imagej", "shaped", "stk"):
            if tif.is_ome:
                raise InputError(f"{path}: its OME metadata cannot be read; the file is truncated or damaged")
            return []
        if series.is_multifile:
            raise InputError(f"{path}: is one of several files of a volume; save the volume as a single file")
        if series.keyframe.is_reduced or isinstance(series.keyframe.index, tuple):
            continue
        pages = None
        if series.kind == "ome":
            pages = tuple(None if page is None else int(page.index) for page in series.pages)
        found.append(Axes(names=series.axes, sizes=tuple(map(int, series.shape)), pages=pages))
    if tif.is_imagej and found:
        found = [_of_imagej(path, tif.imagej_metadata or {}, found[0])]
    return found


def _of_imagej(path: Place, said: dict[str, Any], axes: Axes) -> Axes:
    """Compare the number of images with the product of the three sizes; either may stand alone."""
    sizes = [said.get(name, 1) for name in ("frames", "slices", "channels")]
    images = said.get("images", math.prod(sizes))
    if math.prod(sizes) == 1 and images != axes.num_planes and "S" not in axes.names:
        return Axes(names=f"I{axes.names[-2:]}", sizes=(images, *axes.sizes[-2:]))
    if images != math.prod(sizes) and math.prod(sizes) != 1 and "S" not in axes.names:
        raise InputError(
            f"{path}: is damaged: ImageJ's description says {images} images, "
            f"and frames x slices x channels = {' x '.join(map(str, sizes))}"
        )
    return axes


def voxel_um_of(tif: tifffile.TiffFile) -> tuple[float, float, float] | None:
    """Return the voxel's edges along (Z, Y, X) if the file gives all three with a unit, else None."""
    if tif.ome_metadata:
        return _voxel_um_of_ome(tif.ome_metadata)
    said = tif.imagej_metadata or (tif.shaped_metadata[0] if tif.shaped_metadata else {})
    factor = UNITS_UM.get(str(said.get("unit", "")).strip().lower())
    spacing, page = said.get("spacing"), tif.pages.first
    if factor is None or not isinstance(spacing, int | float):
        return None
    try:
        per_unit = [page.tags[name].value for name in ("YResolution", "XResolution")]
        in_plane = [denominator / numerator for numerator, denominator in per_unit]
        tag = {2: 25400.0, 3: 1e4}.get(int(page.tags["ResolutionUnit"].value), factor)  # inch, centimetre
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # Some writers mean the unit in words and leave the tag at inch; the spacing tells which of the two is meant.
    for factor_in_plane in (factor, tag):
        edges = plausible(float(spacing) * factor, *(edge * factor_in_plane for edge in in_plane))
        if edges is not None and max(edges) < 10 * min(edges):
            return edges
    return None


def _voxel_um_of_ome(xml: str) -> tuple[float, float, float] | None:
    """Read PhysicalSizeZ, Y, X from OME metadata."""
    pixels: Any = tifffile.xml2dict(xml).get("OME", {}).get("Image", {})
    pixels = pixels[0] if isinstance(pixels, list) else pixels
    pixels = pixels.get("Pixels", {})
    edges = []
    for axis in "ZYX":
        size = pixels.get(f"PhysicalSize{axis}")
        factor = UNITS_UM.get(str(pixels.get(f"PhysicalSize{axis}Unit", "um")).lower())
        if not isinstance(size, int | float) or factor is None:
            return None
        edges.append(float(size) * factor)
    return plausible(*edges)


def plausible(*edges: float) -> tuple[float, float, float] | None:
    """Return the three edges if they are positive and finite."""
    z, y, x = edges
    return (z, y, x) if all(math.isfinite(edge) and edge > 0 for edge in edges) else None
