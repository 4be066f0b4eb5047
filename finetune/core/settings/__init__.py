"""Settings of the recipes, without torch."""
