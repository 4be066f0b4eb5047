"""The tiles that are compared: cut, read, encoded."""
