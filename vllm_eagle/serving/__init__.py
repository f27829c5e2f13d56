"""A server's front end: what its operators see, and how it streams.

Prometheus metrics and a log line (stat_logger.py) and a live page (page.py) read the counters that the worker keeps in a file
(stats_file.py), and can change nothing in the engine. streams.py hands answers that are parsed to vLLM's parsers token by token.
"""
