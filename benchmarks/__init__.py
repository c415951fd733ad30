"""Benchmarks of Secateur. Each file is a script; the results are in ``results``."""
