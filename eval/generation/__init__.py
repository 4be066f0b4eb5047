"""Pictures from prompts and seeds, with a record of what gives each of them again."""
