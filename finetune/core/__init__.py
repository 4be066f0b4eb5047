"""The parts that recipes are made of; knows nothing about recipes."""
