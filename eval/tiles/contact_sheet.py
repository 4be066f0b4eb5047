"""Pictures laid out in a grid with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    images: np.ndarray | Sequence[np.ndarray],
    rows: int,
    columns: int,
    labels: Sequence[str] = (),
    headers: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures out in a grid, row by row, with captions.

    Args:
        images: ``rows * columns`` pictures of one shape, (H, W, 3) or (H, W), uint8.
        rows: pictures from top to bottom.
        columns: pictures from left to right.
        labels: one per row, written above it, or one per picture, written above each; or none.
        headers: one per column, written once at the top; or none.

    Small pictures are enlarged by whole pixels, large ones reduced, so that a cell is about 128 to 384 px.
    """
    if len(images) != rows * columns:
        raise ValueError(f"{len(images)} pictures do not fill {rows} x {columns} cells")
    if len(labels) not in {0, rows, rows * columns} or len(headers) not in {0, columns}:
        raise ValueError(f"labels: 0, {rows} or {rows * columns}, not {len(labels)}; headers: 0 or {columns}")
    cells = [_cell(image) for image in images]
    width, height = cells[0].size
    gap, size = 6, 13
    font = ImageFont.load_default(size=size)
    line = size + 5
    top = gap + (line if headers else 0)
    pitch_y = height + gap + (line if labels else 0)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + rows * pitch_y), "white")
    draw = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        draw.text((gap + column * (width + gap), gap), _fit(header, font, width), fill="black", font=font)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap), top + row * pitch_y
        if len(labels) == len(cells) or (labels and column == 0):
            one_each = len(labels) == len(cells)
            room = width if one_each else columns * (width + gap) - gap
            draw.text((x, y), _fit(labels[index if one_each else row], font, room), fill="black", font=font)
        sheet.paste(cell, (x, y + (line if labels else 0)))
    return sheet


def _cell(image: np.ndarray) -> Image.Image:
    """Bring one picture to the size of a cell."""
    picture = Image.fromarray(image).convert("RGB")
    longest = max(picture.size)
    if longest <= 96:
        return picture.resize([side * (128 // longest) for side in picture.size], Image.Resampling.NEAREST)
    if longest > 384:
        return picture.resize([max(1, round(side * 384 / longest)) for side in picture.size], Image.Resampling.LANCZOS)
    return picture


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a caption to the width it has, marking the cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
