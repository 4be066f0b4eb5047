"""The language shared by captions, prompts and probes."""
