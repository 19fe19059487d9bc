"""From a resolved configuration to processes on nodes. Never imports torch."""
