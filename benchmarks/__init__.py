"""Benchmarks: ratios within one run, never timed tests. `make bench` runs them; results: RESULTS.md."""

import os

# libgomp's threads otherwise spin while they wait, which counts as CPU time. Here, because whoever runs one
# of these modules comes through here before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
