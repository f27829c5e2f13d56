"""What operators of a server see: Prometheus metrics and a log line (stat_logger.py), and a live page (page.py).

Both read the counters that the worker keeps in a file (stats_file.py). Neither can change anything in the engine.
"""
