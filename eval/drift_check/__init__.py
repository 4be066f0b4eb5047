"""The work of ``eval.drift``: both models asked the same, judged, and shown side by side."""
