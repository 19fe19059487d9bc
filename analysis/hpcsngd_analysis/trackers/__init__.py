"""Experiment trackers, fed from the metrics files: nothing here is needed to train or to write a report.

`history` turns the tables of a run into numbers by tag and step, a `Tracker` takes them, `export` does so
once or until the runs have ended. Each tracker imports its library when it is made.
"""
