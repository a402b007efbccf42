"""The families of MoE blocks, one file each."""
