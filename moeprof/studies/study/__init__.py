"""The whole experiment on one model, into one store and one report: `moeprof study`."""
