"""Finished runs -> tables, statistics and plots; reads the files of runs, never live objects."""
