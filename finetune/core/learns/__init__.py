"""What learns: weights, adapters, words, their averages, and the optimizer."""
