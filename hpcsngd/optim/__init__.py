"""Second-order preconditioners that stand beside any torch optimizer. They know no files."""
