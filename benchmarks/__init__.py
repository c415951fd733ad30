"""Measurements of Secateur; each file is a script, and the results lie in ``results``."""
