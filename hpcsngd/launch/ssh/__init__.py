"""Sites without a scheduler whose hosts are reached by ssh: agents are started, asked and ended there."""
