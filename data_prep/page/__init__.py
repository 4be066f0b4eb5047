"""A dataset on one page, for somebody to look at."""
