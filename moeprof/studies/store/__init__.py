"""Where finished cells of studies are kept: one SQLite file that any number of processes share."""
