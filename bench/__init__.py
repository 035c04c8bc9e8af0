"""Measurements of jasper_fast against what people use today: `python -m bench --help`."""
