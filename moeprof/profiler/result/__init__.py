"""What was counted, as numbers, tables, figures and files."""
