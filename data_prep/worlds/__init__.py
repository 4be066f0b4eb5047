"""Drawn worlds: woven volumes of known geometry, and captioned shapes and textures."""
