"""How the demo was made: its text, its training, its nulls. Programs; not in the wheel."""
