"""All studies of one model, in one folder and one store, with one report."""
