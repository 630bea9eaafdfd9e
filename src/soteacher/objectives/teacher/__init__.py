"""Objectives and methods that train teachers, one a file."""
