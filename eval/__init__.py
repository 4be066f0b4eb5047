"""Generation and measurements of what a model makes, kept and forgot."""
