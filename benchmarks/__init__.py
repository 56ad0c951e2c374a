"""Benchmarks: what is measured (``bench_*.py``), how (``runner.py``), and what is kept of it (``rows.py``)."""
