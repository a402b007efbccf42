"""What runs the cells of a study: this process, several on this machine, or a Ray cluster."""
