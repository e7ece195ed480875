"""Which way of learning, at the same size, on the same data? Paradigms trained, asked and drawn side by side.

eval/suites/paradigms.yaml -> config.py -> driver.py -> job.py (train one, then texts.py, bound.py) -> summary.py (means
over seeds) -> report.py (report.html, and the tables of docs/paradigms.md)
"""
