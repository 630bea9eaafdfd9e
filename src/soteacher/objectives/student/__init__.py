"""Objectives and methods that train students, one a file."""
