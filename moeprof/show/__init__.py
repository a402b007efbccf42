"""What people see: consoles, colours, tables."""
