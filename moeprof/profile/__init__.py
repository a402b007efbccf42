"""The result of profiling: metrics, tables, figures, pages, files."""
