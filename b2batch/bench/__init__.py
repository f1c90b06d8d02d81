"""Workloads against peers in one run: the engine beside what else one could use, and the driver at scale.

workload.py      what is measured (YAML in configs/bench)
comparison.py    peers in turn, each round in a process of its own → record.py → table.py, plot.py
peer_*.py        one way to answer rows each; ``peers.py`` is their table
steps.py         prefill and decode speed by batch and context, as fractions of the roofline
driver_scale.py  dispatch, resume and plan with a million units, no model
"""
