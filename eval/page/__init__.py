"""The report: its inputs, sections, curves and pictures."""
