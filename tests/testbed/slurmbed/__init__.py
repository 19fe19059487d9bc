"""A real Slurm with several nodes on one machine, for tests of code that talks to Slurm.

The machine itself is the login node: munged, MariaDB, slurmdbd and slurmctld run on it. Each compute node is
a slurmd with a network, host name and mount namespace of its own, joined to the login node by a bridge.

``layout`` names things and ``config`` renders the files (pure); ``packages``, ``network``, ``processes``,
``services`` and ``claims`` each touch one part of the machine; ``cluster`` puts them in order; ``cli`` is the
command line. Only the standard library is used, because the script runs before any environment exists.
"""
