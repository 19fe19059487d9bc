"""LSF: text that is rendered and parsed, the launchers of its jobs, and what runs on their hosts."""
