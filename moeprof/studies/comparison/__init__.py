"""Routers at an equal budget of experts, against static top-k and controls: `moeprof compare`.

Parameters are set on one text, nulls fitted on a second, and each cell reads a third one once;
`effects` puts intervals on what comes of it and `findings` says it in words.
"""
