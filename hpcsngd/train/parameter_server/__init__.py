"""Synchronous and asynchronous SGD with one server and any number of workers."""
