"""What a model forgot: evidence, scores, verdicts."""
