"""Sentences around a new word, so that it is learned as a thing or as a look, and not as a whole caption.

The lists are those of Textual Inversion (Gal et al. 2022, arXiv:2208.01618, appendix), which took them from CLIP's
templates for ImageNet (Radford et al. 2021, arXiv:2103.00020). ``{}`` stands for the word.
"""

from __future__ import annotations

from typing import Literal

Property = Literal["object", "style"]

OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)


def fill(learnable_property: Property, word: str) -> tuple[str, ...]:
    """Return the sentences for an object or a style, with the word put in; a sentence may be there twice."""
    templates = {"object": OBJECT, "style": STYLE}[learnable_property]
    return tuple(template.replace("{}", word) for template in templates)
