"""hpcsngd: distributed second-order training experiments on HPC clusters.

Importing this package imports nothing else: the command line must start fast on a login node.
"""

__version__ = "0.1.0"
