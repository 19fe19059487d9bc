"""Images: what a ``.sif`` file says about itself, definitions, and the build."""
