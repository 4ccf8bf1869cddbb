"""The operators of evolutionary search: pure functions, one a file."""
