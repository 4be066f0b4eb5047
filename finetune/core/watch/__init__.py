"""What is looked at while a run learns: losses, drift, previews."""
