"""A site's scheduler, played on this machine: its commands, its rules and its manners, without a cluster."""
