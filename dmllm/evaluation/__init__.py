"""How good is a model? Suites of questions in YAML, metrics, a resumable runner, and a report to look at.

eval/suites/*.yaml -> config.py -> tasks.py (questions) -> runner.py (answers) -> results.py (scores) -> report.py
"""
