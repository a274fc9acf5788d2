"""Rows sorted by group, each multiplied by the matrix of its group."""
